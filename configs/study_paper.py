"""The paper's grid: 11 ranks and full fine-tuning, six sets, three rounds, on LLaMA-7B.

    python study.py --workdir=studies/paper \\
        --config=configs/study_paper.py:model=huggyllama/llama-7b,data=natural-instructions

216 cells; --dry-run says what they cost. The paper's means over three rounds, exact match and
Rouge-L (Tables 1 and 2, all of them in jax_lora/study/paper.json):

    seen      T100           T250           T500           Tall
    r 4       29.86  43.59   30.97  45.43   32.70  47.45   32.56  47.63
    r 64      39.05  54.87   40.35  56.42   41.72  57.83   43.42  59.14
    r 4096    50.55  64.74   51.28  65.50   52.91  66.60   53.36  66.87
    full      51.57  64.70   52.10  65.02   52.78  65.68   53.77  66.22
    unseen
    r 4       23.75  39.25   24.98  40.07   25.32  41.14   25.96  42.22
    r 64      24.41  40.33   24.85  41.19   26.52  43.28   26.69  43.37
    r 4096    26.38  42.64   27.76  44.14   30.05  46.97   31.12  48.36
    full      23.77  37.77   26.74  42.21   28.85  45.12   30.58  46.71
"""

from configs import base, study_base


def get_config(arg=None):
    config = study_base.get_config()
    config.measure.spectra = False  # of matrices of 4096 × 4096, on the host: hours
    return base.override(config, arg, **study_base.SHORT)
