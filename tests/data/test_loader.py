"""Batches: every row once per epoch, few shapes, an order that is a function of (seed, step)."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_lora.data.loader import Batches, bucket_for
from jax_lora.data.prompts import Row


def rows(lengths, prompt=2):
    return [Row(np.full(n, i + 1, np.int32), prompt, "", False) for i, n in enumerate(lengths)]


def batches(lengths, **options):
    settings = dict(
        batch_size=4, seed=0, buckets=(8, 16), micro_tokens=32, answer_only=True, pad_id=0
    )
    return Batches(rows(lengths), **(settings | options))


@given(
    st.lists(st.integers(3, 16), min_size=1, max_size=30),
    st.integers(1, 9),
    st.integers(1, 64),
    st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_an_epoch_holds_every_row_once(lengths, size, micro_tokens, answer_only):
    made = batches(lengths, batch_size=size, micro_tokens=micro_tokens, answer_only=answer_only)
    seen = []
    for step in range(made.steps_per_epoch):
        positions = []
        for batch in made.at(step):
            assert batch.tokens.shape == (
                made.rows_of(batch.tokens.shape[1]),
                batch.tokens.shape[1],
            )
            assert batch.tokens.shape[1] in (8, 16)
            for r, example in enumerate(batch.segment_ids):
                row, n = batch.tokens[r], int((example >= 0).sum())
                assert (row[:n] == row[0]).all() and (row[n:] == 0).all()
                weights = np.zeros(len(row), np.float32)
                weights[2 if answer_only else 1 : n] = n > 0
                np.testing.assert_array_equal(batch.loss_weights[r], weights)
                if n:
                    seen.append(int(row[0]) - 1)
                    assert (example[:n] == example[0]).all()
                    positions.append(int(example[0]))
                    assert n == lengths[row[0] - 1]
        assert sorted(positions) == list(range(len(positions)))
    assert sorted(seen) == list(range(len(lengths)))


@given(st.integers(1, 40), st.integers(1, 200), st.sampled_from([1, 2, 3, 8]))
@settings(deadline=None, max_examples=60)
def test_every_device_has_as_many_rows(size, micro_tokens, parts):
    dealt = batches([5] * 40, batch_size=size, micro_tokens=micro_tokens, row_groups=parts)
    alone = batches([5] * 40, batch_size=-(-size // parts), micro_tokens=micro_tokens)
    assert dealt.rows_of(8) == parts * alone.rows_of(8)
    assert sum(int((batch.segment_ids[:, 0] >= 0).sum()) for batch in dealt.at(0)) == size


def test_the_order_is_a_function_of_seed_and_step():
    lengths = list(range(3, 16)) * 3
    one, same, other = (batches(lengths, seed=seed) for seed in (1, 1, 2))
    late = one.indices(17)
    one.indices(3)
    np.testing.assert_array_equal(late, same.indices(17))
    assert (late != other.indices(17)).any()
    epochs = [np.concatenate([one.indices(e * 10 + s) for s in range(10)]) for e in (0, 1)]
    assert (epochs[0] != epochs[1]).any()


def test_streaming_equals_asking():
    made = batches(list(range(3, 16)))
    for step, batch in enumerate(made.stream(2, 9), start=2):
        for ours, theirs in zip(batch, made.at(step), strict=True):
            np.testing.assert_array_equal(ours.tokens, theirs.tokens)


def test_the_next_batch_is_made_while_a_step_runs():
    made = {step: threading.Event() for step in range(4)}

    class Watched(Batches):
        def at(self, step):
            found = super().at(step)
            made[step].set()
            return found

    watched = Watched(**vars(batches([5] * 16)))
    for step, _ in enumerate(watched.stream(0, 4)):
        # Nobody asks for a batch now: this is where a step runs.
        assert made[step].is_set() and (step == 3 or made[step + 1].wait(timeout=60))
        assert not any(made[later].is_set() for later in range(step + 2, 4))


def test_rows_share_micro_batches_with_their_like():
    # Sorted from the longest down: two long rows fill one micro-batch, four short ones another.
    made = batches([16, 5, 16, 6, 7, 8], batch_size=6)
    assert [b.tokens.shape for b in made.at(0)] == [(2, 16), (4, 8)]
    assert sum((b.segment_ids < 0).sum() for b in made.at(0)) == 64 - 58


@given(st.lists(st.integers(3, 16), min_size=1, max_size=30), st.booleans())
@settings(deadline=None, max_examples=60)
def test_packed_rows_hold_whole_examples(lengths, answer_only):
    options = dict(batch_size=len(lengths), answer_only=answer_only)
    (made, plain) = (batches(lengths, packed=packed, **options) for packed in (True, False))

    def found(made):
        # place → the tokens and the loss weights of that example
        out = {}
        for batch in made.at(0):
            for place in set(batch.segment_ids[batch.segment_ids >= 0]):
                at = batch.segment_ids == place
                (row,) = set(np.nonzero(at)[0])
                assert (np.diff(np.nonzero(at[row])[0]) == 1).all()  # in one piece
                out[int(place)] = (batch.tokens[at].tolist(), batch.loss_weights[at].tolist())
        return out

    assert found(made) == found(plain)
    *full, last = [b.tokens.shape for b in made.at(0)]
    size = made.rows_of(16)
    assert set(full) <= {(size, 16)} and last in ((size, 16), (size, 8))


def test_what_packing_leaves_over_takes_a_shorter_row():
    # A row of 12 and 4; what is left, 5 and 3, is a row of 8, and 5 and 4 is not.
    made = dict(batch_size=4, packed=True, micro_tokens=16)
    assert [b.tokens.shape for b in batches([5, 12, 4, 3], **made).at(0)] == [(1, 16), (1, 8)]
    assert [b.tokens.shape for b in batches([5, 12, 4, 4], **made).at(0)] == [(1, 16), (1, 16)]
    # Two rows of 16 hold 9, 7 and 8, so do not two of 8; 8, 7 and 1 are two rows of 8.
    made = dict(batch_size=3, packed=True, micro_tokens=32, row_groups=2)
    assert [b.tokens.shape for b in batches([9, 7, 8], **made).at(0)] == [(2, 16)]
    assert [b.tokens.shape for b in batches([8, 7, 1], **made).at(0)] == [(2, 8)]


@pytest.mark.parametrize("packed", [False, True])
def test_every_example_may_weigh_the_same(packed):
    made = batches([5, 16, 9, 3], packed=packed, by_example=True)
    weights = np.zeros(4)
    for batch in made.at(0):
        real = batch.segment_ids >= 0
        np.add.at(weights, batch.segment_ids[real], batch.loss_weights[real])
        assert (batch.loss_weights[~real] == 0).all()
    np.testing.assert_allclose(weights, 1, rtol=1e-6)


def test_packing_leaves_little_padding():
    lengths = np.random.default_rng(0).integers(3, 30, 128).tolist()
    made = batches(lengths, batch_size=128, packed=True, buckets=(64,)).at(0)
    padding = sum(int((b.segment_ids < 0).sum()) for b in made)
    assert padding < 0.05 * sum(b.tokens.size for b in made)


@pytest.mark.parametrize("parts", [1, 2])
def test_packed_rows_are_as_few_as_they_need_be(parts):
    # 64 examples would be 51 rows of a micro-batch; packed, they are about a third of that.
    lengths = np.random.default_rng(0).integers(20, 380, 640).tolist()
    made = batches(
        lengths, batch_size=64, packed=True, buckets=(640,), micro_tokens=32768, row_groups=parts
    )
    steps = [made.at(step) for step in range(30)]
    assert {b.tokens.shape for step in steps for b in step} == {(made.rows_of(640), 640)}
    first = [batch for (batch,) in steps[:10]]  # of the first epoch: a micro-batch a step
    filled = max(int((b.segment_ids >= 0).any(1).sum()) for b in first)
    assert made.rows_of(640) % parts == 0 and 0 <= made.rows_of(640) - filled < parts
    few = batches(lengths, batch_size=64, packed=True, buckets=(640,), micro_tokens=7 * 640).at(0)
    assert all(len(b.tokens) <= 7 for b in few)


def test_what_fits_nowhere_is_refused():
    with pytest.raises(ValueError, match="a row has 17 tokens, expected at most .*8, 16"):
        batches([17])
    with pytest.raises(ValueError, match="training rows: found none"):
        batches([])
    with pytest.raises(ValueError, match="found 0 and 32"):
        batches([4], batch_size=0)
    assert bucket_for(8, (16, 8)) == 8


@pytest.mark.parametrize("packed", [False, True])
def test_an_epoch_is_shuffled_once(monkeypatch, packed):
    """However many steps it has: of a million rows that takes longer than a step."""
    shuffled, make = [], np.random.default_rng

    def counted(seed):
        shuffled.append(seed)
        return make(seed)

    monkeypatch.setattr(np.random, "default_rng", counted)
    made = batches([5] * 300, batch_size=2, seed=12345, packed=packed)
    for step in range(3 * made.steps_per_epoch):
        made.at(step)
    assert len(shuffled) <= 4
