"""Full fine-tuning as in the paper: every weight, 3e-5 with a cosine to 0.

    python train.py --config=configs/full.py:set=T100,round=0 \\
        --config.model=huggyllama/llama-7b --config.data.path=natural-instructions \\
        --workdir=runs/full

The paper's LLaMA-7B on T100: exact match 51.57, Rouge-L 64.70 on seen tasks, 23.77 and 37.77 on
unseen ones (Tables 1 and 2).
"""

from configs import base


def get_config(arg=None):
    config = base.get_config()
    config.method = "full"
    config.trainable = (r"params/.*",)
    config.frozen = ()
    config.optim.learning_rate = 3e-5
    config.optim.schedule = "cosine"
    return base.override(config, arg, **base.SHORT)
