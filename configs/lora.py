"""LoRA as in the paper: r of 4 to 4096 on q, k, v, o, α = 2r, dropout 0.05, 5e-5 linear.

    python train.py --config=configs/lora.py:rank=16,set=T100,round=0 \\
        --config.model=huggyllama/llama-7b --config.data.path=natural-instructions \\
        --workdir=runs/r16

The paper's LLaMA-7B at rank 16 on T100: exact match 34.37, Rouge-L 49.75 on seen tasks, 23.77 and
39.84 on unseen ones (Tables 1 and 2), on an A100-80GB.
"""

from configs import base


def get_config(arg=None):
    return base.override(base.get_config(), arg, **base.SHORT)
