"""SmolLM2-135M on a real checkout of Natural Instructions, for two CPU cores.

Training is a quarter of an hour; a full checkout's tests are 4,380 prompts.

    make base
    python train.py --config=configs/smollm2.py:rank=16 --config.data.path=natural-instructions \\
        --workdir=runs/smollm2

Loss on the answers alone, and a learning rate for a model and a budget that are a fiftieth of the
paper's. `data.source_length` is that of the paper's protocol, 1024, since only inputs are cut: the
longest definition has a prompt of 913 tokens without an input (task212), 24 of 700 tasks have more
than 320. It costs little, as the mean row of T100 has 200 tokens; with 320, 190.
"""

from configs import base


def get_config(arg=None):
    config = base.get_config()
    config.model = ".cache/SmolLM2-135M-Instruct.Q4_1.gguf"
    config.dtype = "auto"
    config.remat = "products"
    config.data.test_per_task = 20
    config.data.answer_only = True
    config.data.loss_mean = "examples"  # else the labels' two tokens drown among the summaries
    config.data.source_length = 1024
    config.data.target_length = 64
    config.data.buckets = (384, 640, 1088)
    config.data.packed = True
    config.max_steps = 100
    config.batch_size = 16
    config.micro_tokens = 1088
    config.loss_chunk = 128
    config.checkpoint_every = 25
    config.lora.targets = (*config.lora.targets, "gate_proj", "up_proj", "down_proj")
    config.lora.dropout = 0.0  # drawing the masks is slow on a CPU
    config.optim.learning_rate = 1.2e-3
    config.optim.warmup_steps = 5
    config.eval.max_new_tokens = 24
    config.eval.buckets = (128, 192, 320, 512, 1024)
    config.eval.max_batch = 64
    config.eval.batch_tokens = 8192
    return base.override(config, arg, **base.SHORT)
