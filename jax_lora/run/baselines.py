"""The scores that need no model, of a run's test sets: as a table, and in files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from jax_lora.config import RunConfig
from jax_lora.data.instructions import Checkout
from jax_lora.errors import ConfigError, DataError
from jax_lora.evaluation import baselines, metrics
from jax_lora.files import local_path, write_json
from jax_lora.run import folder as run_folder
from jax_lora.run import inputs
from jax_lora.run.score_tables import LABELS
from jax_lora.text import table

FOLDER = "eval-baselines"  # in a run's folder, beside `eval` and `eval-none`


def score(
    config: Mapping[str, object] | None,
    workdir: str | None = None,
    names: Sequence[str] | None = None,
    metric_names: Sequence[str] | None = None,
) -> str:
    """Score `evaluation.baselines` on test sets of a checkout; no model and no tokenizer is read.

    Args:
      config: of a run, as `RunConfig.from_config_dict` takes it; None reads the folder's.
      workdir: a folder, a run's or not, that gets `eval-baselines/<set>/scores.json`: by baseline
        the official keys. None writes nothing.
      names: of the test sets, see `inputs.test_sets`.
      metric_names: in place of the config's.

    Returns:
      A table of the means over examples and over tasks.

    Raises:
      ConfigError, DataError, OSError: one line, see `jax_lora.errors`.
    """
    run, folder = _given(config, workdir)
    metric_names = metric_names or run.eval.metrics
    metrics.check_names(metric_names)
    if not run.data.path:
        raise ConfigError("config.data.path: found none, expected a Natural Instructions checkout")
    data = inputs.data(run)
    if not isinstance(data, Checkout):
        raise ConfigError(
            f"config.data.path: found {run.data.path}, data of one's own; expected Natural "
            "Instructions, whose tasks have demonstrations and labels"
        )
    found: dict[str, dict[str, dict[str, float]]] = {}
    sets = inputs.test_sets(run, names)
    for name, taskset in sets.items():
        if not taskset.examples:
            raise DataError(f"{run.data.path}: found no example of {name}, expected some")
    for name, taskset in sets.items():
        total = len(baselines.BASELINES) * len(taskset.examples)
        with tqdm(total=total, unit="answer", desc=f"{name}: baselines", delay=1) as bar:
            found[name] = baselines.baselines(data, taskset, metric_names, bar.update)
        if folder:
            write_json(folder / FOLDER / name / "scores.json", found[name])
    counts = {name: len(taskset.examples) for name, taskset in sets.items()}
    return _table(found, counts, metric_names)


def _given(
    config: Mapping[str, object] | None, workdir: str | None
) -> tuple[RunConfig, Path | None]:
    folder = local_path(workdir) if workdir else None
    if config is not None:
        return RunConfig.from_config_dict(config), folder
    if folder is None:
        raise ConfigError(
            "--baselines: found neither --config nor --workdir, expected a file such as "
            "configs/base.py or a folder that train.py made"
        )
    return run_folder.read_saved(folder)[0], folder


def _table(
    found: Mapping[str, Mapping[str, Mapping[str, float]]],
    counts: Mapping[str, int],
    names: Sequence[str],
) -> str:
    labels = [LABELS.get(name, name) for name in names]
    header = ["set: answer", "n", *labels, *(f"{label} over tasks" for label in labels)]
    rows = [
        [
            f"{name}: {baseline}",
            counts[name],
            *(scores[metric] for metric in names),
            *(scores[f"{metric}_over_tasks"] for metric in names),
        ]
        for name, by_baseline in found.items()
        for baseline, scores in by_baseline.items()
    ]
    return table(header, rows)
