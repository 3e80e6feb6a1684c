"""The processes of one worker, which train its cells together; the first one leads.

The leader alone takes locks, scores and writes. The others wait for it to say what to train, in
the store of keys and values of JAX's own runtime:

    names/<n>      what is trained as the n-th thing; "" where nothing more will be
    ends/<n>/<i>   how process i came out of it: "" or why it failed
    ready/<i>      process i found its input in order
    stop/<i>       process i was asked to end
    left/<i>       process i is about to end

A wait in the store may last for hours, where one in a collective would time out. Nothing here
asks whether a process lives: JAX ends all of them some 100 s after one has died.
"""

from __future__ import annotations

import itertools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jax_lora.distributed import KeyValueStore
from jax_lora.errors import ConfigError, Stopped
from jax_lora.locks import SILENCE
from jax_lora.signals import STOPPED

logger = logging.getLogger(__name__)


class Team:
    """This process among those of its worker; inside of a `with`. A single process leads no others.

    Args:
      store: that all processes see, see `distributed.key_value_store`; None for a single process.
      process, processes: which one this is, from 0, and how many there are.
      beat: seconds between two looks into the store.
      patience: seconds that all have to end a training once one has failed in it. Longer than JAX
        takes to notice that a process died: those that are left then wait for each other.
      farewell: seconds that the others have to end once the leader does.
      exit_process: ends this process at once, with an exit code.
    """

    def __init__(
        self,
        store: KeyValueStore | None = None,
        process: int = 0,
        processes: int = 1,
        *,
        beat: float = 0.5,
        patience: float = SILENCE,
        farewell: float = 10.0,
        exit_process: Callable[[int], object] = os._exit,
    ):
        self._store, self._process, self._processes = store, process, processes
        self._beat, self._patience, self._farewell = beat, patience, farewell
        self._exit_process = exit_process
        self._count = 0  # of what was trained
        self._lost: Callable[[str], None] = lambda reason: None
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self.disagreement = ""  # why the processes of this worker cannot go on together

    @property
    def leads(self) -> bool:
        """Whether this is the process that takes cells, scores and writes."""
        return self._process == 0

    def __enter__(self) -> Team:
        if self._store and self.leads:
            self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._store:
            return
        self._set(f"left/{self._process}")
        if self.leads:
            self._over.set()
            self._watcher.join()
            self._set(f"names/{self._count + 1}")
            end = time.monotonic() + self._farewell
            while time.monotonic() < end:
                if len(self._get("left")) == self._processes:
                    return
                time.sleep(self._beat)
            # They wait for this one in a collective; JAX ends them with it.
            logger.critical("the other processes of this worker did not follow; it ends at once")
            self._exit_process(1)

    # ---------------------------------------------------------------- the leader

    def gather(self) -> None:
        """Wait until the others are ready.

        Raises:
          ConfigError: one of them ended.
        """
        while self._store and len(self._get("ready")) < self._processes - 1:
            if ended := self._get("left"):
                raise ConfigError(
                    f"process {min(ended)} ended before it began: its output says why"
                )
            time.sleep(self._beat)

    @contextmanager
    def together(self, name: str, lost: Callable[[str], None]) -> Iterator[None]:
        """What the enclosed block trains, the others train at the same time.

        Args:
          name: of what is trained; what the others' `follow` gets.
          lost: called with a reason where one failed and others wait for it: by another thread,
            and then this process ends.

        Raises:
          OSError: not all failed, or not in the same words: they are out of step, which
            `disagreement` then says, too. What failed alike in all is raised as it is, and they may
            go on.
        """
        if not self._store:
            yield
            return
        self._lost = lost
        self._count += 1
        self._set(f"names/{self._count}", name)
        failure = None
        try:
            yield
        except (Exception, SystemExit) as error:
            failure = error
        self._end(failure)
        while len(ends := self._ends()) < self._processes:
            time.sleep(self._beat)
        if len(set(ends.values())) > 1:
            self.disagreement = _reasons(ends)
            raise OSError(self.disagreement) from failure
        if failure:
            raise failure

    def _watch(self) -> None:
        """Look after what the leader itself cannot, in a collective or while it scores."""
        since = None
        while not self._over.wait(self._beat):
            if self._get("stop"):
                os.kill(os.getpid(), signal.SIGTERM)  # as if it had been this process
                return
            ends = self._ends()
            if not any(ends.values()) or len(ends) == self._processes:
                since = None
                continue
            since = since or time.monotonic()
            if time.monotonic() - since > self._patience:
                self._lost(_reasons(ends))
                self._exit_process(1)
                return

    # ---------------------------------------------------------------- the others

    def follow(self, train: Callable[[str], None]) -> None:
        """Train what the leader names, until it names nothing more.

        What `train` raises is told to the leader, and its next name is waited for.
        """
        self._set(f"ready/{self._process}")
        for self._count in itertools.count(1):
            while (name := self._get("names").get(str(self._count))) is None:
                time.sleep(self._beat)
            if not name:
                return
            failure = None
            try:
                train(name)
            except (Exception, SystemExit) as error:
                failure = error
            self._end(failure)

    def stop(self) -> None:
        """Ask the leader to end, which ends all."""
        self._set(f"stop/{self._process}")

    # ---------------------------------------------------------------- the store

    def _end(self, failure: BaseException | None) -> None:
        """Tell how this process came out; one that was stopped tells nothing, and ends."""
        reason = failure and fault(failure)
        if failure and not reason:
            raise failure
        words = " ".join(str(reason).split()) or type(reason).__name__
        self._set(f"ends/{self._count}/{self._process}", words if reason else "")

    def _ends(self) -> dict[str, str]:
        return self._get(f"ends/{self._count}")

    def _set(self, key: str, value: str = "") -> None:
        assert self._store
        self._store.key_value_set(f"team/{key}", value, allow_overwrite=True)

    def _get(self, folder: str) -> dict[str, str]:
        """The values below a key, by the rest of the key."""
        assert self._store
        start = f"team/{folder}/"
        return {k.removeprefix(start): v for k, v in self._store.key_value_dir_get(start)}


def fault(end: BaseException) -> Exception | None:
    """What failed behind an exception that ended a script; None: it was stopped."""
    # JAX gives whatever is raised while it traces a cause, a stop signal's SystemExit, too.
    if isinstance(end, SystemExit) and end.code == STOPPED:
        return None
    found = end.__cause__ if isinstance(end, SystemExit) else end
    return found if isinstance(found, Exception) and not isinstance(found, Stopped) else None


def _reasons(ends: dict[str, str]) -> str:
    failed = (f"process {process}: {ends[process]}" for process in sorted(ends) if ends[process])
    return f"not all processes of this worker failed alike: {'; '.join(failed)}"
