"""What a stop signal does to a script; it imports little, so that it can be imported first."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from contextlib import suppress

STOPPED = 75  # the exit code
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PATIENCE = 8.0  # seconds that a process has to end after a stop


def stop_on_signals() -> None:
    """From now on SIGTERM, SIGINT and SIGHUP end the process: one line, exit code 75.

    What is open is left by its `finally`s, so that nothing temporary stays. To be called before
    the first import that takes seconds. A signal that is ignored, as under nohup, stays so.
    """
    # Registered first, so run last. Python then takes its handlers away while it shuts down: a
    # signal would turn a script that has done all of its work into a failed one.
    atexit.register(_ignore)
    for number in heeded():
        signal.signal(number, end)


def heeded() -> list[signal.Signals]:
    """Those of STOPS that this process does not ignore."""
    return [number for number in STOPS if signal.getsignal(number) != signal.SIG_IGN]


def end(number: int, _: object) -> None:
    """The handler of a signal: end this process."""
    _ignore()  # nothing interrupts the `finally`s
    name = signal.Signals(number).name
    os.write(2, f"\nstopped by {name}; rerun the same command to resume\n".encode())
    # Raised within a finalizer or a callback of the collector, Python would print it and go on.
    sys.unraisablehook = lambda _: None
    # Before anybody's own: libraries that still compute crash while they are taken down.
    atexit.register(_leave)
    # A library may swallow the exception, or wait for a thread.
    last = threading.Timer(PATIENCE, os._exit, (STOPPED,))
    last.daemon = True
    last.start()
    raise SystemExit(STOPPED)


def _ignore() -> None:
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


def _leave() -> None:
    with suppress(Exception):
        sys.stdout.flush()
    os._exit(STOPPED)
