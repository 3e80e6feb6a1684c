"""How many bits does a rank hold? Random keys and values, learned by heart; minutes on two cores.

    python study.py --config=configs/study_capacity.py --workdir=studies/capacity
    python study.py --workdir=studies/capacity --report

A LLaMA of two layers first learns fully on toy tasks and other pairs. Then each rank, on all linear
layers, learns 192 or 576 random pairs by heart, of 16 bits each. What is held is 16 bits per pair
less the loss of the values in bits: where more pairs bring no more bits, the rank is full. Nothing
can be asked of unseen pairs: the scores on test sets are of no interest here.
"""

from configs import base, study_base

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def get_config(arg=None):
    config = study_base.get_config()
    config.ranks = (1, 2, 4, 8, 16, "full")
    config.sets = ("T6", "T18")
    config.rounds = (0,)
    config.learning_rates.lora = (1e-2,)
    config.learning_rates.full = (3e-3,)
    config.measure.losses_per_task = 0

    run = config.run
    run.dtype = "float32"
    run.epochs = 400
    run.batch_size = 128
    run.micro_tokens = 8192
    run.checkpoint_every = 10_000
    run.remat = "none"
    run.lora.targets = LINEAR
    run.lora.dropout = 0.0
    run.optim.warmup_steps = 50
    run.data.sizes = (6, 12, 18)
    run.data.train_per_task = 32
    run.data.test_per_task = 1
    run.data.template = "plain"
    run.data.answer_only = True
    run.data.source_length = 112
    run.data.target_length = 16
    run.data.buckets = (16,)
    run.eval.max_new_tokens = 8
    run.eval.buckets = (112,)

    config.toy.instances = 50
    config.toy.codebooks = 18
    config.toy.shape.hidden_size = 64
    config.toy.shape.intermediate_size = 128
    config.toy.shape.num_hidden_layers = 2
    config.toy.shape.head_dim = 16
    config.toy.run.epochs = 25
    config.toy.run.batch_size = 32
    config.toy.run.data = dict(
        set="Tall", sizes=(1, 2, 3), train_per_task=49, buckets=(128,), packed=True
    )
    config.toy.run.optim = dict(learning_rate=5e-3)
    return base.override(config, arg, **study_base.SHORT)
