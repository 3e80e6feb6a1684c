"""The quickstart: SmolLM2-135M-Instruct, rank 16, our toy tasks, a few minutes on two CPU cores.

    make quickstart

What it printed when we ran it stands in docs/training.md.
"""

from configs import base


def get_config(arg=None):
    config = base.get_config()
    config.model = ".cache/SmolLM2-135M-Instruct.Q4_1.gguf"
    config.dtype = "auto"
    config.remat = "products"
    config.data.path = "runs/toy"
    config.data.test_per_task = 5
    config.data.answer_only = True
    config.data.source_length = 112
    config.data.target_length = 32
    config.data.packed = True  # two examples per row, of one shape
    config.data.buckets = (192,)
    config.epochs = 1
    config.max_steps = 60
    config.batch_size = 8
    config.micro_tokens = 768
    config.lora.dropout = 0.0  # drawing the masks is slow on a CPU
    config.optim.learning_rate = 2e-3
    config.optim.warmup_steps = 10
    config.eval.max_new_tokens = 16
    config.eval.buckets = (112,)
    config.eval.max_batch = 32
    return base.override(config, arg, **base.SHORT)
