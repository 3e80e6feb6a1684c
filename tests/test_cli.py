"""What scripts share that their own tests do not show."""

import os
import subprocess
import sys

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
