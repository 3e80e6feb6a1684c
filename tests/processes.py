"""Drivers in processes of their own, each of which takes the CPU for several devices."""

import contextlib
import os
import socket
import subprocess
import sys

from tests.conftest import REPOSITORY, many_cpus

PATIENCE = 600  # seconds, for a hang to become a failure


def free_address() -> str:
    """host:port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def start(module: str, devices: int, *arguments: object) -> subprocess.Popen[str]:
    """Start a module of the tests, such as "tests.training.many_devices"."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=REPOSITORY,
        env=os.environ | many_cpus(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_two(module: str, *arguments: object) -> list[subprocess.Popen[str]]:
    """Start two processes of a module with 4 devices each, which join."""
    common = (*arguments, "--coordinator", free_address(), "--processes", 2)
    return [start(module, 4, *common, "--process", i) for i in (0, 1)]


def finish(*processes: subprocess.Popen[str]) -> list[str]:
    """What the processes wrote, all of them well."""
    with contextlib.ExitStack() as stack:
        for process in processes:
            stack.callback(process.wait)
            stack.callback(process.kill)
        written = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    for process, text in zip(processes, written, strict=True):
        assert process.returncode == 0, text
    return written
