"""Prints the oldest version of each dependency that pyproject.toml allows, as pins for pip.

python tests/oldest.py > oldest.txt
"""

import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def pins() -> list[str]:
    """`name==version` of every dependency, that of the extra wandb too; each is given as
    `name>=version`."""
    project = tomllib.loads(PROJECT.read_text("utf-8"))["project"]
    dependencies = (*project["dependencies"], *project["optional-dependencies"]["wandb"])
    found = dict(dependency.split(">=") for dependency in dependencies)
    found["jaxlib"] = found["jax"]  # which jax would take newer
    return [f"{name}=={version}" for name, version in found.items()]


if __name__ == "__main__":
    print("\n".join(pins()))
