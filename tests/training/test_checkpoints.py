"""Saving and resuming: bit for bit, from whole and finite checkpoints alone."""

import json
import logging
import math
import os
import random
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_lora.errors import DataError
from jax_lora.training import checkpoints as checkpoints_module
from jax_lora.training import loop, trainable_mask
from jax_lora.training.checkpoints import ITEMS, Checkpoints, best_at, best_in, steps_in
from jax_lora.training.digests import examine
from jax_lora.training.step import State
from tests.training.test_step import adamw, compiled_step, global_batch, variables


def begin():
    everything = variables()
    trainable, frozen = trainable_mask.partition(
        everything, trainable_mask.mask(everything, *trainable_mask.LORA)
    )
    optimizer = adamw(1e-2)
    functions = compiled_step(optimizer, dropout_rate=0.1)
    return State(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable)), frozen, functions


def steps(count, state, frozen, functions):
    *_, (last, _) = loop.train(state, frozen, [global_batch(4)] * count, functions)
    return last


def equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the checkpoints of steps 2 and 4, and those states."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    made = {}
    checkpoints = Checkpoints(folder)
    for step in (2, 4):
        state = steps(step, *begin())
        made[step] = jax.device_get(state)
        checkpoints.save(state)
    checkpoints.close()
    return folder, made


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of that folder, to be damaged."""
    return Path(shutil.copytree(saved[0], tmp_path / "checkpoints"))


def restored(folder):
    checkpoints = Checkpoints(folder)
    state = checkpoints.restore(begin()[0])
    checkpoints.close()
    return state


def test_resuming_equals_not_stopping(saved):
    folder, made = saved
    checkpoints = Checkpoints(folder, single_process=True)
    assert checkpoints.latest() == 4
    state = checkpoints.restore(begin()[0])
    equal(state, made[4])
    shorter = folder.parent / "shorter"
    shutil.copytree(folder / "2", shorter / "2")
    _, frozen, functions = begin()
    equal(steps(2, restored(shorter), frozen, functions), made[4])


def test_the_trainable_half_can_be_restored_alone(saved):
    folder, made = saved
    step, trainable = Checkpoints(folder, single_process=True).restore_trainable(
        begin()[0].trainable
    )
    assert step == 4
    equal(trainable, made[4].trainable)
    assert {path.name for path in (folder / "4").iterdir()} >= {*ITEMS}


def test_without_a_checkpoint_a_run_starts_over(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    fresh = begin()[0]
    assert checkpoints.latest() is None and checkpoints.restore(fresh) is fresh
    with pytest.raises(DataError, match="found no checkpoint"):
        checkpoints.restore_trainable(fresh.trainable)


# ---------------------------------------------------------------- damage


def flip(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut(path, rng):
    os.truncate(path, rng.randrange(path.stat().st_size))


@pytest.mark.parametrize("damage", [flip, cut])
@pytest.mark.filterwarnings("ignore")  # of Orbax, about what it is made to read
def test_a_damaged_checkpoint_is_never_loaded(saved, tmp_path, damage):
    """tests/reliability.py does the same with a hundred flips and cuts of a run's checkpoint."""
    source, made = saved
    like, rng, outcomes = begin()[0], random.Random(0), []
    for number in range(12):
        folder = Path(shutil.copytree(source, tmp_path / str(number)))
        files = sorted(p for p in (folder / "4").rglob("*") if p.is_file() and p.stat().st_size)
        damage(rng.choices(files, [p.stat().st_size for p in files])[0], rng)
        state = Checkpoints(folder).restore(like)
        outcomes.append(int(state.step))
        equal(state, made[outcomes[-1]])
    assert 2 in outcomes, outcomes  # of so small a state most bytes are Orbax's notes


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_checkpoint_is_named_and_moved_and_its_step_is_saved_again(saved, folder, caplog):
    made = saved[1]
    path = folder / "4" / "digests" / "metadata"
    said = json.loads(path.read_text())
    name = next(iter(said["arrays"]))
    said["arrays"][name] = "0" * 16
    del said["sha256"]
    path.write_text(json.dumps(checkpoints_module._sealed(said)))
    with caplog.at_level(logging.WARNING, "jax_lora"):
        state = restored(folder)
    assert caplog.messages == [f"{folder / '4'}: passed over, {name}: other values than were saved"]
    equal(state, made[2])
    assert sorted(os.listdir(folder)) == ["2", "4.damaged"]
    _, frozen, functions = begin()
    checkpoints = Checkpoints(folder)
    checkpoints.save(steps(2, state, frozen, functions))
    checkpoints.close()
    equal(restored(folder), made[4])


@pytest.mark.parametrize(
    "said, is_shown",
    [  # by Orbax's versions of Python 3.11 and 3.12
        ("Task exception was never retrieved\nfuture: <Task coro=<_read_array() done>>", False),
        ("Task exception was never retrieved\nfuture: <Task coro=<async_deserialize()>>", False),
        ('Future exception was never retrieved: Error opening "zarr" driver: Error', False),
        ("Task exception was never retrieved\nfuture: <Task coro=<somebody_elses()>>", True),
    ],
)
def test_pages_of_reads_that_were_abandoned_are_not_shown(said, is_shown, caplog):
    checkpoints_module._hush_abandoned_reads()
    logging.getLogger("asyncio").error(said)
    assert (said in caplog.messages) == is_shown


def remove(folder):
    shutil.rmtree(folder / "4" / "optimizer")


def renumber(folder):
    (folder / "4").rename(folder / "7")


def empty(folder):
    shutil.rmtree(folder / "4")
    (folder / "99").mkdir()


def foreign(folder):
    shutil.rmtree(folder / "4")
    (folder / "99").mkdir()
    (folder / "99" / "notes.txt").write_text("not a checkpoint")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spoil", [remove, renumber, empty, foreign])
def test_what_is_no_checkpoint_is_passed_over(saved, folder, spoil, caplog):
    spoil(folder)
    with caplog.at_level(logging.WARNING, "jax_lora"):
        equal(restored(folder), saved[1][2])
    (message,) = caplog.messages
    assert "passed over" in message and str(folder) in message and "\n" not in message


@pytest.mark.filterwarnings("ignore")
def test_nothing_to_trust_is_refused_again_and_again_and_nothing_is_moved(folder):
    # Who trains and who only reads: a rerun of the same command must not start over.
    for step in (2, 4):
        shutil.rmtree(folder / str(step) / "digests")
    before = sorted(folder.rglob("*"))
    for options in ({"single_process": True}, {}, {}):
        with pytest.raises(DataError, match=r"no checkpoint that can be trusted \(4: .*; 2: "):
            Checkpoints(folder, **options).restore(begin()[0])
        assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.bool_, jnp.int8])
def test_every_bit_and_place_of_an_array_is_in_its_digest(dtype):
    rng = np.random.default_rng(0)
    values = [1, 1, 0, 1, 0, 0, 1, 0, 0, 0, 0, 1] if dtype == jnp.bool_ else rng.permutation(12)
    array = np.asarray(np.reshape(values, (3, 4)), dtype)
    content = array.tobytes()
    seen = {examine({"x": jnp.asarray(array)})[0]["x"]}
    bits = [bit for bit in range(8 * len(content)) if dtype != jnp.bool_ or bit % 8 == 0]
    for bit in bits:
        other = bytearray(content)
        other[bit // 8] ^= 1 << bit % 8
        changed = np.frombuffer(bytes(other), array.dtype).reshape(array.shape)
        seen.add(examine({"x": jnp.asarray(changed)})[0]["x"])
    for moved in (array[::-1], array[:, ::-1], array.reshape(4, 3), array.T):
        seen.add(examine({"x": jnp.asarray(np.ascontiguousarray(moved))})[0]["x"])
    assert len(seen) == 1 + len(bits) + 4


# ---------------------------------------------------------------- what is written and kept


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_state_that_is_not_finite_is_not_saved(saved, folder, value):
    state = steps(1, *begin())
    leaf = state.trainable["lora"]["layers"]["mlp"]["down_proj"]["a"]
    state.trainable["lora"]["layers"]["mlp"]["down_proj"]["a"] = leaf.at[0, 1, 2].set(value)
    checkpoints = Checkpoints(folder)
    with pytest.raises(FloatingPointError, match="update of step 1 .*down_proj.a; no checkpoint"):
        checkpoints.save(state)
    checkpoints.close()
    equal(restored(folder), saved[1][4])


def saved_with(folder, losses, keep_best=True):
    """The steps 1, 2, … with their validation losses."""
    checkpoints = Checkpoints(folder, keep_best=keep_best)
    state = begin()[0]
    for step, loss in enumerate(losses, 1):
        checkpoints.best = checkpoints.best.after(step, loss)
        checkpoints.save(state._replace(step=jnp.asarray(step, jnp.int32)))
    checkpoints.close()
    return folder


@pytest.mark.parametrize(
    ("losses", "kept"),
    [
        ([3.0, 1.0, 2.0, 2.0, 2.0, 2.0], [6, 5, 2]),
        ([6.0, 5.0, 4.0, 3.0, 2.0, 1.0], [6, 5]),
        ([2.0, 3.0, 3.0, 3.0, 3.0, 1.0], [6, 5, 1]),  # 5, should 6 be damaged, has 1 as its best
    ],
)
def test_the_last_two_and_the_best_of_each_are_kept(tmp_path, losses, kept):
    folder = saved_with(tmp_path / "best", losses)
    assert steps_in(folder) == kept
    assert best_in(folder) == (losses.index(min(losses)) + 1, min(losses), best_in(folder).since)
    assert steps_in(saved_with(tmp_path / "last", losses, keep_best=False)) == [6, 5]


@pytest.mark.filterwarnings("ignore")
def test_what_was_best_is_restored_with_its_state(tmp_path, caplog):
    folder = saved_with(tmp_path / "checkpoints", [2.0, 3.0, 3.0, 1.0])
    for loss, best in ((1.0, (4, 1.0, 0)), (None, (1, 2.0, 2))):
        if loss is None:
            shutil.rmtree(folder / "4" / "optimizer")
        checkpoints = Checkpoints(folder)
        checkpoints.restore(begin()[0])
        checkpoints.close()
        assert checkpoints.best == best
    assert best[0] in steps_in(folder)


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"best": 3}', b'{"best": {"step": "x"}}'])
def test_a_checkpoint_that_says_nothing_of_validation_has_no_best(folder, damage):
    (folder / "4" / "digests" / "metadata").write_bytes(damage)
    assert best_at(folder / "4") == best_at(folder / "none") == (None, math.inf, 0)


@pytest.mark.parametrize("change", [{"step": 1}, {"loss": 0.5}, {"since": 9}, {"step": None}])
def test_another_best_than_was_saved_is_noticed(tmp_path, change, caplog):
    """What the best step was decides which checkpoints are kept and when a run ends."""
    folder = saved_with(tmp_path / "checkpoints", [2.0, 1.0, 3.0])
    path = folder / "3" / "digests" / "metadata"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | {"best": stored["best"] | change}))
    assert best_at(folder / "3").step is None
    checkpoints = Checkpoints(folder)
    assert int(checkpoints.restore(begin()[0]).step) == 2 and checkpoints.best == (2, 1.0, 0)
    checkpoints.close()
    assert "digests: other values than were saved" in caplog.text


def test_a_checkpoint_of_a_step_can_be_restored_alone(saved):
    folder, made = saved
    step, trainable = Checkpoints(folder, single_process=True).restore_trainable(
        begin()[0].trainable, 2
    )
    assert step == 2
    equal(trainable, made[2].trainable)


def test_a_killed_save_leaves_nothing(folder):
    (folder / "6.orbax-checkpoint-tmp" / "trainable").mkdir(parents=True)
    checkpoints = Checkpoints(folder)
    assert sorted(os.listdir(folder)) == ["2", "4"] and checkpoints.latest() == 4


@pytest.mark.filterwarnings("ignore")
def test_a_save_that_fails_ends_at_once_and_names_the_folder(folder):
    checkpoints = Checkpoints(folder)
    state = begin()[0]
    shutil.rmtree(folder)
    folder.write_text("a lost disk")
    with pytest.raises(NotADirectoryError) as caught:
        checkpoints.save(state._replace(step=jnp.asarray(6, jnp.int32)))
        checkpoints.close()
    assert caught.value.filename == str(folder)


def test_a_full_disk_is_named_and_leaves_nothing_unfinished(folder, monkeypatch):
    checkpoints = Checkpoints(folder)

    def full(*_, **__):
        (folder / "6.orbax-checkpoint-tmp").mkdir()
        raise ValueError(
            'RESOURCE_EXHAUSTED: Error writing "x": Failed to write 196733 bytes to file 9: No '
            "space left on device [os_error_code='28']\nand more"
        )

    monkeypatch.setattr(checkpoints._writer, "save", full)
    with pytest.raises(OSError) as caught:
        checkpoints.save(begin()[0]._replace(step=jnp.asarray(6, jnp.int32)))
    expected = f"[Errno 28] No space left on device: {str(folder)!r}"
    assert str(caught.value) == expected and sorted(os.listdir(folder)) == ["2", "4"]


def test_a_checkpoint_is_flushed_once_it_has_its_name(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(checkpoints_module, "flush_folder", flushed.append)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (1, 2):
        checkpoints.save(begin()[0]._replace(step=jnp.asarray(step, jnp.int32)))
    checkpoints.close()
    assert flushed == [tmp_path / "checkpoints" / str(step) for step in (1, 2)]
