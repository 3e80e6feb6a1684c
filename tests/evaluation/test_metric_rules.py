"""The rules of exact match and Rouge-L on any text, one by one and many at once."""

import random
import string
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

from jax_lora.evaluation.metrics import exact_match, normalize, rouge_l, score_all

OFFICIAL = RougeScorer(["rougeL"], use_stemmer=True)
STEMS = DefaultTokenizer(use_stemmer=True).tokenize

steady = settings(deadline=None, derandomize=True)

# Words that the stemmer shortens, in few forms so that sentences share them, among any text.
ENDINGS = ("", "s", "ed", "ing", "ly", "ation", "ies", "'s", "-up")
SENTENCE_WORDS = [
    stem + ending for stem in ("run", "happi", "relat", "the", "42") for ending in ENDINGS
]
words = st.text(string.ascii_letters, min_size=1, max_size=8)
sentences = st.lists(st.sampled_from(SENTENCE_WORDS), max_size=12).map(" ".join)
texts = st.text(max_size=40) | st.text("ab AB.,-!'\t\n", max_size=30) | sentences
references = st.lists(texts, min_size=1, max_size=4)


def official(prediction, accepted):
    return max(OFFICIAL.score(one, prediction)["rougeL"].fmeasure for one in accepted)


# ---------------------------------------------------------------------------- exact match


@steady
@given(texts)
def test_normalize_lowers_deletes_punctuation_and_collapses_white_space(text):
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    assert normalize(text) == " ".join(kept.split())
    assert normalize(normalize(text)) == normalize(text)


@steady
@given(texts, references)
def test_exact_match_is_equality_with_any_reference_once_normalized(prediction, accepted):
    found = exact_match(prediction, accepted)
    assert found == (normalize(prediction) in {normalize(one) for one in accepted})
    assert exact_match(prediction, [*accepted, f" {prediction}! "]) == 1.0


@steady
@given(texts)
def test_articles_and_unicode_punctuation_count(text):
    assert exact_match(f"the {text}", [text]) == 0.0
    assert exact_match(f"“{text}”", [text]) == 0.0


@steady
@given(words, words)
def test_deleted_punctuation_leaves_no_space_for_exact_match_but_parts_words_for_rouge(a, b):
    assert exact_match(f"{a}-{b}", [a + b]) == 1.0
    assert exact_match(f"{a}-{b}", [f"{a} {b}"]) == 0.0
    assert rouge_l(f"{a}-{b}", [f"{a} {b}"]) == 1.0


# -------------------------------------------------------------------------------- Rouge-L


@steady
@given(texts, references)
def test_rouge_l_is_that_of_rouge_score(prediction, accepted):
    assert rouge_l(prediction, accepted) == official(prediction, accepted)
    for one in accepted:
        assert rouge_l(one, [prediction]) == official(one, [prediction])


@steady
@given(texts, texts)
def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence(prediction, reference):
    said, wanted = STEMS(prediction), STEMS(reference)

    @cache
    def longest(i: int, j: int) -> int:
        if i == len(said) or j == len(wanted):
            return 0
        if said[i] == wanted[j]:
            return 1 + longest(i + 1, j + 1)
        return max(longest(i + 1, j), longest(i, j + 1))

    expected = 2 * longest(0, 0) / max(1, len(said) + len(wanted))
    assert rouge_l(prediction, [reference]) == pytest.approx(expected, rel=0, abs=1e-12)


@steady
@given(texts)
def test_rouge_l_of_a_text_with_itself_is_one_unless_it_has_no_word(text):
    has_word = any(c in string.ascii_lowercase + string.digits for c in text.lower())
    assert rouge_l(text, [text]) == float(has_word)
    assert rouge_l("", [text]) == rouge_l(text, [""]) == 0.0


@steady
@given(sentences, sentences)
def test_rouge_l_reads_alike_from_either_side_and_either_end(one, other):
    assert rouge_l(one, [other]) == rouge_l(other, [one])
    mirrored = " ".join(reversed(STEMS(one))), " ".join(reversed(STEMS(other)))
    plain = " ".join(STEMS(one)), " ".join(STEMS(other))
    assert rouge_l(mirrored[0], [mirrored[1]]) == rouge_l(plain[0], [plain[1]])


@steady
@given(sentences, sentences)
def test_a_word_that_no_reference_has_never_helps(prediction, reference):
    before, after = (rouge_l(p, [reference]) for p in (prediction, f"{prediction} zebra"))
    assert after < before or after == before == 0.0
    assert (before > 0) == bool({*STEMS(prediction)} & {*STEMS(reference)})


# ----------------------------------------------------------------------------------- both


@steady
@given(st.lists(words, min_size=1, max_size=6), st.data())
def test_case_punctuation_and_white_space_do_not_count(parts, data):
    gap = st.text(" \t\n\r", min_size=1, max_size=3)
    mark = st.text(string.punctuation, max_size=2)
    noisy = data.draw(gap)
    for part in parts:
        noisy += data.draw(mark) + data.draw(st.sampled_from([part.upper(), part.lower()]))
        noisy += data.draw(mark) + data.draw(gap)
    assert normalize(noisy) == " ".join(parts).lower()
    assert exact_match(noisy, [" ".join(parts)]) == rouge_l(noisy, [" ".join(parts)]) == 1.0


@steady
@given(texts, references, st.randoms(use_true_random=False))
def test_each_metric_is_its_best_over_the_references_in_any_order(prediction, accepted, dice):
    shuffled = accepted + [dice.choice(accepted)]
    dice.shuffle(shuffled)
    for metric in (exact_match, rouge_l):
        best = max(metric(prediction, [reference]) for reference in accepted)
        assert metric(prediction, accepted) == metric(prediction, shuffled) == best
        assert type(best) is float and 0.0 <= best <= 1.0


def test_the_metrics_may_take_their_best_from_different_references():
    assert [exact_match("3.5", [one]) for one in ("35", "3 5")] == [1.0, 0.0]
    assert [rouge_l("3.5", [one]) for one in ("35", "3 5")] == [0.0, 1.0]
    assert exact_match("3.5", ["35", "3 5"]) == rouge_l("3.5", ["35", "3 5"]) == 1.0


# -------------------------------------------------------------------------- many at once


def some_rows(count: int) -> list[dict]:
    """Answers and references of all sorts, shared and not, missing and beyond Unicode."""
    dice = random.Random(0)

    def text():
        return " ".join(dice.choices(SENTENCE_WORDS, k=dice.choice([0, 1, 1, 2, 8, 30])))

    rows = [
        {"prediction": text(), "references": [text() for _ in range(dice.choice([1, 1, 4]))]}
        for _ in range(count - 3)
    ]
    missing = {"prediction": None, "references": ("", "yes")}
    surrogate = {"prediction": "\ud800 run", "references": ["\ud800 running"]}
    return [missing, *rows, surrogate, missing]


def one_by_one(rows: list[dict]) -> list[tuple[float, float]]:
    pairs = [(row["prediction"] or "", row["references"]) for row in rows]
    return [(exact_match(*pair), official(*pair)) for pair in pairs]


def test_many_are_scored_as_one_by_one():
    rows, seen = some_rows(1200), []
    assert score_all(rows, progress=seen.append) == one_by_one(rows)
    assert seen == [500, 500, 200]
    assert score_all([]) == []


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prediction": "a", "references": ["a"]}, {"prediction": "a"}], "row 1: no 'ref"),
        ([{"prediction": 1, "references": ["a"]}], "row 0: prediction: found 1"),
    ],
)
def test_score_all_refuses_before_it_scores(rows, message):
    seen = []
    with pytest.raises(ValueError, match=message) as caught:
        score_all(rows, progress=seen.append)
    assert "\n" not in str(caught.value) and not seen
