"""Answers without a model: by hand on tasks of our own, and on the real test tasks as in print."""

import json

import pytest

from jax_lora.data.instructions import positive_outputs, read_checkout
from jax_lora.data.tasksets import TaskSet, draw
from jax_lora.errors import ConfigError, DataError
from jax_lora.evaluation.baselines import BASELINES, baselines
from jax_lora.run import baselines as of_a_run
from jax_lora.run import inputs
from tests import scripts
from tests.conftest import REPOSITORY


def write_task(root, name, instances, examples=None):
    """A task of (input, output) pairs, with positive examples where they are given."""
    record = {
        "Categories": ["c"],
        "Definition": [f"Do {name}."],
        "Instances": [{"input": text, "output": [answer]} for text, answer in instances],
    }
    if examples is not None:
        record["Positive Examples"] = [{"input": "?", "output": one} for one in examples]
    (root / "tasks" / f"{name}.json").write_text(json.dumps(record))


@pytest.fixture
def folder(tmp_path):
    """One task with a demonstration, and one without; both are seen, the first type unseen too."""
    root = tmp_path / "ni"
    (root / "tasks").mkdir(parents=True)
    (root / "splits" / "default").mkdir(parents=True)
    pairs = [("Yes!", "No."), ("no", "yes"), ("c", "No."), ("d", "maybe so")]
    write_task(root, "told", pairs, ["maybe so", "yes"])
    write_task(root, "silent", pairs)
    write_task(root, "test", pairs, ["yes"])
    for split, names in (("train", "told\nsilent\n"), ("test", "test\n")):
        (root / "splits" / "default" / f"{split}_tasks.txt").write_text(names)
    return root


def test_every_answer_by_hand(folder):
    checkout = read_checkout(folder)
    sets = draw(checkout, 0, sizes=(2, 3, 4), train_per_task=1, test_per_task=3)
    scores = baselines(checkout, sets["unseen"])
    assert tuple(scores) == BASELINES
    found = {name: (s["exact_match"], s["rougeL"]) for name, s in scores.items()}
    # "Yes!", "no" and "c" for "No.", "yes" and "No."; always "yes"; always "No."; nothing.
    assert found == {
        "copied input": (0.0, 0.0),
        "copied demonstration": (33.3333, 33.3333),
        "majority label": (66.6667, 66.6667),
        "empty answer": (0.0, 0.0),
    }


def test_a_demonstration_is_never_a_tested_example(folder):
    checkout = read_checkout(folder)
    sets = draw(checkout, 0, sizes=(2, 3, 4), train_per_task=1, test_per_task=3)
    tested = {e.input for e in sets["seen"].examples if e.task == "silent"}
    (other,) = (one for one in checkout.task("silent").instances() if one.input not in tested)
    wanted = [
        other.outputs[0] == e.references[0] for e in sets["seen"].examples if e.task[0] == "s"
    ]
    scores = baselines(checkout, sets["seen"])["copied demonstration"]
    assert scores["exact_match_for_silent"] == pytest.approx(100 * sum(wanted) / 3, abs=1e-3)
    told = [e.references[0] == "maybe so" for e in sets["seen"].examples if e.task == "told"]
    assert scores["exact_match_for_told"] == pytest.approx(100 * sum(told) / 3, abs=1e-3)


@pytest.mark.parametrize(
    ("examples", "outputs"),
    [
        (None, ()),
        (["a", "b"], ("a", "b")),
        ([["a", "b"], "c"], ("a", "c")),
        ([3, "c", []], ("c",)),
        ([""], ("",)),
    ],
)
def test_what_positive_examples_look_like(folder, examples, outputs):
    write_task(folder, "told", [("x", "y")], examples)
    assert positive_outputs(read_checkout(folder).task("told")) == outputs


def test_eval_prints_them_and_writes_them_without_a_model(folder, tmp_path):
    options = ["--config.data.sizes=(2,3,4)", "--config.data.test_per_task=3"]
    arguments = [f"--config={REPOSITORY}/configs/lora.py:data={folder}", *options]
    done = scripts.run("eval.py", "--baselines", *arguments, f"--workdir={tmp_path}/w")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["unseen:", "majority", "label", "3", "66.7", "66.7", "66.7", "66.7"] in rows
    assert len(rows) >= 1 + 2 * len(BASELINES)
    saved = json.loads((tmp_path / "w" / "eval-baselines/unseen/scores.json").read_text())
    assert saved["majority label"]["rougeL_for_test"] == 66.6667

    one = scripts.run(
        "eval.py", "--baselines", *arguments, "--sets=unseen", "--metrics=token_f1,exact_match"
    )
    assert one.returncode == 0 and "seen: copied" in one.stdout and "token_f1" in one.stdout
    assert "\nseen:" not in one.stdout


def test_what_is_wrong_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="neither --config nor --workdir"):
        of_a_run.score(None)
    with pytest.raises(ConfigError, match="config.data.path: found none"):
        of_a_run.score({})
    own = tmp_path / "own.jsonl"
    own.write_text('{"instruction": "a", "output": "b"}\n' * 2)
    with pytest.raises(ConfigError, match="data of one's own; expected Natural Instructions"):
        of_a_run.score({"data": {"path": str(own)}})


def test_a_set_without_examples_is_one_line(folder, monkeypatch):
    empty = {"seen": TaskSet("seen", ("t",), lambda: ())}
    monkeypatch.setattr(inputs, "test_sets", lambda *_: empty)
    with pytest.raises(DataError, match="found no example of seen, expected some"):
        of_a_run.score({"data": {"path": str(folder)}})
