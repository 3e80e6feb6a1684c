"""Regular expressions of files: as Python's `re` reads them, and never for long."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_lora import patterns
from jax_lora.errors import ConfigError, DataError
from jax_lora.patterns import LONGEST, Matcher

MODULES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.10.self_attn.q_proj",
    "model.layers.1.mlp.down_proj",
    "model.embed_tokens",
    "lm_head",
]
# Each takes longer than anybody waits, on a name of 30 letters.
ENDLESS = [r"(.|\w)*(.|\w)*[!?]", r"(?:a|b|.|..|...)*[!?]", r"(?:\w|\w\w|\.|..)*[A-Z]"]
PARTS = ["q_proj", "layers", ".", r"\.", r"\d+", "1", "0", ".*", "(q|k)", "self_attn", "[0-5]", "^"]


@given(st.lists(st.sampled_from(PARTS), min_size=1, max_size=5))
@settings(deadline=None, max_examples=300)
def test_a_pattern_matches_what_peft_matches(parts):
    expression = "".join(parts)
    for module in MODULES:
        ours = Matcher("f").matches_end(expression, module)
        assert ours == bool(re.match(rf"(.*\.)?({expression})$", module)), (expression, module)
        found = Matcher("f").fullmatch(expression, module)
        assert bool(found) == bool(re.fullmatch(expression, module))


@pytest.mark.parametrize("expression", ENDLESS)
def test_an_endless_expression_is_refused(expression):
    matcher = Matcher("adapter_config.json: rank_pattern")
    with pytest.raises(DataError, match="adapter_config.json: .* matched within 0.5 s each"):
        for _ in range(1000):
            matcher.matches_end(expression, "model.layers.31.self_attn.q_proj")


def test_many_slow_expressions_are_as_slow_as_one(monkeypatch):
    """What all of them take is counted together."""
    clock = iter(range(10**6))
    monkeypatch.setattr(patterns.time, "thread_time", lambda: next(clock) * 3.0)
    matcher, names = Matcher("f"), []
    with pytest.raises(DataError, match="10 s together"):
        for name in MODULES:
            matcher.fullmatch(".*x", name)
            names.append(name)
    assert len(names) == 3


@pytest.mark.parametrize(
    "expression", ["(", "*", "[b-a]", "(" * 200, "a" * (LONGEST + 1), "a{1" + "0" * 30 + "}"]
)
def test_what_is_no_expression_names_its_key(expression):
    with pytest.raises(DataError, match="^f: key: found '.*, expected a regular expression: "):
        Matcher("f").check(expression, "key")
    with pytest.raises(ConfigError, match="^f: found"):
        Matcher("f", ConfigError).fullmatch(expression, "a")
