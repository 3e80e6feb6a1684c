"""What scripts share that their own tests do not show."""

import os
import subprocess
import sys

import pytest

from jax_lora import cli
from tests.conftest import REPOSITORY

SAY = """
import jax
from jax_lora import cli
cli.keep_programs()
print(jax.config.values["jax_compilation_cache_dir"])
"""


def test_programs_are_kept_in_the_users_cache_unless_jax_is_told_otherwise(tmp_path):
    def folder(**more: str) -> str:
        own = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
        environment = own | {"JAX_LORA_CACHE": str(tmp_path), **more}
        return subprocess.check_output(
            [sys.executable, "-c", SAY], text=True, cwd=REPOSITORY, env=environment
        ).strip()

    assert folder().startswith(f"{tmp_path}/programs-")
    assert folder(JAX_COMPILATION_CACHE_DIR="elsewhere") == "elsewhere"


def test_a_folder_belongs_to_the_config_that_made_it(tmp_path):
    path = tmp_path / "config.json"
    made = {
        "config": {"mesh": {"fsdp": 1}, "run": {"mesh": {"fsdp": 1}, "seed": 0}},
        "versions": {},
    }
    cli.write_json(path, made | {"versions": {"jax": "0"}})
    cli.check_same_run(path, made)
    other_mesh = {"mesh": {"fsdp": 2}, "run": {"mesh": {"fsdp": 4}, "seed": 0}}
    cli.check_same_run(path, {"config": other_mesh})
    for config, message in (
        ({"run": {"seed": 1}}, "config.run.seed is 0 there and 1 here"),
        ({"run": {"seed": 0, "epochs": 2}}, "config.run.epochs is not set there and 2 here"),
        ({"run": {}}, "config.run.seed is 0 there and not set here"),
    ):
        with pytest.raises(ValueError, match=message):
            cli.check_same_run(path, {"config": config})
