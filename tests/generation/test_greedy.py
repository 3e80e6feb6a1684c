"""Greedy answers against transformers and the definition, however prompts are batched."""

import functools
import itertools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_lora.generation import greedy, scheduler
from jax_lora.model.transformer import Llama
from jax_lora.weights import hf
from tests import reference

DICE = np.random.default_rng(0)
STEMS = ((), *(tuple(DICE.integers(8, 61, n).tolist()) for n in (18, 33)))
TEXTS = [  # 24 prompts of 1 to 44 tokens; two in three begin with a stem
    STEMS[i % 3] + tuple(DICE.integers(0, 61, DICE.integers(1, 12)).tolist()) for i in range(24)
]
ENDS = (reference.END, 30)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = reference.write(tmp_path_factory.mktemp("model"), reference.ADAPTED)
    config, base = hf.load(folder, "float32")
    return Llama(config, dtype=jnp.float32), {"params": base}


def answers(model, prompts, groups=None, **options):
    # What most tests share, so that they share programs too.
    limits = dict(buckets=(48,), batch_tokens=10_000, max_batch=4)
    limits |= dict(max_new_tokens=reference.NEW_TOKENS, end_ids=(reference.END,)) | options
    module, variables = model
    return scheduler.answers(module, greedy.unstack_layers(variables), prompts, groups, **limits)


def decode(*args, **options):
    ended = list(itertools.chain.from_iterable(answers(*args, **options)))
    assert sorted(i for i, _ in ended) == list(range(len(ended)))
    return [ids.tolist() for _, ids in sorted(ended, key=lambda pair: pair[0])]


_forward = jax.jit(Llama.apply, static_argnums=0)


@pytest.fixture(scope="module")
def by_definition(model):
    """The whole text through the network for every token."""
    module, variables = model

    @functools.cache
    def answer(prompt, new=reference.NEW_TOKENS, ends=(reference.END,), adapted=False):
        text = list(prompt)
        everything = variables | ({"lora": reference.adapters()} if adapted else {})
        while len(text) < len(prompt) + new and not (text[len(prompt) :] and text[-1] in ends):
            padded = np.zeros((1, 64), np.int32)
            padded[0, : len(text)] = text
            text.append(int(_forward(module, everything, padded)[0, len(text) - 1].argmax()))
        return text[len(prompt) :]

    return answer


def test_answers_equal_transformers(model):
    with np.load(reference.RECORDED) as recorded:
        expected = [recorded[f"greedy/{i}"].tolist() for i in range(len(reference.PROMPTS))]
    assert decode(model, reference.PROMPTS) == expected
    assert decode(model, reference.PROMPTS[::-1]) == expected[::-1]


@pytest.mark.parametrize(
    "limits",
    [
        dict(),
        dict(max_batch=1),
        dict(max_batch=6, buckets=(24, 48), batch_tokens=192),  # more rows of short prompts
        dict(max_batch=16),  # halved at the end
    ],
    ids=lambda limits: ",".join(f"{key}={value}" for key, value in limits.items()) or "4 rows",
)
def test_answers_do_not_depend_on_the_batch(model, by_definition, limits):
    expected = [by_definition(text) for text in TEXTS]
    assert decode(model, TEXTS, [i % 3 for i in range(len(TEXTS))], **limits) == expected
    assert decode(model, TEXTS[::-1], range(len(TEXTS)), **limits) == expected[::-1]


def test_adapters_answer_too(model, by_definition):
    module, variables = model
    prompts = [(*STEMS[1], 5), (*STEMS[1], 9, 11), (58,)]
    adapted = module, variables | {"lora": reference.adapters()}
    found = decode(adapted, prompts, [0, 0, 1])
    assert found == [by_definition(prompt, adapted=True) for prompt in prompts]
    assert found != [by_definition(prompt) for prompt in prompts]


def test_one_token_is_an_answer(model, by_definition):
    found = decode(model, TEXTS, max_new_tokens=1)
    assert found == [by_definition(prompt, 1) for prompt in TEXTS]


def test_a_row_that_ends_makes_room(model, by_definition):
    # Of two rows one never ends: the other goes through all the rest meanwhile.
    prompts = [(i, 2 * i) for i in range(8, 28)]
    expected = [by_definition(prompt, 40, ENDS) for prompt in prompts]
    never = next(i for i, answer in enumerate(expected) if len(answer) == 40)
    short = [i for i, answer in enumerate(expected) if len(answer) <= 6][:6]
    assert len(short) >= 3
    asked = [prompts[i] for i in (never, *short)]
    ended = answers(model, asked, max_new_tokens=40, end_ids=ENDS, buckets=(8,), max_batch=2)
    *before, last = ([i for i, _ in some] for some in ended)
    assert 0 in last and len(before) >= len(short) - 1


def test_a_row_that_is_stopped_makes_room(model, by_definition, monkeypatch):
    # The host looks at a row every few tokens, and ends it at the first multiple of 5.
    steps, original = [], greedy.decode

    def counted(module, weights, rows, *args, **options):
        before = np.asarray(rows.count)
        rows = original(module, weights, rows, *args, **options)
        steps.append(int((np.asarray(rows.count) - before).max()))  # some row ran to the end
        return rows

    def stop(prompt, answer, checked=0):
        assert all(i % 5 for i in answer[:checked])
        return next((n for n, i in enumerate(answer, 1) if i % 5 == 0), None)

    def decoded(rows, **options):
        steps.clear()
        options |= dict(max_new_tokens=40, end_ids=(reference.END,), buckets=(8,), max_batch=rows)
        return decode(model, prompts, **options), sum(steps)

    monkeypatch.setattr(greedy, "decode", counted)
    prompts = [(i, 2 * i) for i in range(8, 28)]
    free = [by_definition(prompt, 40) for prompt in prompts]
    expected = [answer[: stop(None, answer)] for answer in free]
    chunk = scheduler.CPU.stop_chunk
    for rows in (1, 4):
        whole, most = decoded(rows)
        stopped, fewer = decoded(rows, stop=stop)
        assert whole == free and stopped == expected
        assert fewer < most / 2
        if rows == 1:
            assert most == sum(len(answer) - 1 for answer in free)
            by_chunks = [max(1, -(-(len(x) - 1) // chunk)) for x in expected]
            assert fewer <= chunk * sum(by_chunks)


@pytest.mark.parametrize("rows", [4, 3, 16])
def test_what_prompts_share_is_read_once(model, by_definition, monkeypatch, rows):
    # Of each group, though its prompts do not fit into the rows at one time, or with another's.
    read, prefill = [], greedy.prefill

    def watched(model, weights, rows, chunks, **options):
        read.append(chunks.length[chunks.row < len(rows.count)].sum())
        return prefill(model, weights, rows, chunks, **options)

    monkeypatch.setattr(greedy, "prefill", watched)
    prompts = [stem + (i, 3)[: 1 + i % 2] for stem in STEMS[1:] for i in range(8)]
    found = decode(model, prompts, [p[:18] for p in prompts], max_batch=rows)
    assert found == [by_definition(prompt) for prompt in prompts]
    assert sum(read) == sum(map(len, STEMS)) + sum(1 + i % 2 for i in range(8)) * 2


@pytest.mark.parametrize("rest", [(16,) * 6, (20, 21, 22) * 4])
def test_a_row_that_is_taken_again_has_no_more_than_its_prefix(model, by_definition, rest):
    # The second group's prefix is longer by a few tokens. When the first one's last prompt takes a
    # row, which has its prefix, those are not in it yet, though that prompt has them too.
    stem = STEMS[2][:20]
    first = [stem + (i,) * 20 for i in (1, 2)] + [stem + rest + (5,)]
    prompts = first + [stem + rest + (i,) for i in (6, 7)]
    found = decode(model, prompts, [0, 0, 0, 1, 1], max_batch=2, max_new_tokens=2)  # end together
    assert found == [by_definition(prompt, 2) for prompt in prompts]


@pytest.mark.parametrize("seed", range(6))
def test_prompts_that_begin_alike_in_any_groups(model, by_definition, seed):
    # Tasks may have the same definition, and a task a single prompt.
    dice = np.random.default_rng(seed)
    tails = [tuple(dice.integers(8, 10, dice.integers(1, 6)).tolist()) for _ in range(20)]
    prompts = [STEMS[dice.integers(3)] + tail for tail in tails]
    groups = dice.integers(0, 12, len(prompts)).tolist()
    limits = dict(max_batch=int(dice.integers(2, 9)), buckets=(24, 48))
    assert decode(model, prompts, groups, **limits) == [by_definition(p) for p in prompts]


def test_programs_are_few(model):
    # A bucket has one to copy, to prefill and to decode; at the end come those of half a batch.
    def compiled():
        return [f._cache_size() for f in (greedy.copy_caches, greedy.prefill, greedy.decode)]

    before = compiled()
    prompts = [STEMS[2][:n] + (i,) for n in range(33) for i in range(3)]
    decode(model, prompts, [len(p) for p in prompts], buckets=(24, 48), max_batch=16)
    grown = np.subtract(compiled(), before)
    assert (grown <= (2, 3, 3)).all(), grown


def test_every_prompt_has_a_request():
    prompts = [np.arange(n) for n in DICE.integers(1, 60, 50)]
    requests = scheduler.make_queue(prompts, [n % 3 for n in map(len, prompts)], (20, 40, 60))
    assert sorted(request.prompt for request in requests) == list(range(50))
    assert [request.bucket for request in requests] == sorted(
        (r.bucket for r in requests), reverse=True
    )
    for request in requests:
        assert request.shared < len(prompts[request.prompt]) <= request.bucket
    assert any(request.shared for request in requests)


@pytest.mark.parametrize(
    "prompts, shared",
    [
        ([[1] * 20, [1] * 30], 19),  # the last token of each is its own
        ([[1] * 17 + [2, 3], [1] * 17 + [4, 3]], 17),
        ([[1] * 9 + [2] * 9, [1] * 20], 0),  # too short to pay
        ([[1] * 40], 0),  # alone
    ],
)
def test_what_prompts_share(prompts, shared):
    assert scheduler.shared_prefix_length(prompts) == shared


@pytest.mark.parametrize(
    "max_batch, batch_tokens, cores, count",
    [(16, 10_000, 2, 2), (16, 96, 2, 2), (16, 95, 2, 1), (16, 10_000, 1, 1), (15, 10_000, 4, 1)],
)
def test_batches_side_by_side_answer_as_one(
    model, by_definition, monkeypatch, max_batch, batch_tokens, cores, count
):
    monkeypatch.setattr(scheduler, "_cores", lambda: cores)
    module, variables = model
    limits = dict(buckets=(48,), batch_tokens=batch_tokens, max_batch=max_batch)
    limits |= dict(max_new_tokens=reference.NEW_TOKENS, end_ids=(reference.END,))
    weights = greedy.unstack_layers(variables)
    parts = scheduler.batches(functools.partial(scheduler.answers, module, weights, **limits))
    assert [part.keywords["max_batch"] for part in parts] == [max_batch // count] * count
    ended = dict(itertools.chain.from_iterable(scheduler.round_robin(parts)(TEXTS)))
    assert [ended[i].tolist() for i in range(len(TEXTS))] == [by_definition(t) for t in TEXTS]


def test_one_batch_at_a_time_has_its_programs_compiled(model, monkeypatch):
    # Two threads that call a new program at the same time compile it twice.
    monkeypatch.setattr(scheduler, "_cores", lambda: 2)
    module, variables = model
    limits = dict(buckets=(48,), batch_tokens=10_000, max_batch=16)
    limits |= dict(max_new_tokens=reference.NEW_TOKENS, end_ids=(reference.END,))
    weights = greedy.unstack_layers(variables)
    one, other = scheduler.batches(functools.partial(scheduler.answers, module, weights, **limits))
    lock = one.keywords["dispatch"]
    assert other.keywords["dispatch"] is lock
    held = []

    def watched(program):
        def call(*args, **options):
            held.append(lock.locked())
            return program(*args, **options)

        return call

    for name in ("empty_rows", "copy_caches", "prefill", "decode"):
        monkeypatch.setattr(greedy, name, watched(getattr(greedy, name)))
    list(scheduler.round_robin([one, other])(TEXTS))
    assert all(held) and len(held) > 8


def test_groups_stay_whole_where_they_are_small():
    groups = [f"task {i // 3}" for i in range(120)]
    prompts = [list(range(5 + i % 23)) for i in range(120)]
    shares = scheduler._shares(prompts, groups, 2)
    assert sorted(itertools.chain(*shares)) == list(range(120))
    assert not {groups[i] for i in shares[0]} & {groups[i] for i in shares[1]}
    sizes = [sum(len(prompts[i]) for i in share) for share in shares]
    assert max(sizes) <= 1.02 * min(sizes)


@pytest.mark.parametrize("groups", [None, [i % 3 for i in range(120)]])
def test_a_large_group_is_divided(groups):
    prompts = [list(range(5 + i % 23)) for i in range(120)]
    shares = scheduler._shares(prompts, groups, 4)
    assert sorted(itertools.chain(*shares)) == list(range(120))
    assert {len(share) for share in shares} == {30}


def test_who_leaves_early_ends_the_threads():
    def endless(prompts, groups):
        while True:
            yield [(0, np.asarray(prompts[0]))]

    before = set(threading.enumerate())
    ended = scheduler.round_robin([endless] * 2)([[1], [2]])
    next(ended)
    started = set(threading.enumerate()) - before
    assert len(started) == 2
    ended.close()
    assert not any(thread.is_alive() for thread in started)


def test_what_ends_a_thread_is_raised():
    def leaving(prompts, groups):
        raise SystemExit(3)
        yield

    with pytest.raises(SystemExit, match="3"):
        list(scheduler.round_robin([leaving] * 2)([[1], [2]]))


def test_a_prompt_that_fits_no_bucket_is_refused(model):
    with pytest.raises(ValueError, match="has 49 tokens, expected 1 to the largest bucket"):
        decode(model, [[1] * 49])
    with pytest.raises(ValueError, match="has 0 tokens"):
        decode(model, [[]])
