"""The notebooks run top to bottom on a real study, and are saved as such a run left them."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest

from jax_lora.weights import peft
from notebooks.execute import FOLDER, execute
from tests.conftest import REPOSITORY

PATHS = sorted(FOLDER.glob("*.ipynb"))
# What a run shows: words (as a pattern) and the number of pictures, on one rank and round.
SHOWN = {
    "parameters": (r"24\.167\s+24\.167", 1),
    "scaling_curves": (r"2 of 2 cells(.|\n)*One round(.|\n)*Table 2: exact match", 2),
    "out_of_options": (r"full(.|\n)*out_of_options", 2),
    "adapters": (r"rank 2; round 0((.|\n)*Nothing to compare){3}", 3),
    "run_folder": (r"r2-T2-round0(.|\n)*Scored again, the same: True", 1),
}


def outputs(notebook: Any) -> list[Any]:
    return [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]


def text(notebook: Any) -> str:
    """What its outputs say, and nothing on stderr: no warning, no bar."""
    found = outputs(notebook)
    assert not [o for o in found if o.output_type == "error" or o.get("name") == "stderr"]
    data = [o.get("data", {}) for o in found]
    texts = [o.get("text") or d.get("text/markdown") or d.get("text/plain", "")
            for o, d in zip(found, data, strict=True)]  # fmt: skip
    return "\n".join(texts)


def pictures(notebook: Any) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


@pytest.fixture(autouse=True)
def kernels_find_the_package(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY), prepend=os.pathsep)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_runs_on_a_small_study(path, smoke_study):
    pattern, count = SHOWN[path.stem]
    notebook = execute(path, smoke_study)
    assert re.search(pattern, text(notebook)), text(notebook)
    assert pictures(notebook) == count


def test_adapters_of_several_ranks_and_rounds(smoke_study, tmp_path):
    """The study's adapter once more as if of round 1, and a half of it as if of rank 1."""
    saved = json.loads((smoke_study / "study.json").read_text())
    saved["config"] |= {"ranks": [1, 2, "full"], "rounds": [0, 1]}
    (tmp_path / "study.json").write_text(json.dumps(saved))
    results = pd.read_parquet(smoke_study / "results.parquet")
    rows = results[results["cell"] == "r2-T2-round0"]
    again = rows.assign(cell="r2-T2-round1", round=1)
    half = rows.assign(cell="r1-T2-round0", rank=1)
    pd.concat([results, again, half]).to_parquet(tmp_path / "results.parquet")

    trained = smoke_study / "cells" / "r2-T2-round0" / "adapter"
    for cell in ("r2-T2-round0", "r2-T2-round1"):
        shutil.copytree(trained, tmp_path / "cells" / cell)
    found = peft.load(trained)
    for leaf in found.adapters["layers"]["self_attn"].values():
        leaf["a"], leaf["b"] = leaf["a"][..., :1], leaf["b"][:, :1]
    peft.save(tmp_path / "cells" / "r1-T2-round0", found.adapters, rank=1, alpha=found.alpha / 2)

    notebook = execute(FOLDER / "adapters.ipynb", tmp_path)
    assert "rank 1, 2; round 0, 1" in text(notebook)
    assert "Nothing to compare" not in text(notebook) and pictures(notebook) == 6


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_saved_as_it_ran(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == [*range(1, len(counts) + 1)]
    assert pictures(notebook) >= SHOWN[path.stem][1] and text(notebook)
    content = path.read_text(encoding="utf-8")
    assert str(REPOSITORY) not in content and str(Path.home()) not in content  # nobody's machine
