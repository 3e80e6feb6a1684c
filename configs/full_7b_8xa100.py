"""Full fine-tuning of LLaMA-7B on eight A100-80GB, every weight and its optimizer cut in eight.

    python plan.py --config=configs/full_7b_8xa100.py --target=a100-80gb-8 --compile
    python train.py --config=configs/full_7b_8xa100.py:set=T100,round=0 \\
        --config.model=huggyllama/llama-7b --config.data.path=natural-instructions \\
        --workdir=runs/full

The paper on T100: exact match 51.57, Rouge-L 64.70 on seen tasks, 23.77 and 37.77 on unseen ones
(Tables 1 and 2). Cost by plan.py: a peak of 39.4 GiB on each card (compiled: 39.6) and at most
61,100 tokens/s. It was compiled for eight cards and has not run on them.
"""

from configs import full


def get_config(arg=None):
    config = full.get_config(arg)
    config.mesh.fsdp = 8
    config.remat = "products"
    config.micro_tokens = 8192  # of a device
    return config
