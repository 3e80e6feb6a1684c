"""The paper's grid in miniature: 4 ranks and full fine-tuning, 5 sets, 2 rounds, two CPU cores.

    python study.py --config=configs/study_mini.py --workdir=studies/mini
    python study.py --workdir=studies/mini --report

A LLaMA of 1M parameters first learns fully on 11 toy tasks of four categories; the grid is drawn
from 14 others. Of the 17 unseen tasks 12 are of categories that neither has, and 5 have relatives
among the 25.
"""

from configs import base, study_base


def get_config(arg=None):
    config = study_base.get_config()
    config.ranks = (1, 4, 16, 64, "full")
    config.sets = ("T4", "T8", "T14", "T*4", "T*14")
    config.rounds = (0, 1)
    config.learning_rates.lora = (3e-3,)
    config.learning_rates.full = (1e-3,)

    run = config.run
    run.dtype = "float32"
    run.batch_size = 32
    run.micro_tokens = 2048
    run.remat = "none"
    run.unroll = 4
    run.lora.dropout = 0.0  # drawing the masks is slow on a CPU
    run.optim.warmup_steps = 10
    run.data.sizes = (4, 8, 14)
    run.data.test_per_task = 25
    run.data.template = "tk"
    run.data.answer_only = True
    run.data.source_length = 112
    run.data.target_length = 16
    run.data.buckets = (128,)
    run.data.packed = True
    run.eval.max_new_tokens = 16
    run.eval.buckets = (80, 112)

    config.toy.instances = 300
    config.toy.run.epochs = 12
    config.toy.run.data = dict(set="Tall", sizes=(1, 2, 3), train_per_task=250)
    config.toy.run.optim = dict(learning_rate=2e-3)
    return base.override(config, arg, **study_base.SHORT)
