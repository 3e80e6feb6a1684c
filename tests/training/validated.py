"""What test_validation.py runs in processes of its own: validation on many devices and on one.

    python -m tests.training.validated FOLDER MESH [--coordinator HOST:PORT --processes N
        --process I]

FOLDER/I.json gets the losses on one device and on the mesh.
"""

import argparse
import functools
import json
from pathlib import Path

import numpy as np
import optax

from jax_lora import distributed, sharding
from jax_lora.config import MeshSizes
from jax_lora.data.loader import Batches
from jax_lora.data.prompts import Row
from jax_lora.training import trainable_mask
from jax_lora.training.step import State
from jax_lora.training.validation import ValidationData, validate
from tests.training.many_devices import EVERYTHING, functions_on, variables


def rows(count=21):
    """Rows of prompts and answers of any lengths."""
    rng = np.random.default_rng(4)
    for _ in range(count):
        prompt, answer = rng.integers(2, 8, 2)
        ids = rng.integers(1, 61, prompt + answer).astype(np.int32)
        yield Row(ids, int(prompt), "", False)


def validated(mesh):
    """The validation of `many_devices`' variables: packed rows, a dropout rate, materialized."""
    groups = sharding.row_groups(mesh)
    batches = Batches(
        list(rows()), 16, 0, (10, 20), 40, answer_only=True, pad_id=0, packed=True,
        row_groups=groups,
    )  # fmt: skip
    tree = variables()
    trainable, frozen = trainable_mask.partition(tree, trainable_mask.mask(tree, *EVERYTHING))
    number = np.zeros((), np.int32)
    state = State(*sharding.shard((number, trainable), mesh), optax.EmptyState())
    put = functools.partial(sharding.shard_batch, mesh=mesh)
    functions = functions_on(mesh, "none")
    data = ValidationData(batches, 100)
    return validate(state, sharding.shard(frozen, mesh), data, functions, put)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("mesh")
    parser.add_argument("--coordinator", default="")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--process", type=int, default=0)
    given = parser.parse_args()
    distributed.initialize(given.coordinator, given.processes, given.process)
    mesh = sharding.make_mesh(MeshSizes(*map(int, given.mesh.split(","))))
    found = [validated(None), validated(mesh)]
    (given.folder / f"{given.process}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
