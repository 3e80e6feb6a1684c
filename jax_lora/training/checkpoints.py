"""Orbax checkpoints of what changes: the trainable half and the optimizer.

    <folder>/<step>/trainable   leaf name → array, frozen leaves absent
    <folder>/<step>/optimizer   leaf name → array
    <folder>/<step>/digests     the step, leaf name → digest of its array, the best step so far,
                                and the sha256 of these three

The step is also the position in the data: a batch is a function of (seed, step). Orbax writes
beside and renames, so a step that has its folder was written to its end. Whether it still holds
what was written is checked when it is read: a damaged one is passed over for the one before, which
is why the last two are kept. The step that had the lowest validation loss is stored with each
state, so that a resumed run goes on with what it knew there; where it is asked for, the checkpoint
of that step is kept too, of each of the last two. Only finite states are written. Many processes
write one checkpoint, each its part, into a folder that all of them see; it knows no mesh, and is
restored onto any other.

Orbax's part: tensorstore flushes each data file to the disk before it is renamed; the folders, and
Orbax's own JSON files, are flushed by this module once the step has its name.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from jax_lora import distributed
from jax_lora.errors import ConfigError, DataError, one_line
from jax_lora.files import flush_folder, read_json
from jax_lora.training.digests import examine
from jax_lora.training.step import State
from jax_lora.training.validation import Best

logger = logging.getLogger(__name__)
KEEP = 2  # checkpoints: the last one, and one in case that it is damaged
ITEMS = ("trainable", "optimizer", "digests")
Named = dict[str, Any]  # arrays, or shapes that have their shardings


def _named(tree: PyTree) -> Named:
    # One flat level: the layout on disk does not depend on optax's or our own containers.
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _filled(tree: PyTree, named: Named) -> PyTree:
    return jax.tree.unflatten(jax.tree.structure(tree), [named[name] for name in _named(tree)])


def _prefixed(parts: Mapping[str, Named]) -> Named:
    return {f"{item}/{name}": x for item, part in parts.items() for name, x in part.items()}


def steps_in(folder: Path) -> list[int]:
    """The steps of a folder of checkpoints, the last one first; whole or not."""
    if not folder.is_dir():
        return []
    found = (path for path in folder.iterdir() if path.name.isdigit() and path.is_dir())
    return sorted(
        (int(path.name) for path in found if any((path / item).exists() for item in ITEMS)),
        reverse=True,
    )


def best_at(checkpoint: Path) -> Best:
    """The lowest validation loss up to a checkpoint, as its files have it."""
    try:
        stored = read_json(checkpoint / "digests" / "metadata", dict)
    except (DataError, OSError):
        stored = {}
    # Of a damaged one nothing is known: whoever restores it says so.
    return Best.from_json(stored["best"] if _is_whole(stored) else {})


def _sealed(facts: Mapping[str, object]) -> dict[str, object]:
    """What `digests` holds, and its own digest."""
    text = json.dumps(facts, sort_keys=True)
    return {**facts, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _is_whole(stored: Mapping[str, object]) -> bool:
    facts = {name: value for name, value in stored.items() if name != "sha256"}
    return _sealed(facts) == stored


def best_in(folder: Path) -> Best:
    """The lowest validation loss of a run, as its last checkpoint has it."""
    return best_at(folder / str(next(iter(steps_in(folder)), "none")))


def step_named(folder: Path, name: str) -> int | None:
    """The step of the checkpoint "best" or of a number; None for "last", which may be any.

    Raises:
      ConfigError: there is no such checkpoint; names those that there are.
    """
    if name == "last":
        return None
    steps, best = steps_in(folder), best_in(folder).step
    step = best if name == "best" else int(name) if name.isascii() and name.isdigit() else None
    if step in steps:
        return step
    found = f"best, which no validation chose in {folder}"
    if name != "best":
        found = repr(name)
    elif best is not None:
        found = f"best, which was step {best} and is not kept; train with config.keep=best"
    there = ", ".join(map(str, sorted(steps))) or "none"
    raise ConfigError(f"--checkpoint: found {found}; expected last, best or one of {there}")


class Checkpoints:
    """The checkpoints of one run. All processes make one, save and restore, at the same steps.

    Args:
      folder: made if need be.
      single_process: to read in this process, whatever the others do; the folder is there, and is
        left as it is.
      keep_best: keep the checkpoint of the lowest validation loss beside the last ones.

    Attributes:
      best: the lowest validation loss; that of a state is restored with it and saved with it.
    """

    def __init__(self, folder: str | Path, single_process: bool = False, keep_best: bool = False):
        self._folder, self._single_process = Path(folder).absolute(), single_process
        self._keep_best, self.best = keep_best, Best()
        self._owns = not single_process and jax.process_index() == 0
        if self._owns:
            self._folder.mkdir(parents=True, exist_ok=True)
            _remove_unfinished(self._folder)  # of a process that was killed
        self._is_flushed = True
        # Folders are made at once: where that fails in the background, Orbax waits for 300 s.
        options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        self._writer = ocp.AsyncCheckpointer(_handler(), async_options=options)
        # Each process reads its own part: none waits within Orbax for one that failed.
        me = jax.process_index()
        single = ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"read-{me}"
        )
        self._reader = ocp.Checkpointer(_handler(single), multiprocessing_options=single)

    def latest(self) -> int | None:
        """The last step that was written to its end, None before the first."""
        return next(iter(steps_in(self._folder)), None)

    def save(self, state: State) -> None:
        """Save in the background; the arrays are copied before this returns.

        Raises:
          FloatingPointError: a parameter or the optimizer's state is not finite.
          OSError: this or the save before it could not be written.
        """
        parts = {"trainable": _named(state.trainable), "optimizer": _named(state.optimizer)}
        digests, wrong = examine(_prefixed(parts))
        step = int(state.step)
        if wrong:
            raise FloatingPointError(
                f"the update of step {step} is not finite: {_some(wrong)}; no checkpoint is made "
                "of it: try a lower optim.learning_rate in another --workdir"
            )
        args = ocp.args.Composite(
            **{name: ocp.args.StandardSave(part) for name, part in parts.items()},
            digests=ocp.args.JsonSave(
                _sealed({"step": step, "arrays": digests, "best": self.best.to_json()})
            ),
        )
        with self._writing():
            self._finish()
            self._writer.save(self._folder / str(step), args=args, force=True)
            self._is_flushed = False

    def check(self) -> None:
        """OSError where a save in the background has failed meanwhile."""
        with self._writing():
            self._writer.check_for_errors()

    def restore(self, like: State) -> State:
        """The last state that can be trusted, placed like `like`; where there is none, `like`.

        What is passed over is named in a warning and moved aside, to `<step>.damaged`; where
        nothing can be trusted all stays where it is.

        Args:
          like: arrays, or shapes that have their shardings.

        Raises:
          DataError: there are checkpoints, and none of them can be trusted.
        """
        parts = {"trainable": like.trainable, "optimizer": like.optimizer}
        if not self._single_process:  # no process looks before the first one has made the folder
            distributed.any_process(False, like)
        found = self._newest(parts)
        if found is None:
            return like
        step, restored, self.best = found
        count = np.asarray(step, like.step.dtype)
        return State(
            jax.make_array_from_callback((), like.step.sharding, lambda _: count),
            restored["trainable"],
            restored["optimizer"],
        )

    def restore_trainable(self, like: PyTree, step: int | None = None) -> tuple[int, PyTree]:
        """The step and the trainable half of the last state that can be trusted, or of a step.

        Raises:
          DataError: there is none, or that step's is damaged.
        """
        if step is not None:
            _hush_abandoned_reads()
            path = self._folder / str(step)
            found, reason = self._read(path, step, {"trainable": like})
            if found is None:
                raise DataError(f"{path}: {reason}; expected a whole checkpoint")
            return step, found[0]["trainable"]
        found = self._newest({"trainable": like})
        if found is None:
            raise DataError(f"{self._folder}: found no checkpoint, expected one")
        return found[0], found[1]["trainable"]

    def close(self) -> None:
        """Wait for what is being written; OSError where that failed."""
        with self._writing():
            self._finish()
            self._writer.close()
            self._reader.close()

    # ---------------------------------------------------------------- writing

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Give an error of tensorstore's its number and our folder; what it left goes."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            if self._owns:
                _remove_unfinished(self._folder)
            number = re.search(r"os_error_code='(\d+)'|OS error (\d+)", str(error))
            code = int(number[1] or number[2]) if number else getattr(error, "errno", None)
            text = os.strerror(code) if code else one_line(error)[:200]
            raise OSError(code or errno.EIO, text, str(self._folder)) from error

    def _finish(self) -> None:
        """Wait for the save before, flush it, and remove those that are not kept."""
        self._writer.wait_until_finished()
        if not self._owns or self._is_flushed:
            return
        self._is_flushed = True
        steps = steps_in(self._folder)
        for step in steps[:1]:
            flush_folder(self._folder / str(step))
        best = {best_at(self._folder / str(step)).step for step in steps[:KEEP]}
        for step in steps[KEEP:]:
            if not (self._keep_best and step in best):
                shutil.rmtree(self._folder / str(step))

    # ---------------------------------------------------------------- reading

    def _newest(self, parts: Mapping[str, PyTree]) -> tuple[int, dict[str, PyTree], Best] | None:
        _hush_abandoned_reads()
        damaged: dict[int, str] = {}
        steps, newest = steps_in(self._folder), None
        for step in steps:
            found, reason = self._read(self._folder / str(step), step, parts)
            if found is not None:
                newest = step, *found
                break
            damaged[step] = reason
        if damaged and newest is None:
            reasons = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
            raise DataError(
                f"{self._folder}: found no checkpoint that can be trusted ({reasons}); "
                "expected one: to start over, use another --workdir"
            )
        for path in sorted(self._folder.iterdir()):
            if path.name.isdigit() and int(path.name) not in steps:
                self._pass_over(path, "it is no checkpoint")
        for step, reason in damaged.items():
            self._pass_over(self._folder / str(step), reason)
        return newest

    def _read(
        self, path: Path, step: int, parts: Mapping[str, PyTree]
    ) -> tuple[tuple[dict[str, PyTree], Best] | None, str]:
        """A checkpoint's parts and the best step up to it, or None and why it cannot be trusted;
        equal in all processes."""
        named = {item: _named(like) for item, like in parts.items()}
        restored, reason, wanted, best = {}, "", {}, Best()
        try:
            items = {item: ocp.args.StandardRestore(part) for item, part in named.items()}
            args = ocp.args.Composite(**items, digests=ocp.args.JsonRestore())
            found = self._reader.restore(path, args=args)
            restored = {item: dict(found[item]) for item in named}
            wanted = dict(found["digests"]["arrays"])
            if not _is_whole(found["digests"]):
                reason = "digests: other values than were saved"
            elif found["digests"]["step"] != step:
                reason = f"it is of step {found['digests']['step']}"
            else:
                best = Best.from_json(found["digests"]["best"])
        except (MemoryError, PermissionError):
            raise
        except Exception as error:  # of tensorstore, JSON, …: whatever damage makes them raise
            if "RESOURCE_EXHAUSTED" in str(error):
                raise
            reason = one_line(error)[:200]
        if not self._single_process and distributed.any_process(bool(reason), restored):
            return None, reason or "another process cannot read it"
        if reason:
            return None, reason
        digests, _ = examine(_prefixed({item: restored[item] for item in named}))
        wrong = [name for name, digest in digests.items() if wanted.get(name) != digest]
        if wrong:  # the digest is of the whole array, so all processes see the same
            return None, f"{_some(wrong)}: other values than were saved"
        return ({item: _filled(like, restored[item]) for item, like in parts.items()}, best), ""

    def _pass_over(self, path: Path, reason: str) -> None:
        logger.warning("%s: passed over, %s", path, reason)
        if self._owns:
            aside = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def _remove_unfinished(folder: Path) -> None:
    for path in folder.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(path, ignore_errors=True)


def _handler(
    options: ocp.options.MultiprocessingOptions | None = None,
) -> ocp.CompositeCheckpointHandler:
    options = options or ocp.options.MultiprocessingOptions()
    return ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=options),
        trainable=ocp.StandardCheckpointHandler(multiprocessing_options=options),
        optimizer=ocp.StandardCheckpointHandler(multiprocessing_options=options),
        digests=ocp.JsonCheckpointHandler(multiprocessing_options=options),
    )


@functools.cache
def _hush_abandoned_reads() -> None:
    """Where one of many reads fails, Orbax abandons the others, and Python would show a page of
    each as it ends. The failure itself is raised."""
    show = sys.unraisablehook

    def hook(found: sys.UnraisableHookArgs) -> None:
        text = str(found.exc_value)
        if "Event loop is closed" not in text and "TensorStore" not in text:
            show(found)

    sys.unraisablehook = hook
    theirs = ("_read_array", "async_deserialize", '" driver: ')  # the last one is TensorStore's

    def is_other(record: logging.LogRecord) -> bool:
        return not any(words in record.getMessage() for words in theirs)

    logging.getLogger("asyncio").addFilter(is_other)
    abandoned = r"coroutine '(_read_array|Store\._get_array_metadatas)' was never"
    warnings.filterwarnings("ignore", abandoned, RuntimeWarning)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
