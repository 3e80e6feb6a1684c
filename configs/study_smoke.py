"""The smallest study: 2 ranks and full fine-tuning, 2 sets, 1 round, minutes on two CPU cores.

    python study.py --config=configs/study_smoke.py --workdir=studies/smoke

It shows that a study runs through, on toy tasks and with a base that hardly learns anything.
"""

from configs import base, study_base


def get_config(arg=None):
    config = study_base.get_config()
    config.ranks = (2, 8, "full")
    config.sets = ("T2", "T4")
    config.rounds = (0,)
    config.learning_rates.lora = (1e-2,)
    config.learning_rates.full = (5e-3,)

    run = config.run
    run.dtype = "float32"
    run.epochs = 10
    run.batch_size = 16
    run.checkpoint_every = 10
    run.lora.dropout = 0.0
    run.optim.warmup_steps = 1
    run.data.sizes = (2, 4, 8)
    run.data.train_per_task = 24
    run.data.test_per_task = 4
    run.data.template = "tk"
    run.data.answer_only = True
    run.data.source_length = 112
    run.data.target_length = 16
    run.data.buckets = (96,)
    run.eval.max_new_tokens = 8
    run.eval.buckets = (112,)

    config.toy.instances = 40
    config.toy.vocabulary = 1024
    config.toy.shape.hidden_size = 64
    config.toy.shape.intermediate_size = 128
    config.toy.shape.num_hidden_layers = 2
    config.toy.run.epochs = 8
    config.toy.run.data = dict(set="Tall", sizes=(1, 2, 3))
    config.toy.run.optim = dict(learning_rate=1e-2)
    return base.override(config, arg, **study_base.SHORT)
