"""SmolLM2-135M on 700 real tasks, on two CPU cores: ranks, diversity, amount, and chosen rates.

    make base
    python study.py --workdir=studies/real_cpu --config=configs/study_real_cpu.py:\\
        model=.cache/SmolLM2-135M-Instruct.Q4_1.gguf,data=natural-instructions
"""

from configs import base, study_base


def get_config(arg=None):
    config = study_base.get_config()
    config.ranks = (4, 32, 256, "full")
    # T100 and T500 have as many examples per task, T*100 and T500 as many in all.
    config.sets = ("T100", "T500", "T*100")
    config.rounds = (0, 1)
    config.learning_rates.lora = (3e-4, 1e-3, 3e-3)
    config.learning_rates.full = (3e-5, 1e-4, 3e-4)
    config.choose_on = "T100"

    run = config.run
    run.model = ".cache/SmolLM2-135M-Instruct.Q4_1.gguf"
    run.epochs = 1
    run.batch_size = 8
    run.micro_tokens = 1024
    run.loss_chunk = 128
    run.remat = "none"
    run.checkpoint_every = 60
    run.validate_every = 1000  # after the last step alone
    run.tracker = "none"
    run.lora.dropout = 0.0  # drawing the masks is slow on a CPU
    run.optim.warmup_steps = 5
    run.data.sizes = (100, 500, 581)
    run.data.train_per_task = 2
    run.data.test_per_task = 6
    run.data.validation_per_task = 2
    run.data.template = "tk"
    run.data.answer_only = True
    run.data.loss_mean = "examples"  # else the labels' two tokens drown among the summaries
    run.data.source_length = 960  # the longest definition alone has 901 tokens
    run.data.target_length = 64
    run.data.buckets = (384, 640, 1024)
    run.data.packed = True
    run.eval.max_new_tokens = 48
    run.eval.buckets = (128, 192, 256, 384, 512, 960)
    run.eval.max_batch = 32
    run.eval.batch_tokens = 4096
    return base.override(config, arg, **study_base.SHORT)
