"""How long exact match and Rouge-L of 100,000 answers take.

python benchmarks/scoring.py

The references are those of real tasks where ../shared/data/niv2-slice is there, else of the toy
checkout. Half of the answers are an accepted one, half are another instance's; then all are 80
words of the tasks' inputs, about what 128 new tokens hold when an untuned model rambles on.
"""

import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean

from rouge_score.rouge_scorer import RougeScorer

from jax_lora.data.instructions import Checkout, read_checkout
from jax_lora.data.toy import write_checkout
from jax_lora.evaluation.metrics import exact_match, score_all

PAIRS = 100_000
SAMPLE = 1_000
SLICE = Path(__file__).resolve().parents[2] / "shared" / "data" / "niv2-slice"


def build(checkout: Checkout, *, rambling: bool) -> list[dict]:
    """Rows for `score_all`, as many of each task."""
    dice = random.Random(0)
    tasks = [task.instances() for task in (*checkout.train, *checkout.test)]
    rows = []
    for index in range(PAIRS):
        instances = tasks[index * len(tasks) // PAIRS]
        instance = dice.choice(instances)
        if rambling:
            words = [word for one in dice.choices(instances, k=40) for word in one.input.split()]
            answer = " ".join(words[:80])
        else:
            answer = dice.choice(dice.choice([instance, dice.choice(instances)]).outputs)
        rows.append({"prediction": answer, "references": instance.outputs})
    return rows


def by_rouge_score(scorer: RougeScorer, row: dict) -> tuple[float, float]:
    """One row, its Rouge-L by rouge_score itself."""
    prediction, references = row["prediction"], row["references"]
    found = [scorer.score(reference, prediction)["rougeL"].fmeasure for reference in references]
    return exact_match(prediction, references), max(found)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        real = SLICE.is_dir()
        checkout = read_checkout(SLICE if real else write_checkout(folder))
        mixes = {
            name: build(checkout, rambling=rambling)
            for name, rambling in (("of real lengths", False), ("of 80 words", True))
        }
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    print(f"{'../shared/data/niv2-slice' if real else 'toy tasks'}, 1 process")
    for name, rows in mixes.items():
        words = mean(len(row["prediction"].split()) for row in rows)
        accepted = mean(len(one.split()) for row in rows for one in row["references"])
        print(f"\n{len(rows):,} answers {name}: mean {words:.1f} words, references {accepted:.1f}")
        sample = random.Random(0).sample(rows, SAMPLE)
        start = time.perf_counter()
        expected = [by_rouge_score(scorer, row) for row in sample]
        took = time.perf_counter() - start
        print(f"rouge_score one by one, {SAMPLE:,} of them: {1e6 * took / SAMPLE:.0f} µs each")
        if score_all(sample) != expected:
            sys.exit("score_all differs from rouge_score")
        start = time.perf_counter()
        score_all(rows)
        print(f"score_all: {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
