"""Orbax checkpoints of what changes: the trainable half, the optimizer, the position in the data.

    <folder>/<step>/trainable   leaf name → array, frozen leaves absent
    <folder>/<step>/optimizer   leaf name → array
    <folder>/<step>/progress    JSON: the step and whatever the caller adds

Orbax writes beside and renames, so a step that is listed is whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jax_lora.training.step import State


def _named(tree: Any) -> dict[str, Any]:
    # One flat level: the layout on disk does not depend on optax's or our own containers.
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _filled(tree: Any, named: Mapping[str, Any]) -> Any:
    return jax.tree.unflatten(jax.tree.structure(tree), [named[name] for name in _named(tree)])


class Checkpoints:
    """The checkpoints of one run.

    Args:
      folder: made if need be.
      keep: how many of the latest stay; None keeps all.
    """

    def __init__(self, folder: str | Path, keep: int | None = 1):
        self._manager = ocp.CheckpointManager(
            Path(folder).absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=keep)
        )

    def latest(self) -> int | None:
        """The last whole step, None before the first."""
        return self._manager.latest_step()

    def save(self, state: State, progress: Mapping[str, Any]) -> None:
        """Save in the background; the arrays are copied before this returns."""
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                trainable=ocp.args.StandardSave(_named(state.trainable)),
                optimizer=ocp.args.StandardSave(_named(state.optimizer)),
                progress=ocp.args.JsonSave(dict(progress)),
            ),
        )

    def restore(self, like: State) -> tuple[State, dict[str, Any]]:
        """The latest state, placed like `like`, and its progress."""
        step = self.latest()
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                trainable=ocp.args.StandardRestore(_named(like.trainable)),
                optimizer=ocp.args.StandardRestore(_named(like.optimizer)),
                progress=ocp.args.JsonRestore(),
            ),
        )
        state = State(
            jax.numpy.asarray(step, like.step.dtype),
            _filled(like.trainable, restored["trainable"]),
            _filled(like.optimizer, restored["optimizer"]),
        )
        return state, restored["progress"]

    def restore_trainable(self, like: Any) -> Any:
        """The latest trainable half alone, placed like `like`."""
        args = ocp.args.Composite(trainable=ocp.args.StandardRestore(_named(like)))
        return _filled(like, self._manager.restore(self.latest(), args=args)["trainable"])

    def close(self) -> None:
        """Wait for what is being written."""
        self._manager.close()
