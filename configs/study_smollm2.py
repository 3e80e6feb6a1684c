"""SmolLM2-135M on real tasks on one GPU: all of the paper's ranks, T100, T250 and T500.

    make base
    python study.py --config=configs/study_smollm2.py:data=natural-instructions \\
        --workdir=studies/smollm2 --only='round == 0'

`bash benchmarks/gpu.sh study` runs it a round at a time, in calls of at most 10 minutes. A call
that is stopped is resumed by the next one; one round more is another --only.
"""

from configs import base, study_base


def get_config(arg=None):
    config = study_base.get_config()
    config.ranks = (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, "full")
    config.sets = ("T100", "T250", "T500")
    config.rounds = (0, 1, 2)
    config.learning_rates.lora = (5e-4,)
    config.learning_rates.full = (1e-4,)

    run = config.run
    run.model = ".cache/SmolLM2-135M-Instruct.Q4_1.gguf"
    run.epochs = 2
    run.batch_size = 64
    run.micro_tokens = 32768
    run.optim.warmup_steps = 30
    run.data.test_per_task = 20
    run.data.answer_only = True
    run.data.source_length = 1024  # the longest definition alone has 913 tokens
    run.data.target_length = 128
    run.data.buckets = (1152,)
    run.data.packed = True
    run.eval.max_new_tokens = 32
    run.eval.buckets = (128, 256, 384, 512, 1024)
    run.eval.batch_tokens = 65536
    run.eval.max_batch = 256
    return base.override(config, arg, **study_base.SHORT)
