"""Who works on what, in files: any number of processes, on machines that share a folder.

    <folder>/<name>.<n>     held by the n-th process that took it; its owner as JSON

Only the highest n counts. A lock is taken by making the file of the next n, which one process
alone can do, when there is none before or the one before is dead: it is not deleted first, so no
live lock can be deleted by mistake. A sign of life is the file's modification time, which its
owner renews; on one machine a lock of the kernel on that file tells at once, however a process
ended. Clocks of different machines are never compared: both times are the file server's.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import platform
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

BEAT = 15.0  # seconds between an owner's signs of life
SILENCE = 300.0  # seconds without one after which an owner on another machine counts as dead


def owner() -> dict[str, Any]:
    """This process, as locks and results name it."""
    return {"host": platform.node(), "pid": os.getpid()}


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")  # tells machines of one name apart, on Linux
    return f"{platform.node()} {boot.read_text().strip() if boot.is_file() else ''}"


class Lock:
    """A lock that this process holds until `release`, or the end of a `with`.

    While it is held a thread renews its sign of life. A process that was cut off for so long that
    another one took its place must not go on writing: it ends at once, by `lost`.
    """

    def __init__(self, path: Path, handle: Any, beat: float, lost: Callable[[str], None]):
        self.path = path
        self._handle = handle  # open: the kernel's lock goes with it
        self._beat, self._lost = beat, lost
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()

    def _live(self) -> None:
        while not self._released.wait(self._beat):
            with suppress(OSError):  # a file server that hesitates: the next beat may come through
                self.renew()

    def renew(self) -> None:
        """Give a sign of life, or end where the lock is another's by now."""
        name, n = self.path.name.rsplit(".", 1)
        if latest(self.path.parent, name) == int(n):
            os.utime(self.path)
        elif not self._released.is_set():
            self._lost(f"{self.path}: another process took this lock over; this one ends")

    def release(self) -> None:
        """Give it up; also removes what dead owners left."""
        self._released.set()
        self._thread.join()
        name, n = self.path.name.rsplit(".", 1)
        for i in range(1, int(n) + 1):
            with suppress(FileNotFoundError):
                self.path.with_name(f"{name}.{i}").unlink()
        self._handle.close()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _end(message: str) -> None:
    logger.critical(message)
    os._exit(1)


def take(
    folder: Path,
    name: str,
    *,
    beat: float = BEAT,
    silence: float = SILENCE,
    lost: Callable[[str], None] = _end,
) -> Lock | None:
    """Take a lock, also from an owner that died; None where a living process holds it.

    Args:
      folder: of the locks, made if need be.
      name: of the lock.
      beat: seconds between signs of life.
      silence: seconds without one after which an owner counts as dead.
      lost: called with a line when another process took over; must not return.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = folder / f".{platform.node()}-{os.getpid()}-{threading.get_ident()}"
    handle, taken = own.open("w"), None
    try:
        json.dump({**owner(), "machine": _machine()}, handle)
        handle.flush()
        with suppress(OSError):  # where the file system has none, times alone must do
            fcntl.flock(handle, fcntl.LOCK_EX)
        n = latest(folder, name)
        if n and os.stat(own).st_mtime - last_sign(folder, name) < silence:
            return None
        mine = folder / f"{name}.{n + 1}"
        try:
            os.link(own, mine)  # whole and locked from its first moment
        except FileExistsError:
            return None
        if latest(folder, name) != n + 1:  # the list of generations was out of date
            mine.unlink()
            return None
        taken = Lock(mine, handle, beat, lost)
        return taken
    finally:
        own.unlink()
        if taken is None:
            handle.close()


def latest(folder: Path, name: str) -> int:
    """The number of the lock that counts, 0 where there is none."""
    pattern = re.compile(rf"{re.escape(name)}\.(\d+)")
    found = (pattern.fullmatch(file) for file in os.listdir(folder)) if folder.is_dir() else ()
    return max((int(match[1]) for match in found if match), default=0)


def holder(folder: Path, name: str) -> dict[str, Any]:
    """Who took a lock last, see `owner`; empty where nobody holds it."""
    try:
        return json.loads((folder / f"{name}.{latest(folder, name)}").read_text())
    except FileNotFoundError:
        return {}


def last_sign(folder: Path, name: str) -> float:
    """When a lock's owner last showed that it lives, in seconds of the file server's clock.

    Returns:
      ∞ for a process that is seen to live, -∞ for one that is seen to be dead or for no lock.
    """
    try:
        with (folder / f"{name}.{latest(folder, name)}").open() as file:
            held = json.load(file)
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return math.inf
            except OSError:
                return os.fstat(file.fileno()).st_mtime
            # The kernel of another machine may know nothing of its locks.
            here = held["machine"] == _machine()
            return -math.inf if here else os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return -math.inf
