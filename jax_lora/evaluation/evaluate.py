"""Examples → predictions → scores, in files that survive an interruption.

    <folder>/examples.jsonl     task, category, id, input, prompt, references
    <folder>/predictions.jsonl  task, id, prediction, truncated, finished, new_tokens
    <folder>/labels.json        task → normalised label → count, of its closed-label tasks

Predictions are appended as they are made to `predictions.jsonl.partial`, which is renamed when it
is complete; `settings.json` says what made them, and a file that other settings made is redone.
Scores are a function of these files alone: they need neither a model nor an accelerator.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from jax_lora.data.example import Example
from jax_lora.data.prompts import Encoder, Row
from jax_lora.errors import DataError, MissingFileError
from jax_lora.evaluation import behaviour, metrics
from jax_lora.files import jsonl_line, naming, read_json, read_jsonl, rename, write_json, write_text
from jax_lora.generation.stop_texts import Stop

logger = logging.getLogger(__name__)
MIXED = "mixed"  # the category of a task whose examples have several, as one's own data may


@dataclass(frozen=True)
class Prediction:
    """What the model answered.

    `truncated`: the input did not fit and was cut. `finished`: the model ended its answer itself.
    `new_tokens`: tokens generated, the end token included.
    """

    task: str
    id: str
    prediction: str
    truncated: bool
    finished: bool
    new_tokens: int


def predict(
    generate: Callable[..., Iterable[Sequence[tuple[int, np.ndarray]]]],
    encoder: Encoder,
    rows: Sequence[tuple[Example, Row]],
    *,
    end_ids: Sequence[int],
    stop: Stop | None = None,
) -> Generator[list[Prediction]]:
    """Answer prompts; those of a task share what they begin with.

    Args:
      generate: `generation.scheduler.answers`, all but the prompts and their groups bound.
      encoder: decodes.
      rows: examples with their prompt rows.
      end_ids: what ends an answer.
      stop: what else ends one, as for `generation.scheduler.answers`.

    Yields:
      Predictions as they are made.
    """
    tasks = [example.task for example, _ in rows]
    for ended in generate([row.ids for _, row in rows], tasks):
        yield [
            Prediction(
                task=rows[i][0].task,
                id=rows[i][0].id,
                prediction=encoder.decode(ids.tolist()),
                truncated=rows[i][1].truncated,
                finished=int(ids[-1]) in end_ids
                or (stop is not None and stop(rows[i][1].ids, ids, 0) is not None),
                new_tokens=len(ids),
            )
            for i, ids in ended
        ]


def write_examples(folder: Path, rows: Sequence[tuple[Example, Row]]) -> None:
    """Write `examples.jsonl`."""
    fields = ("task", "category", "id", "input")
    lines = [
        {key: getattr(example, key) for key in fields}
        | {"prompt": row.prompt, "references": list(example.references)}
        for example, row in rows
    ]
    write_text(folder / "examples.jsonl", "".join(map(jsonl_line, lines)))


def write_labels(
    folder: Path, answers: Callable[[str], Iterable[Sequence[str]]], tasks: Sequence[str]
) -> None:
    """Write `labels.json`: how often each label occurs in all instances of a closed-label task.

    Args:
      folder: of the test set.
      answers: task → the accepted answers of each of its instances.
      tasks: those of the test set.
    """
    labels = {}
    for name in tasks:
        counts = behaviour.label_counts(answers(name))
        if behaviour.closed_label(counts):
            labels[name] = counts
    write_json(folder / "labels.json", labels)


def read_labels(folder: Path) -> dict[str, dict[str, int]]:
    """What `write_labels` wrote: as large as the data makes it."""
    return read_json(folder / "labels.json", dict, largest=sys.maxsize)


def write_predictions(
    folder: Path,
    rows: Sequence[tuple[Example, Row]],
    answer: Callable[[Sequence[tuple[Example, Row]]], Generator[list[Prediction]]],
    settings: Mapping[str, object],
    *,
    overwrite: bool = False,
) -> int:
    """Complete `predictions.jsonl`, going on where an earlier call was interrupted.

    Args:
      folder: of the test set.
      rows: the examples to answer.
      answer: yields the predictions of the rows given to it (see `predict`).
      settings: whatever decides the answers, such as the digest of the weights (`weights.base`)
        and the version of this package; other settings start over.
      overwrite: start over, whatever is there.

    Returns:
      How many answers an earlier call had left.
    """
    final, partial = folder / "predictions.jsonl", folder / "predictions.jsonl.partial"
    saved = folder / "settings.json"
    text = json.dumps(settings, indent=1, sort_keys=True) + "\n"
    if overwrite or not saved.is_file() or saved.read_bytes() != text.encode():
        for stale in (final, partial, folder / "scores.json"):
            stale.unlink(missing_ok=True)
        write_text(saved, text)
    wanted = {(example.task, example.id) for example, _ in rows}
    there = read_jsonl(final if final.is_file() else partial, pass_over_damage=True)
    done = {(p.get("task"), p.get("id")): p for p in there}
    done = {key: p for key, p in done.items() if key in wanted}
    if final.is_file() and len(done) == len(wanted):
        return len(done)
    missing = [pair for pair in rows if (pair[0].task, pair[0].id) not in done]
    write_text(partial, "".join(map(jsonl_line, done.values())))  # without a line cut in the middle
    final.unlink(missing_ok=True)
    with partial.open("a", encoding="utf-8") as file:
        with tqdm(total=len(rows), initial=len(done), unit="prompt", desc=folder.name) as bar:
            # Closed, because threads that answer would go on after an error.
            with closing(answer(missing)) as answered:
                for batch in answered:
                    with naming(partial):
                        file.write("".join(jsonl_line(asdict(p)) for p in batch))
                        file.flush()
                    bar.update(len(batch))
    rename(partial, final)
    return len(done)


def score(folder: Path, names: Sequence[str] = metrics.OFFICIAL) -> dict[str, object]:
    """Score a test set's folder from its files.

    Args:
      folder: of the test set.
      names: of the metrics, see `metrics.METRICS`.

    Returns:
      `metrics`: the official keys (see `metrics.aggregate`); `categories`: by category the number
      of examples; `tasks`: by task its category (MIXED where there are several), number of
      examples, every metric and, where it is closed-label, `majority_baseline` and
      `out_of_options` (all percentages); `closed_label`: the means of all of these over those
      tasks, absent where there are none; `truncated` and `unfinished`: percentages of all answers.

    Raises:
      ConfigError: an unknown metric.
      MissingFileError: the examples or the finished predictions are not there.
      DataError: a file with something else in it.
    """
    examples = _read_rows(folder / "examples.jsonl", _EXAMPLE)
    answered = _read_rows(folder / "predictions.jsonl", _PREDICTION)
    if not examples or not answered:
        text = "expected examples.jsonl and predictions.jsonl, finished"
        raise MissingFileError(errno.ENOENT, text, str(folder))
    predictions = {(p["task"], p["id"]): p for p in answered}
    labels = read_labels(folder)
    for task, counts in labels.items():
        if not isinstance(counts, dict) or {type(n) for n in counts.values()} != {int}:
            path = folder / "labels.json"
            raise DataError(f"{path}: {task}: found {counts!r:.60}, expected labels and counts")
    if "rougeL" in names and (without := sum(not _has_words(row) for row in examples)):
        logger.warning(
            "%s: rougeL counts words of a-z and 0-9 alone, as the official script does: %d of %d "
            "examples have none in any reference, and score 0; rougeL_xlingual takes any script",
            *(folder, without, len(examples)),
        )
    answers = {key: p["prediction"] for key, p in predictions.items()}
    rows = [e | {"prediction": answers.get((e["task"], e["id"]))} for e in examples]
    with tqdm(total=len(rows), unit="answer", desc=f"{folder.name}: scores", delay=1) as bar:
        scored = metrics.score_all(rows, names, progress=bar.update)
    official = metrics.aggregate(rows, scored, names)
    tasks = {
        task: _score_task([row for row in rows if row["task"] == task], official, names, labels)
        for task in dict.fromkeys(row["task"] for row in rows)
    }
    categories = Counter(row["category"] for row in rows)
    result: dict[str, object] = {"metrics": official, "categories": categories, "tasks": tasks}
    if closed := [task for task in tasks.values() if "majority_baseline" in task]:
        result["closed_label"] = {
            key: float(np.mean([float(task[key]) for task in closed]))
            for key in (*names, "majority_baseline", "out_of_options")
        } | {"tasks": len(closed)}
    truncated = [p["truncated"] for p in predictions.values()]
    unfinished = [not p["finished"] for p in predictions.values()]
    result["truncated"] = 100 * float(np.mean(truncated))
    result["unfinished"] = 100 * float(np.mean(unfinished))
    return result


def _has_words(row: Mapping[str, Sequence[str]]) -> bool:
    return any(re.search("[a-z0-9]", text.lower()) for text in row["references"])


def _score_task(
    rows: Sequence[dict],
    official: Mapping[str, float],
    names: Sequence[str],
    labels: Mapping[str, Mapping[str, int]],
) -> dict[str, float | str]:
    """The entry of one task, of which `rows` are all examples with their predictions."""
    name = rows[0]["task"]
    categories = {row["category"] for row in rows}
    category = categories.pop() if len(categories) == 1 else MIXED
    entry: dict[str, float | str] = {"category": category, "examples": len(rows)}
    entry |= {metric: official[f"{metric}_for_{name}"] for metric in names}
    if name in labels:
        references = [row["references"] for row in rows]
        baseline = behaviour.majority_baseline(labels[name], references)
        out = behaviour.out_of_options_share(
            [row["prediction"] for row in rows], behaviour.options(labels[name])
        )
        entry |= {"majority_baseline": 100 * baseline, "out_of_options": 100 * out}
    return entry


_EXAMPLE = {"task": str, "category": str, "id": str, "references": list}
_PREDICTION = {"task": str, "id": str, "prediction": str, "truncated": bool, "finished": bool}


def _read_rows(path: Path, kinds: Mapping[str, type]) -> list[dict]:
    """`read_jsonl`, of rows that have these fields; a list is one of texts, at least one."""
    rows = read_jsonl(path)
    for number, row in enumerate(rows, 1):
        for key, kind in kinds.items():
            found = row.get(key)
            empty = kind is list and isinstance(found, list) and {type(x) for x in found} != {str}
            if not isinstance(found, kind) or empty:
                raise DataError(
                    f"{path}: row {number}: {key}: found {found!r:.60}, expected "
                    f"{'a list of texts' if kind is list else kind.__name__}"
                )
    return rows
