"""Locks under every interleaving of a few processes, cut at their calls to the file system."""

import errno
import fcntl
import itertools
import json
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from jax_lora import locks
from jax_lora.errors import ConfigError, RunFailed
from jax_lora.run import folder
from tests.study.test_runner import foreign

NAME = "cell"


class Actor:
    """A process as a thread that stops before each call to the file system until `step` lets
    it go on."""

    def __init__(self, program: Callable[[], None]):
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self.ended, self.error = False, None
        self._thread = threading.Thread(target=self._run, args=(program,), daemon=True)
        self._thread.start()

    def _run(self, program):
        self._go.acquire()
        try:
            program()
        except BaseException as error:
            self.error = error
        self.ended = True
        self._stopped.release()

    def pause(self):
        """Called by this thread itself, before a call to the file system."""
        if threading.current_thread() is self._thread:
            self._stopped.release()
            self._go.acquire()

    def step(self) -> bool:
        """Run up to the next call; False where the program has ended."""
        if not self.ended:
            self._go.release()
            self._stopped.acquire()
        if self.error:
            raise self.error
        return not self.ended

    def finish(self):
        """Run to the end."""
        while self.step():
            pass


class World:
    """A folder of locks, who owns one now, and the processes that want one."""

    def __init__(self, folder: Path):
        self.folder, self.owners, self.actors = folder, [], []

    def take(self):
        lock = locks.take(self.folder, NAME, beat=3600.0)
        if lock:
            self.owners.append(lock)
            assert len(self.owners) == 1, [one.path.name for one in self.owners]
        return lock

    def release(self, lock):
        if lock:
            self.owners.remove(lock)
            lock.release()

    def take_and_release(self):
        self.release(self.take())


def nothing(world):
    pass


def dead(world):
    foreign(world.folder, NAME, 1000.0)


def two_dead(world):
    (world.folder / f"{NAME}.2").write_text(foreign(world.folder, NAME, 1000.0).read_text())
    os.utime(world.folder / f"{NAME}.2", (0, 0))


def held(world):
    world.held = world.take()


def held_after_dead(world):
    dead(world)
    held(world)


TAKE, BOTH = World.take, World.take_and_release


def release(world):
    world.release(world.held)


def both_and_take(world):
    world.take_and_release()
    world.take()


def release_and_take(world):
    release(world)
    world.take()


@pytest.mark.parametrize(
    ("start", "programs"),
    [
        (nothing, (TAKE, TAKE)),
        (nothing, (TAKE, both_and_take)),
        (dead, (TAKE, TAKE)),
        (dead, (TAKE, both_and_take)),
        (two_dead, (TAKE, both_and_take)),
        (held, (TAKE, release_and_take)),
        (held_after_dead, (TAKE, release_and_take)),
        (nothing, (TAKE, TAKE, BOTH)),
        (dead, (TAKE, TAKE, BOTH)),
        (held, (TAKE, TAKE, release)),
        (held_after_dead, (TAKE, TAKE, release)),
    ],
)
def test_a_lock_never_has_two_owners(tmp_path, monkeypatch, start, programs):
    """One process is cut after i of its calls, another one after j, and they go on in any order.

    The kernel's locks are switched off, as between machines: the times of the files must do.
    """
    world = World(tmp_path)

    def hook(owner, name):
        call = getattr(owner, name)

        def hooked(*args, **kwargs):
            for actor in world.actors:
                actor.pause()
            return call(*args, **kwargs)

        monkeypatch.setattr(owner, name, hooked)

    def no_kernel_lock(*_):
        raise OSError

    monkeypatch.setattr(fcntl, "flock", no_kernel_lock)
    for owner, name in ((os, "link"), (os, "unlink"), (os, "listdir"), (Path, "open")):
        hook(owner, name)

    def run(folder: Path, order: Sequence[int], i: int, j: int, back: bool) -> list[int]:
        """The calls that the first two made before they were cut."""
        nonlocal world
        folder.mkdir()
        world = World(folder)
        start(world)
        world.actors = [Actor(lambda p=programs[k], w=world: p(w)) for k in order]
        first, second, *rest = world.actors
        made = []
        for actor, count in ((first, i), (second, j)):
            steps = 0
            while steps < count and actor.step():
                steps += 1
            made.append(steps)
        for actor in (*rest, *((first, second) if back else (second, first))):
            actor.finish()
        world.actors = []
        for lock in list(world.owners):
            world.release(lock)
        return made

    number = itertools.count()
    for order in itertools.permutations(range(len(programs))):
        for i in itertools.count():
            made = [i, 0]
            for j in itertools.count():
                for back in (True, False):
                    made = run(tmp_path / f"{next(number)}", order, i, j, back)
                if made[1] < j:
                    break
            if made[0] < i:
                break


def test_a_released_lock_that_was_taken_over_leaves_the_next_ones_alone(tmp_path):
    lock = locks.take(tmp_path, NAME)
    lock.path.unlink()  # its owner stood still: another one took it over and released it,
    other = foreign(tmp_path, NAME, 0.0)  # and a third one holds it now
    lock.release()
    assert [path.name for path in tmp_path.iterdir()] == [other.name]


def test_a_taker_that_died_before_it_withdrew_ends_nobody(tmp_path):
    with locks.take(tmp_path, NAME, lost=pytest.fail) as lock:
        text = json.loads(lock.path.read_text()) | {"token": "t", "after": "another"}
        (tmp_path / f"{NAME}.2").write_text(json.dumps(text))
        os.utime(tmp_path / f"{NAME}.2", (0, 0))
        lock.renew()
        assert locks.take(tmp_path, NAME) is None


# ---------------------------------------------------------------- files that no owner wrote


@pytest.mark.parametrize(
    "content", [b"", b'{"host": "far", "pid"', b"[1, 2]", b"null", b"\xff\xfe", b"[" * 50_000]
)
def test_a_file_that_no_owner_wrote_is_a_dead_owners(tmp_path, content):
    (tmp_path / f"{NAME}.1").write_bytes(content)
    assert not locks.is_held(tmp_path, NAME) and locks.holder(tmp_path, NAME) == {}
    with locks.take(tmp_path, NAME, lost=pytest.fail) as lock:
        assert lock.path.name == f"{NAME}.2"
        (tmp_path / f"{NAME}.7").write_bytes(content)  # nor does it take a lock away
        lock.renew()
        assert locks.take(tmp_path, NAME) is None
    assert os.listdir(tmp_path) == [f"{NAME}.7"]


# ---------------------------------------------------------------- signs from the future


def clock(monkeypatch):
    """A clock of this process that the test moves."""
    now = [0.0]
    monkeypatch.setattr(locks.time, "monotonic", lambda: now[0])
    return now


def test_a_sign_from_the_future_is_judged_by_silence(tmp_path, monkeypatch):
    now = clock(monkeypatch)
    path = foreign(tmp_path, NAME, -1e6)
    for now[0] in (0.0, 299.0):
        assert locks.take(tmp_path, NAME) is None and locks.is_held(tmp_path, NAME)
    os.utime(path, (path.stat().st_mtime + 15,) * 2)  # its owner lives
    for now[0] in (300.0, 599.0):
        assert locks.take(tmp_path, NAME) is None
    now[0] = 601.0
    assert not locks.is_held(tmp_path, NAME)
    locks.take(tmp_path, NAME).release()
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------- take it or say who has it


def test_who_holds_a_lock_is_told_at_once(tmp_path):
    with locks.take(tmp_path, NAME, what="train"):
        with pytest.raises(ConfigError) as caught:
            locks.hold(tmp_path, NAME, "eval", sleep=pytest.fail)
    for word in (str(tmp_path), "train runs here", f"process {os.getpid()} on", "since 2"):
        assert word in str(caught.value)
    locks.hold(tmp_path, NAME, "eval", sleep=pytest.fail).release()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("age", [0.0, 100.0, -1e6])
def test_a_holder_elsewhere_is_asked_for_a_sign(tmp_path, monkeypatch, age, caplog):
    now, slept = clock(monkeypatch), []
    path = foreign(tmp_path, NAME, age)

    def sleep(seconds):
        slept.append(seconds)
        now[0] += seconds
        if len(slept) == 3:
            os.utime(path, (path.stat().st_mtime + 15,) * 2)

    with caplog.at_level("INFO", "jax_lora"), pytest.raises(ConfigError, match="process 1 on far"):
        locks.hold(tmp_path, NAME, "train", sleep=sleep)
    assert len(slept) == 3 and "waiting for a sign of life" in caplog.text


@pytest.mark.parametrize("age", [100.0, -1e6])
def test_a_holder_elsewhere_that_is_silent_is_replaced(tmp_path, monkeypatch, age):
    now, path = clock(monkeypatch), foreign(tmp_path, NAME, age)
    files_now = path.stat().st_mtime + age

    def sleep(seconds):
        now[0] += seconds

    stat = os.stat

    def passing(target, *args, **kwargs):  # the file server's clock goes on as well
        found = stat(target, *args, **kwargs)
        if Path(target).name.startswith(".") and age > 0:
            return SimpleNamespace(st_mtime=files_now + now[0])
        return found

    monkeypatch.setattr(os, "stat", passing)
    lock = locks.hold(tmp_path, NAME, "train", sleep=sleep)
    assert (200 if age > 0 else 300) <= now[0] < 320
    monkeypatch.undo()
    lock.release()


def test_a_full_disk_has_the_name_of_the_folder(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(locks.os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        with folder.owned(tmp_path / "r", "training"):
            pass
    assert error.value.filename == str(tmp_path / "r")


def test_a_lost_disk_hides_no_error_of_the_work(tmp_path, monkeypatch):
    def lost(*_):
        raise OSError(errno.ESTALE, "Stale file handle")

    with pytest.raises(RunFailed, match="the last checkpoint is step 4"):
        with locks.take(tmp_path, "a"):
            monkeypatch.setattr(locks.os, "utime", lost)
            raise RunFailed("the disk; the last checkpoint is step 4")
