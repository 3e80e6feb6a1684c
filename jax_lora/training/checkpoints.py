"""Orbax checkpoints of what changes: the trainable half and the optimizer.

    <folder>/<step>/trainable   leaf name → array, frozen leaves absent
    <folder>/<step>/optimizer   leaf name → array

The step is also the position in the data: a batch is a function of (seed, step). Orbax writes
beside and renames, so a step that has its folder is whole. The latest one is kept. Many processes
write one checkpoint, each its part, into a folder that all of them see; it knows no mesh, and is
restored onto any other.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jax_lora.training.step import State


def _named(tree: Any) -> dict[str, Any]:
    # One flat level: the layout on disk does not depend on optax's or our own containers.
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _filled(tree: Any, named: Mapping[str, Any]) -> Any:
    return jax.tree.unflatten(jax.tree.structure(tree), [named[name] for name in _named(tree)])


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:  # tensorstore's word for a full or lost disk
        raise OSError(errno.EIO, str(error).splitlines()[0], str(folder)) from error


class Checkpoints:
    """The checkpoints of one run. All processes make one, save and restore, at the same steps.

    Args:
      folder: made if need be.
      alone: to restore in this process, whatever the others do; the folder is there.
    """

    def __init__(self, folder: str | Path, alone: bool = False):
        self._folder = Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=1)
        if alone and jax.process_count() > 1:
            me = jax.process_index()
            options.create = False
            options.multiprocessing_options = ocp.options.MultiprocessingOptions(
                primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"alone-{me}"
            )
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def latest(self) -> int | None:
        """The last whole step, None before the first."""
        # Not Orbax's list, which names a step from the moment that its writing begins.
        steps = [int(path.name) for path in self._folder.iterdir() if path.name.isdigit()]
        return max(steps, default=None)

    def save(self, state: State) -> None:
        """Save in the background; the arrays are copied before this returns.

        Raises:
          OSError: this or the save before it could not be written.
        """
        args = ocp.args.Composite(
            trainable=ocp.args.StandardSave(_named(state.trainable)),
            optimizer=ocp.args.StandardSave(_named(state.optimizer)),
        )
        with _writing(self._folder):
            self._manager.save(int(state.step), args=args)

    def restore(self, like: State) -> State:
        """The latest state, placed like `like`: arrays, or shapes that have their shardings."""
        step = self.latest()
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                trainable=ocp.args.StandardRestore(_named(like.trainable)),
                optimizer=ocp.args.StandardRestore(_named(like.optimizer)),
            ),
        )
        count = np.asarray(step, like.step.dtype)
        return State(
            jax.make_array_from_callback((), like.step.sharding, lambda _: count),
            _filled(like.trainable, restored["trainable"]),
            _filled(like.optimizer, restored["optimizer"]),
        )

    def restore_trainable(self, like: Any) -> Any:
        """The latest trainable half alone, placed like `like`."""
        args = ocp.args.Composite(trainable=ocp.args.StandardRestore(_named(like)))
        return _filled(like, self._manager.restore(self.latest(), args=args)["trainable"])

    def close(self) -> None:
        """Wait for what is being written; OSError where that failed."""
        with _writing(self._folder):
            self._manager.close()
