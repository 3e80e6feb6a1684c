"""LoRA of LLaMA-7B on one A100-80GB, at any rank up to 2048; rank 4096 takes two of them.

    python plan.py --config=configs/lora_7b_a100.py:rank=2048 --target=a100-80gb --compile
    XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 python train.py \\
        --config=configs/lora_7b_a100.py:rank=2048,set=T100,round=0 \\
        --config.model=huggyllama/llama-7b --config.data.path=natural-instructions \\
        --workdir=runs/r2048

The paper at rank 2048 on T100: exact match 49.46, Rouge-L 64.01 on seen tasks, 25.58 and 42.45 on
unseen ones (Tables 1 and 2); "the model can still be fine-tuned on a single A100-80GB GPU".
Cost by plan.py, peak and most tokens/s: 36.6 GiB and 11,200 at rank 16, 64.7 GiB and 7,000 at rank
2048, and on two cards (--target=a100-80gb-2) 54.7 GiB each and 13,800 at rank 4096. Rank 2048 was
compiled for the card, 64.7 GiB as well; none of it has run on one.
"""

from configs import base


def get_config(arg=None):
    config = base.override(base.get_config(), arg, **base.SHORT)
    # The products of frozen kernels are kept, 11 GiB for 4096 tokens, and not computed twice.
    # Above rank 1024 the adapters and their state leave room for no more than that.
    config.remat = "products"
    config.micro_tokens = 8192 if config.lora.rank <= 1024 else 4096
    return config
