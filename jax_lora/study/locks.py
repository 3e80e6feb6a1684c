"""Who works on what, in files: any number of processes, on machines that share a folder.

    <folder>/<name>.<n>     held by the n-th process that took it; its owner as JSON

A lock is taken by linking the file of the next n, which one process alone can do, when every file
that is there belongs to a dead owner. Dead owners' files are not deleted first, so that no live
lock can be deleted by mistake. Between the look and the link others may have taken and released
the lock, and the numbers start again at 1 then. So the taker looks again, and withdraws unless
all that it found dead is still there, and nothing else.

An owner's sign of life is its file's modification time, which it renews; on one machine a kernel
lock on the file tells at once, however a process ended. Clocks of different machines are never
compared: all times are the file server's. As with every lease, an owner that stands still for
longer than `silence` may be replaced; it ends as soon as it runs again and notices.
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
import uuid
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

    def __init__(
        self, path: Path, handle: Any, token: str, beat: float, lost: Callable[[str], None]
    ):
        self.path = path
        self._handle = handle  # open: the kernel's lock goes with it
        self._token, self._beat, self._lost = token, beat, lost
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()

    def _live(self) -> None:
        while not self._released.wait(self._beat):
            with suppress(OSError):  # a file server that hesitates: the next beat may come through
                self.renew()

    def renew(self) -> None:
        """Give a sign of life, or end where the lock is another's by now."""
        if self._is_held():
            os.utime(self.path)
        elif not self._released.is_set():
            self._lost(f"{self.path}: another process took this lock over; this one ends")

    def _is_held(self) -> bool:
        """Whether the file is there and no later owner took it from this one."""
        name, n = self.path.name.rsplit(".", 1)
        found = {i: json.loads(text) for i, text in _files(self.path.parent, name).items()}
        if found.get(int(n), {}).get("token") != self._token:
            return False
        # A file whose owner took it from somebody else is one that is about to be withdrawn.
        later = (file.get("after", self._token) for i, file in found.items() if i > int(n))
        return self._token not in later

    def release(self) -> None:
        """Give it up; also removes what dead owners left."""
        self._released.set()
        self._thread.join()
        os.utime(self._handle.fileno())  # nobody may take it over while its files go
        if self._is_held():
            name, n = self.path.name.rsplit(".", 1)
            for i in range(1, int(n) + 1):  # upwards: see `take`
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
    token = uuid.uuid4().hex
    fresh = folder / f".{token}"
    handle, taken = fresh.open("w"), None
    try:
        with suppress(OSError):  # where the file system has none, times alone must do
            fcntl.flock(handle, fcntl.LOCK_EX)
        dead = _files(folder, name)
        now = os.stat(fresh).st_mtime
        if any(now - _heartbeat(folder / f"{name}.{i}") < silence for i in dead):
            return None
        n = max(dead, default=0)
        after = json.loads(dead[n]).get("token") if n else None
        text = json.dumps({**owner(), "machine": _machine(), "token": token, "after": after})
        handle.write(text)
        handle.flush()
        path = folder / f"{name}.{n + 1}"
        try:
            os.link(fresh, path)  # complete and locked from its first moment
        except FileExistsError:
            return None
        # Whoever held n + 1 meanwhile deleted n before it, and who holds 1 now is not among `dead`.
        if _files(folder, name) != dead | {n + 1: text}:
            path.unlink()
            return None
        taken = Lock(path, handle, token, beat, lost)
        return taken
    finally:
        fresh.unlink()
        if taken is None:
            handle.close()


def _files(folder: Path, name: str) -> dict[int, str]:
    """The text of every file of a lock, by its number; no two files ever have the same text."""
    pattern = re.compile(rf"{re.escape(name)}\.(\d+)")
    matches = (pattern.fullmatch(file) for file in os.listdir(folder)) if folder.is_dir() else ()
    found = {}
    for match in filter(None, matches):
        with suppress(FileNotFoundError), (folder / match[0]).open() as file:
            found[int(match[1])] = file.read()
    return dict(sorted(found.items()))


def holder(folder: Path, name: str) -> dict[str, Any]:
    """Who took a lock last, see `owner`; empty where nobody holds it."""
    found = _files(folder, name)
    return json.loads(found[max(found)]) if found else {}


def last_heartbeat(folder: Path, name: str) -> float:
    """When a lock's owner last showed that it lives, in seconds of the file server's clock.

    Returns:
      ∞ for a process that is seen to live, -∞ for one that is seen to be dead or for no lock.
    """
    signs = (_heartbeat(folder / f"{name}.{i}") for i in _files(folder, name))
    return max(signs, default=-math.inf)


def is_held(folder: Path, name: str, silence: float = SILENCE) -> bool:
    """Whether a living process holds a lock."""
    sign = last_heartbeat(folder, name)
    return sign == math.inf or (sign > -math.inf and _now(folder) - sign < silence)


def _now(folder: Path) -> float:
    """The file server's time: that of a file made just now."""
    fresh = folder / f".{uuid.uuid4().hex}"
    try:
        fresh.touch()
        return fresh.stat().st_mtime
    finally:
        fresh.unlink(missing_ok=True)


def _heartbeat(path: Path) -> float:
    """`last_heartbeat` of one file."""
    try:
        with path.open() as file:
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
