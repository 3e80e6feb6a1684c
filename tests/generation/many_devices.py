"""What test_many_devices.py runs in a process with 4 devices: answers of a model that 2 or 4 of
them share, beside those of one.

    python -m tests.generation.many_devices

prints JSON: for each number of devices the answers, and of every device the bytes that it holds of
the weights and, after each stretch of decoding, of a layer's cache; `stopped` are the answers that
the host stops behind three tokens, `new_programs` how many were compiled for them; `planned` is
what the table of `jax_lora.sharding` gives a device of the weights; `communication` is of the loop
that decodes.
"""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np

from jax_lora import sharding
from jax_lora.config import MeshSizes
from jax_lora.generation import greedy, scheduler
from jax_lora.model.transformer import Llama
from tests.training.many_devices import CONFIG, communication, variables

SHARED = list(range(1, 21))  # what half of the prompts begin with
LIMITS = dict(max_new_tokens=6, end_ids=(7,), buckets=(32,), batch_tokens=128, max_batch=4)


def prompts():
    rng = np.random.default_rng(0)
    rests = [rng.integers(0, CONFIG.vocab_size, n).tolist() for n in (1, 5, 9, 12, 3, 30, 17)]
    return [SHARED + rest if i < 4 else rest for i, rest in enumerate(rests)]


def held(tree, device):
    """Bytes of the arrays' parts on a device."""
    shards = (s for x in jax.tree.leaves(tree) for s in x.addressable_shards)
    return sum(s.data.nbytes for s in shards if s.device == device)


def answered(count):
    mesh = sharding.make_mesh(MeshSizes(tensor=count), jax.devices()[:count])
    model = Llama(CONFIG, dtype=jnp.float32, shard_activation=sharding.Activations(mesh))
    weights = greedy.unstack_layers(variables(), mesh)
    rows = greedy.empty_rows(model, 4, 38, 6)
    program = greedy.decode.lower(model, weights, rows, 0, end_ids=(7,)).compile()
    caches, decode = [], greedy.decode

    def watched(*args, **options):
        rows = decode(*args, **options)
        caches.append([held(rows.caches[0], device) for device in jax.devices()])
        return rows

    greedy.decode = watched
    groups = [len(prompt) > len(SHARED) for prompt in prompts()]
    ended = scheduler.answers(model, weights, prompts(), groups, **LIMITS)
    answers = dict(itertools.chain.from_iterable(ended))
    greedy.decode = decode
    programs, stop = (
        decode._cache_size(),
        lambda prompt, answer, checked: 3 if len(answer) > 2 else None,
    )
    ended = scheduler.answers(model, weights, prompts(), groups, **LIMITS, stop=stop)
    stopped = dict(itertools.chain.from_iterable(ended))
    return {
        "answers": [answers[i].tolist() for i in range(len(answers))],
        "stopped": [stopped[i].tolist() for i in range(len(answers))],
        "new_programs": decode._cache_size() - programs,
        "weights": [held(weights, device) for device in jax.devices()],
        "planned": sharding.local_bytes(variables(), mesh),
        "caches": caches,
        "communication": communication(program),
    }


if __name__ == "__main__":
    print(json.dumps({count: answered(count) for count in (1, 2, 4)}))
