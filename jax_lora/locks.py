"""Who works on what, in files: any number of processes, on machines that share a folder.

    <folder>/<name>.<n>     held by the n-th process that took it; its owner as JSON

A lock is taken by linking the file of the next n, which one process alone can do, when every file
that is there belongs to a dead owner. Dead owners' files are not deleted first, so that no live
lock can be deleted by mistake. Between the look and the link others may have taken and released
the lock, and the numbers start again at 1 then. So the taker looks again, and withdraws unless
all that it found dead is still there, and nothing else.

An owner's sign of life is its file's modification time, which it renews; on one machine a kernel
lock on the file tells at once, however a process ended. Clocks of different machines are never
compared: all times are the file server's, and where that was set back, so that a sign lies in the
future, its owner's silence is measured by the one who waits. As with every lease, an owner that
stands still for longer than `silence` may be replaced; it ends as soon as it runs again and
notices. A file that no owner wrote (empty, cut, something else) is a dead owner's.
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
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from jax_lora.errors import ConfigError

logger = logging.getLogger(__name__)

BEAT = 15.0  # seconds between an owner's signs of life
SILENCE = 300.0  # seconds without one after which an owner on another machine counts as dead


# The signs of life that lie in the future, and when this process first saw them, by its own clock.
_future: dict[Path, tuple[float, float]] = {}


def owner() -> dict[str, str | int]:
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
        self, path: Path, handle: TextIO, token: str, beat: float, lost: Callable[[str], None]
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
        found = {i: _parse(text) for i, text in _files(self.path.parent, name).items()}
        if found.get(int(n), {}).get("token") != self._token:
            return False
        # A file whose owner took it from somebody else is one that is about to be withdrawn.
        owners = (file for i, file in found.items() if i > int(n) and "machine" in file)
        later = (file.get("after", self._token) for file in owners)
        return self._token not in later

    def release(self) -> None:
        """Give it up; also removes what dead owners left."""
        self._released.set()
        self._thread.join()
        with suppress(OSError):  # of a lost disk whoever worked on it has told
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
    what: str = "",
    beat: float = BEAT,
    silence: float = SILENCE,
    lost: Callable[[str], None] = _end,
) -> Lock | None:
    """Take a lock, also from an owner that died; None where a living process holds it.

    Args:
      folder: of the locks, made if need be.
      name: of the lock.
      what: the owner does, see `holder`.
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
        if any(_silent_for(folder / f"{name}.{i}", now) < silence for i in dead):
            return None
        n = max(dead, default=0)
        after = _parse(dead[n]).get("token") if n else None
        record = {**owner(), "what": what, "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        text = json.dumps({**record, "machine": _machine(), "token": token, "after": after})
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())  # before another machine can see its name
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


def hold(
    folder: Path,
    name: str,
    what: str,
    *,
    beat: float = BEAT,
    silence: float = SILENCE,
    sleep: Callable[[float], None] = time.sleep,
) -> Lock:
    """Take a lock, or say who holds it.

    A holder on this machine is seen to live or not. One elsewhere is waited for until it gives the
    next sign of life, or gave none for `silence` and is replaced.

    Args:
      folder, name, beat, silence: as for `take`.
      what: this process does, in a word or two.
      sleep: waits so many seconds.

    Raises:
      ConfigError: a living process holds it: what it does, its host, its number, and since when.
    """
    first = None
    while (lock := take(folder, name, what=what, beat=beat, silence=silence)) is None:
        sign, held = last_heartbeat(folder, name), holder(folder, name)
        who = f"{held.get('what') or 'a process'} runs here, process {held.get('pid')} on "
        who += f"{held.get('host')}, since {held.get('since')}"
        if sign == math.inf or (first is not None and sign > first > -math.inf):
            raise ConfigError(f"{folder}: {who}; expected one at a time: wait until it ends")
        if first is None and sign > -math.inf:
            text = "%s: %s, or it died: waiting for a sign of life, for up to %.0f s"
            logger.info(text, folder, who, silence)
            first = sign
        sleep(beat / 3)
    return lock


def _files(folder: Path, name: str) -> dict[int, str]:
    """The text of every file of a lock, by its number; no two files ever have the same text."""
    pattern = re.compile(rf"{re.escape(name)}\.(\d+)")
    matches = (pattern.fullmatch(file) for file in os.listdir(folder)) if folder.is_dir() else ()
    found = {}
    for match in filter(None, matches):
        with suppress(FileNotFoundError), (folder / match[0]).open(errors="replace") as file:
            found[int(match[1])] = file.read()
    return dict(sorted(found.items()))


def _parse(text: str) -> dict[str, object]:
    """What a lock's file says; nothing where no owner wrote it."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def holder(folder: Path, name: str) -> dict[str, object]:
    """Who took a lock last, see `owner`, what for and since when; empty where nobody did."""
    found = _files(folder, name)
    return _parse(found[max(found)]) if found else {}


def last_heartbeat(folder: Path, name: str) -> float:
    """When a lock's owner last showed that it lives, in seconds of the file server's clock.

    Returns:
      ∞ for a process that is seen to live, -∞ for one that is seen to be dead or for no lock.
    """
    signs = (_heartbeat(folder / f"{name}.{i}") for i in _files(folder, name))
    return max(signs, default=-math.inf)


def is_held(folder: Path, name: str, silence: float = SILENCE) -> bool:
    """Whether a living process holds a lock."""
    found = _files(folder, name)
    if not found:
        return False
    now = _now(folder)
    return any(_silent_for(folder / f"{name}.{i}", now) < silence for i in found)


def _now(folder: Path) -> float:
    """The file server's time: that of a file made just now."""
    fresh = folder / f".{uuid.uuid4().hex}"
    try:
        fresh.touch()
        return fresh.stat().st_mtime
    finally:
        fresh.unlink(missing_ok=True)


def _silent_for(path: Path, now: float) -> float:
    """Seconds since the owner's last sign of life: -∞ where it is seen to live, ∞ to be dead.

    Of a sign in the future, since this process first saw it.
    """
    sign = _heartbeat(path)
    if sign <= now or sign == math.inf:
        return now - sign
    known, since = _future.get(path, (None, 0.0))
    if known != sign:
        since = time.monotonic()
        _future[path] = sign, since
    return time.monotonic() - since


def _heartbeat(path: Path) -> float:
    """`last_heartbeat` of one file."""
    try:
        with path.open(errors="replace") as file:
            held = _parse(file.read())
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return math.inf
            except OSError:
                return os.fstat(file.fileno()).st_mtime if held else -math.inf
            # The kernel of another machine may know nothing of its locks.
            elsewhere = held.get("machine", _machine()) != _machine()
            return os.fstat(file.fileno()).st_mtime if elsewhere else -math.inf
    except FileNotFoundError:
        return -math.inf
