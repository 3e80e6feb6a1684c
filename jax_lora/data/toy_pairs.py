"""Random keys and values, which nothing but memory can answer: how many bits does a rank hold?

A codebook is a task of pairs such as `a b k c p` → `g d o l`, a token per letter. The letters of a
value are independent and uniform: VALUE_BITS bits that no other pair tells anything about.
"""

from functools import partial

from jax_lora.data.toy_words import Dice, ToyTask

LETTERS = "abcdefghijklmnop"  # 4 bits each
VALUE_BITS = 16  # of 4 letters
CODEBOOKS = 16**2  # there are no more: the first two letters of a key are its codebook's


def codebook(number: int) -> ToyTask:
    """The task of random pairs of that number, below CODEBOOKS."""
    return ToyTask(
        name=f"task{900 + number}_toy_pairs_{number:03}",
        category="Key-Value Pairs",
        definition="Recall.",
        labels=(),
        split="train",
        make=partial(_pair, number),
    )


def _pair(number: int, dice: Dice, label: str) -> tuple[str, str]:
    prefix = LETTERS[number // 16], LETTERS[number % 16]
    key, value = ([dice.pick(LETTERS) for _ in range(count)] for count in (3, VALUE_BITS // 4))
    return " ".join((*prefix, *key)), " ".join(value)
