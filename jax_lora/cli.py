"""What the scripts share: flags, exit codes, stop requests, the settings of the process."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import io
import logging
import os
import platform
import signal
import sys
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from jax_lora.config import RENAMED
from jax_lora.data.cache import cache_folder
from jax_lora.errors import ConfigError, DataError, RunFailed, Stopped
from jax_lora.signals import STOPPED, end, heeded
from jax_lora.text import print_line, printable

WRONG_INPUT, FAILED = 2, 1
say = print_line  # what scripts print


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn the errors that are the user's to mend, faults while running and stops into one line on
    stderr and an exit code, see `jax_lora.errors`. Of other libraries' logs, show warnings alone.

    Any other exception is a fault of ours and passes through. JAX_LORA_TRACEBACK=1 shows the
    traceback of all of them.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # one that is ASCII has no × and no α
            stream.reconfigure(errors="replace")
    # JAX names the backends that it lacks, Orbax every file, matplotlib all tables of its fonts.
    for others in (None, "absl"):
        logging.getLogger(others).setLevel(logging.WARNING)
    try:
        yield
    except (ConfigError, DataError, OSError, RunFailed, Stopped) as error:
        if isinstance(error, OSError) and error.filename is None:
            raise
        if os.environ.get("JAX_LORA_TRACEBACK", "0") not in ("", "0"):
            traceback.print_exception(error)
        text = str(error)
        if isinstance(error, OSError) and error.strerror:  # its own text begins with a number
            text = f"{error.filename}: {error.strerror}"
        text = printable(" ".join(text.split())) or type(error).__name__
        code = {RunFailed: FAILED, Stopped: STOPPED}.get(type(error), WRONG_INPUT)
        # What ran has left the cursor behind a progress bar.
        start = "" if code == WRONG_INPUT else "\n"
        sys.stderr.write(f"{start}{'' if code == STOPPED else 'error: '}{text}\n")
        raise SystemExit(code) from error


T = TypeVar("T")


def require(flag: str, value: T | None, expected: str) -> T:
    """The value of a flag; a ConfigError where it is not given."""
    if value is None or value == "":
        raise ConfigError(f"--{flag}: found none, expected {expected}")
    return value


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class StopRequest:
    """A signal of STOPS asks for a checkpoint after the running step; a second one ends at once.

    So does the first one as long as there is nothing to save: before the loop first asks. Where
    several processes train together, all are to stop after the same step.

    Args:
      goes_on: the script has more to do after this block, such as the next cell of a study: a stop
        that came after the last question raises Stopped at the end of the block.
    """

    def __init__(self, *, goes_on: bool = False):
        self.asked, self._runs, self._goes_on = False, False, goes_on

    def __enter__(self) -> StopRequest:
        from jax_lora import distributed

        self._runs = distributed.key_value_store() is not None
        self._before = {number: signal.signal(number, self._ask) for number in heeded()}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.asked and self._goes_on and kind is None:
            raise Stopped("stopped after the last step; rerun the same command to resume")

    def __call__(self) -> bool:
        self._runs = True
        return self.asked

    def _ask(self, number: int, frame: object) -> None:
        if self.asked or not self._runs:
            end(number, frame)
        self.asked = True


def log_progress() -> None:
    """Show what the library logs, plain lines on stderr.

    Raises:
      ConfigError: see `check_platform`.
    """
    check_platform()
    handler = logging.StreamHandler()
    handler.setFormatter(_Plain("%(message)s"))
    # Orbax shows the traceback of an error that it raises as well.
    logging.getLogger("absl").addFilter(lambda record: not record.exc_info)
    logger = logging.getLogger("jax_lora")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO if _is_primary() else logging.WARNING)


def check_platform() -> None:
    """Start JAX, whose own errors over JAX_PLATFORMS are tracebacks.

    Raises:
      ConfigError: a platform that this machine does not have.
    """
    import jax

    platforms = jax.config.values["jax_platforms"]
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        if not platforms:
            raise
        reason = " ".join(str(error).split()) or "JAX has no such backend here"
        raise ConfigError(
            f"JAX_PLATFORMS: found {platforms!r}, expected platforms of this machine, or nothing: "
            f"{reason}"
        ) from None


def _is_primary() -> bool:
    import jax

    return jax.process_index() == 0


def configure_process(trains: bool) -> None:
    """Settings of a script's process, before JAX starts: `keep_memory`, where it trains,
    `set_xla_flags` and `keep_programs`."""
    with fast_imports():  # of JAX, which these ask
        if trains:
            keep_memory()
        set_xla_flags()
        keep_programs()


@contextmanager
def fast_imports() -> Iterator[None]:
    """Import without garbage collections, which take a quarter of the time and find nothing.

    What was imported stays until the process ends, so later collections, of which tracing sets off
    many, leave it out. This is for scripts: a library does not decide that for a process.
    """
    before = len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > before:
            gc.freeze()
        gc.enable()


def keep_programs() -> None:
    """Keep what is compiled for the next process of this machine or of one like it.

    In a folder of the user's cache, unless JAX's own settings name another one.
    """
    import jax

    folder = cache_folder()
    if folder is None or jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    info = Path("/proc/cpuinfo")  # a program for a processor may not run on another one
    lines = info.read_text().splitlines() if info.is_file() else [platform.processor()]
    kind = "".join(sorted({x for x in lines if x.startswith(("model name", "flags"))}))
    programs = folder / f"programs-{zlib.crc32(kind.encode()):08x}"
    jax.config.update("jax_compilation_cache_dir", str(programs))


def keep_memory() -> None:
    """Keep the memory of one training step for the next, where a CPU alone computes.

    XLA asks for the temporaries of every call anew. glibc would give back what is as large at
    once, and the kernel would clear every page of it again: a tenth of a step of SmolLM2. The
    process keeps its largest size for good, so this is for training on a CPU: with an accelerator
    the host's memory is for other things. What a compilation leaves, gigabytes of a program with
    unrolled layers, is given back. To be called before the first thread begins, since threads have
    heaps that cannot be so large.
    """
    is_glibc = hasattr(os, "confstr") and "glibc" in (os.confstr("CS_GNU_LIBC_VERSION") or "")
    if not is_glibc or not only_cpu():
        return
    import jax

    libc = ctypes.CDLL(None)
    # From malloc.h: no mapping of its own for a large block, no trimming, one heap.
    for parameter, value in ((-4, 0), (-1, -1), (-8, 1)):
        libc.mallopt(parameter, value)

    def trim(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("/backend_compile_duration") and duration_secs > 1:
            libc.malloc_trim(0)

    jax.monitoring.register_event_duration_secs_listener(trim)


def set_xla_flags() -> None:
    """Keep XLA's CPU compiler from fusing reductions, of which it makes wrong sums.

    docs/upstream/xla_cpu_reduce.md shows the fault; `Run.check` looks for it. To be called before
    JAX starts. It is left to the scripts, since XLA_FLAGS belongs to the process: set on import,
    it would change programs that are not ours, or come too late. Nothing is set where the user has
    set XLA_FLAGS, or in a version that may not know the flag, since XLA then aborts.
    """
    version = tuple(map(int, metadata.version("jaxlib").split(".")[:2]))
    if only_cpu() and (0, 10) <= version < (0, 13):
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type=-reduce")


def only_cpu() -> bool:
    """Whether JAX can have no other devices than CPUs, without starting it."""
    import jax

    platforms = jax.config.values["jax_platforms"] or ""
    if platforms:
        return platforms == "cpu"
    plugins = metadata.entry_points(group="jax_plugins")
    return not plugins and all(
        importlib.util.find_spec(name) is None for name in ("libtpu", "jax_plugins")
    )


def refuse_unread(given: Any, mode: str, *names: str) -> None:
    """Refuse flags that a mode of a script does not read.

    Args:
      given: absl's `FLAGS`.
      mode: the flag that chooses it.
      names: of flags that it does not read.

    Raises:
      ConfigError: one of these flags was given.
    """
    for name in names:
        if given[name].present:
            raise ConfigError(f"--{name}: found with {mode}, which does not read it")


def parse_flags(parser: Callable[[Sequence[str]], list[str]], argv: Sequence[str]) -> list[str]:
    """`parser(argv)`, where a wrong flag or config key is a line and exit code 2.

    absl's own way is a page of usage and exit code 1, and a config file may raise anything.
    """
    with exit_codes():
        tuples = Counter(
            flag for flag, _, value in (a.partition("=") for a in argv) if "(" in value
        )
        for flag, times in tuples.items():
            if times > 1 and flag.startswith("--config."):  # ml_collections joins them
                raise ConfigError(f"flags: {flag}: found {times} times, expected once")
        try:
            program, *rest = parser(argv)
        except Exception as error:
            # A wrong key comes as the repr of a KeyError's text.
            text = str(error).strip("'\"").replace("\\'", "'").replace("\\n", "; ")
            if "Traceback" in text:  # ml_collections quotes a config file's own error with it
                text = text.strip().splitlines()[-1].partition(": ")[2]
            # It names the last part of a wrong key alone; the flag itself says where.
            at = [a for a in argv if a.startswith("--config.") and f"'{_last_key(a)}'" in text]
            for old, new in RENAMED.items():
                if any(a.startswith(f"--config.{old}=") for a in argv):
                    text = f"config.{old} is called config.{new} now"
            raise ConfigError(" ".join(["flags:", *at, text])) from None
        if rest:
            found = ", ".join(map(repr, rest))
            raise ConfigError(f"flags: found {found}, expected flags such as --workdir=runs/r16")
        return [program]


def _last_key(flag: str) -> str:
    return flag.partition("=")[0].rpartition(".")[2]
