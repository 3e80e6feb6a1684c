"""Run the notebooks on a study, top to bottom, and save them with what they show.

python notebooks/execute.py studies/mini
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent


def execute(path: Path, study: Path) -> nbformat.NotebookNode:
    """A notebook with the outputs that it has on the study in a folder.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    place = {"metadata": {"path": str(FOLDER)}}
    client = NotebookClient(notebook, resources=place, record_timing=False, startup_timeout=300)
    # A bar that has run is nothing to read.
    client.execute(env=os.environ | {"STUDY": str(study.resolve()), "TQDM_DISABLE": "1"})
    return notebook


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Run the notebooks and save them.")
    parser.add_argument("study", type=Path, help="a finished study's folder")
    study = parser.parse_args().study
    for path in sorted(FOLDER.glob("*.ipynb")):
        nbformat.write(execute(path, study), path)
