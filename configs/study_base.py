"""Every key of a study; the other files named study_* are short diffs of it.

A study trains and scores a run for every rank × variant × set × round × learning rate.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import base


def get_config() -> Any:
    config: Any = ConfigDict()
    config.run = base.get_config()  # what the cells share; the axes replace its keys

    # ---- the axes
    config.ranks = (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, "full")
    config.sets = ("T100", "T250", "T500", "Tall", "T*100", "T*500")
    config.rounds = (0, 1, 2)
    config.learning_rates = ConfigDict({"lora": (5e-5,), "full": (3e-5,)})

    # ---- what a cell changes in `run`
    config.full = ConfigDict({"method": "full", "trainable": (r"params/.*",), "frozen": ()})
    config.full.optim = ConfigDict({"schedule": "cosine"})
    config.variants = ConfigDict()  # by name; the plain recipe is among the cells anyway

    # ---- tasks and a base of the study's own, for `run.data.path` and `run.model`
    config.toy = ConfigDict()
    config.toy.instances = 0  # of each toy task; 0: a checkout and a base are given
    config.toy.outside = (  # categories that are not in the grid: the base learns on their tasks
        "Program Execution",
        "Information Extraction",
        "Word Semantics",
        "Sentence Composition",
    )
    config.toy.unseen = (  # train tasks that nobody trains on, but on relatives of theirs
        "task003_toy_mood_of_person",
        "task007_toy_mentions_colour",
        "task012_toy_same_person",
        "task109_toy_extract_colour",
        "task114_toy_where_is_it",
    )
    config.toy.vocabulary = 1024  # tokens
    config.toy.shape = ConfigDict()
    config.toy.shape.hidden_size = 128
    config.toy.shape.intermediate_size = 384
    config.toy.shape.num_hidden_layers = 4
    config.toy.shape.num_attention_heads = 4
    config.toy.shape.num_key_value_heads = 4
    config.toy.shape.head_dim = 32
    config.toy.run = ConfigDict()  # what the base's training changes in `run`, as `full` changed it
    return config


SHORT = dict(model="run.model", data="run.data.path")
