"""Many processes of one run: how they join, and how they agree to stop."""

from __future__ import annotations

import errno
import functools
import itertools
import os
import re
from typing import Protocol

import jax
import numpy as np
from jax._src import distributed  # its key-value store has no public name
from jax.experimental import multihost_utils

from jax_lora.errors import ConfigError, first_line


class KeyValueStore(Protocol):
    """What is used of the client of JAX's runtime, see `key_value_store`."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        """Set the value of a key, for all processes."""
        ...

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        """The value of a key, as soon as some process has set it."""
        ...

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        """The (key, value) pairs below a folder."""
        ...


def initialize(coordinator: str = "", processes: int = -1, process: int = -1) -> None:
    """Make this process one of many, before anything touches a device.

    Args:
      coordinator: host:port of process 0; "auto" where the cluster knows (SLURM, Open MPI,
        Kubernetes, TPU pods), see `jax.distributed.initialize`; "" reads the environment's
        JAX_COORDINATOR_ADDRESS, and without it this is a single process.
      processes, process: how many there are and which this one is, from 0; -1 reads
        JAX_NUM_PROCESSES and JAX_PROCESS_ID. Unused with "auto".

    Raises:
      ConfigError: an address without a port, numbers missing or out of range, or without an
        address.
      OSError: the others could not be reached.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    if not coordinator:
        if processes > 1 or process > 0:
            raise ConfigError(
                "--processes and --process: found without a coordinator, expected --coordinator "
                "(or JAX_COORDINATOR_ADDRESS) in each of them"
            )
        return
    start = jax.distributed.initialize
    if coordinator != "auto":
        count = _from_environment(processes, "JAX_NUM_PROCESSES")
        index = _from_environment(process, "JAX_PROCESS_ID")
        if not re.fullmatch(r".+:\d+", coordinator):
            raise ConfigError(f"coordinator: found {coordinator!r}, expected host:port or auto")
        if not 0 <= index < count:
            raise ConfigError(
                f"coordinator: found process {index} of {count}, expected 0 to one less than their "
                "number (--process and --processes, or JAX_PROCESS_ID and JAX_NUM_PROCESSES)"
            )
        # No detection: a cluster may count the devices of a process in its own way.
        start = functools.partial(
            jax.distributed.initialize,
            coordinator_address=coordinator,
            num_processes=count,
            process_id=index,
            cluster_detection_method="deactivate",
        )
    try:
        start()
    except ValueError:
        raise ConfigError(
            "coordinator: found no cluster that jax knows, expected host:port in place of auto"
        ) from None
    except RuntimeError as error:
        reason = first_line(error)
        text = f"the processes did not meet: {reason}"
        raise OSError(errno.ETIMEDOUT, text, f"coordinator {coordinator}") from None


def _from_environment(number: int, name: str) -> int:
    text = os.environ.get(name, "-1") if number == -1 else str(number)
    if not re.fullmatch(r"-?\d+", text):
        raise ConfigError(f"{name}: found {text!r}, expected a number")
    return int(text)


def key_value_store() -> KeyValueStore | None:
    """The key-value store of JAX's runtime, which all processes see; None in a single process."""
    return distributed.global_state.client


class StopAgreement:
    """The step after which all processes of a run stop, once one of them was asked to.

    A process that is asked during step n writes n + 2 into the key-value store; the smallest number
    written counts. No collective is needed and no step is waited for: a process checks for step
    n + 2 after it has read the loss of step n + 1, that loss needs all processes to have dispatched
    step n + 1, and a process that was asked during step n has written by then.

    Args:
      store: see `key_value_store`; None for a single process, which stops at once.
      process: the number of this process.
      run: distinguishes the agreements of one process; equal in all processes.
    """

    _count = itertools.count()

    def __init__(self, store: KeyValueStore | None, process: int = 0, run: int | None = None):
        self._store, self._process, self._has_asked = store, process, False
        self._folder = f"stop_after/{next(self._count) if run is None else run}/"

    def is_last(self, step: int, asked: bool) -> bool:
        """Whether the run ends with this step.

        Args:
          step: the one that was dispatched last; the loss of the one before has been read.
          asked: whether this process was asked to stop.
        """
        if self._store is None:
            return asked
        found = [int(last) for _, last in self._store.key_value_dir_get(self._folder)]
        if asked and not self._has_asked:
            self._store.key_value_set(f"{self._folder}{self._process}", str(step + 2))
            self._has_asked = True
            found.append(step + 2)
        return bool(found) and step >= min(found)


def any_process(flag: bool, after: object) -> bool:
    """Whether a flag is set in any process; all processes must ask.

    Args:
      flag: of this process.
      after: results of the program that was dispatched last. CPUs run programs that do not depend
        on each other at once, and two that communicate would take each other's messages.
    """
    if jax.process_count() == 1:
        return flag
    jax.block_until_ready(after)
    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())
