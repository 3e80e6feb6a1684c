"""Every key of a study, for the command line; the other files named study_* are short diffs of it.

The keys, their units, defaults and domains are documented in jax_lora/study/config.py, those of
`run` in jax_lora/config.py. A study trains and scores a run for every rank × variant × set × round
× learning rate.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import base
from jax_lora.study.config import StudyConfig


def get_config() -> Any:  # a ConfigDict, whose attributes have no types
    return ConfigDict(base.tuples(StudyConfig().to_dict()))


SHORT = dict(model="run.model", data="run.data.path")
