"""The mask, the partition and the table, drawn as trees."""

import jax
import optax
import pytest

from jax_lora.training import trainable_mask

TREE = {
    "lora": {"layers": {"q_proj": {"a": 1, "b": 2, "scale": 3}}},
    "params": {"norm": {"scale": 4}, "lm_head": {"kernel": 5}},
}
GAP = optax.MaskedNode()


def test_lora_trains_a_and_b():
    assert trainable_mask.mask(TREE, *trainable_mask.LORA) == {
        "lora": {"layers": {"q_proj": {"a": True, "b": True, "scale": False}}},
        "params": {"norm": {"scale": False}, "lm_head": {"kernel": False}},
    }


def test_anything_between_is_one_more_expression():
    trainable, frozen = trainable_mask.LORA
    assert trainable_mask.mask(TREE, (*trainable, r"params/norm/.*"), frozen)["params"] == {
        "norm": {"scale": True},
        "lm_head": {"kernel": False},
    }


def test_partition_and_combine():
    trains = trainable_mask.mask(TREE, *trainable_mask.LORA)
    trainable, frozen = trainable_mask.partition(TREE, trains)
    assert trainable == {
        "lora": {"layers": {"q_proj": {"a": 1, "b": 2, "scale": GAP}}},
        "params": {"norm": {"scale": GAP}, "lm_head": {"kernel": GAP}},
    }
    assert frozen == {
        "lora": {"layers": {"q_proj": {"a": GAP, "b": GAP, "scale": 3}}},
        "params": {"norm": {"scale": 4}, "lm_head": {"kernel": 5}},
    }
    assert trainable_mask.combine(trainable, frozen) == TREE
    assert jax.tree.leaves(trainable) == [1, 2]


@pytest.mark.parametrize(
    ("trainable", "frozen", "message"),
    [
        ((r"lora/.*/[ab]",), (r"params/.*",), "no regular expression covers the leaf lora/.*scale"),
        ((r"lora/.*/[ab]", r"lora/.*/m"), (r".*",), r"expression 'lora/\.\*/m' decides no leaf"),
        ((), (r".*",), "nothing trains"),
        ((r"lora/.*",), (r".*",), "scale is α/r, which is data"),
        ((r"norm",), (r".*",), "'norm' decides no leaf"),  # a rule is a whole name
    ],
)
def test_rules_that_miss_are_refused(trainable, frozen, message):
    with pytest.raises(ValueError, match=message):
        trainable_mask.mask(TREE, trainable, frozen)
