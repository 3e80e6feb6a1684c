"""Learning rate × rank on one set: does a rank that looks poor only want another rate?

    python study.py --workdir=studies/lr \\
        --config=configs/study_lr.py:model=huggyllama/llama-7b,data=natural-instructions

The paper has 5e-5 for every rank and 3e-5 for full fine-tuning; it varies neither. Here each rank's
rate is chosen by the validation loss, trained once more with another seed, and scored; the report
has the losses of all rates, and says how much of the ranks' difference is the rate's.
"""

from configs import base, study_base


def get_config(arg=None):
    config = study_base.get_config()
    config.ranks = (4, 16, 64, 256, 1024, "full")
    config.sets = ("T100",)
    config.rounds = (0,)
    config.learning_rates.lora = (2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3)
    config.learning_rates.full = (5e-6, 1e-5, 3e-5, 1e-4)
    config.run.validate_every = 10_000  # after the last step alone
    config.run.data.validation_per_task = 10
    return base.override(config, arg, **study_base.SHORT)
