"""Every key of a run, with its unit; the other files in this folder are short diffs of it.

The values are the paper's (section 2.3), and where it is silent those of the code that it builds
on (tloen/alpaca-lora). Override any key on the command line: --config.optim.learning_rate=1e-4
"""

from typing import Any

from ml_collections import ConfigDict


def get_config() -> Any:  # a ConfigDict, whose attributes have no types
    config: Any = ConfigDict()

    # ---- the run
    config.seed = 0  # of A's draw, the data order and dropout
    config.round = 0  # which draw of the task sets; the paper averages over three
    config.epochs = 6
    config.max_steps = 0  # stop earlier; 0 runs all epochs
    config.batch_size = 128  # examples of an optimizer step
    config.micro_tokens = 4096  # most tokens of a micro-batch on a device, padding included
    config.log_every = 1  # steps
    config.checkpoint_every = 100  # steps; the last one is always kept

    # ---- the base model
    config.model = ""  # Hugging Face folder, hub id or GGUF file
    config.dtype = "bfloat16"  # of frozen weights and arithmetic; what trains is float32
    config.remat = "full"  # recomputed in the backward pass: layers; "products" or "none" less
    config.unroll = 1  # layers a step of the scan
    config.attention = "auto"  # "cudnn" on NVIDIA, "flash" on TPU, "xla" elsewhere; or one of them
    config.loss_chunk = 1024  # positions whose logits exist at once, on a device

    # ---- many devices: these multiply to their number, and -1 is what the others leave
    config.mesh = ConfigDict()
    config.mesh.data = 1  # copies of the parameters, each with rows of its own
    config.mesh.fsdp = -1  # parts of the parameters, each with rows of its own
    config.mesh.tensor = 1  # parts of the heads and of the mlp, all with the same rows

    # ---- what trains: regular expressions on leaf names, the first list wins
    config.method = "lora"  # "lora" adds adapters, "full" does not
    config.trainable = (r"lora/.*/[abm]",)
    config.frozen = (r"lora/.*/scale", r"params/.*")
    config.lora = ConfigDict()
    config.lora.rank = 16  # r, 1 to 4096 and above
    config.lora.alpha_per_rank = 2.0  # α/r; the paper sets α = 2r
    config.lora.scaling = "alpha/r"  # of the update; rsLoRA's is "alpha/sqrt(r)"
    config.lora.dropout = 0.05  # on the input of A, in training only
    config.lora.targets = ("q_proj", "k_proj", "v_proj", "o_proj")
    config.lora.init = "kaiming"  # as PEFT draws A; "gaussian", "pissa"; or a PEFT adapter's folder
    config.lora.variant = "lora"  # or "dora"
    config.lora.materialize_delta = (
        "auto"  # form A·B once per step where that is cheaper; or "never"
    )

    # ---- data
    config.data = ConfigDict()
    config.data.path = ""  # Natural Instructions checkout, or the hub data set's id
    config.data.categories = ""  # task → category, JSON; for the hub data set, which has none
    config.data.set = "T100"  # T100 T250 T500 Tall T*100 T*500
    config.data.sizes = (100, 250, 500)  # tasks in the three nested sets, which they name
    config.data.train_per_task = 100  # examples
    config.data.test_per_task = 100  # examples, seen and unseen
    config.data.template = "alpaca"  # or "tk"
    config.data.answer = "first"  # which of several gold outputs to train on; or "random"
    config.data.answer_only = False  # loss on the answer alone; False: on the prompt too
    config.data.loss_mean = "tokens"  # of a global batch; "examples": each weighs the same
    config.data.source_length = 1024  # tokens of a prompt; a longer input loses its end
    config.data.target_length = 128  # tokens set aside for the answer
    config.data.buckets = (128, 256, 384, 512, 768, 1152)  # row lengths, each compiled once
    config.data.packed = False  # several examples a row of the last bucket, leftovers in a shorter

    # ---- optimizer: AdamW
    config.optim = ConfigDict()
    config.optim.learning_rate = 5e-5
    config.optim.schedule = "linear"  # to 0; "cosine" to 0, "constant"
    config.optim.warmup_steps = 100
    config.optim.b1 = 0.9
    config.optim.b2 = 0.999
    config.optim.eps = 1e-8
    config.optim.weight_decay = 0.0
    config.optim.clip_norm = 1.0  # of the whole gradient; 0: no clip
    config.optim.loraplus_lr_ratio = 1.0  # how many times faster B learns than A; LoRA+ proposes 16

    # ---- scoring
    config.eval = ConfigDict()
    config.eval.max_new_tokens = 128
    config.eval.buckets = (128, 256, 384, 512, 768, 1024)  # prompt lengths
    config.eval.batch_tokens = 16384  # prompt tokens of a batch on a device, padding included
    config.eval.max_batch = 64  # rows of a batch on a device
    config.eval.devices_per_copy = 1  # that share one copy of the weights, and its batch
    return config


def override(config: Any, arg: str | None, **keys: str) -> Any:
    """Apply the part behind the colon of --config=FILE:name=value,name=value.

    Args:
      config: changed and returned.
      arg: what stands behind the colon.
      keys: short name → dotted key, such as rank="lora.rank".

    Raises:
      ValueError: a name that is not among `keys`, or a value of another type.
    """
    for part in filter(None, (arg or "").split(",")):
        name, found, value = part.partition("=")
        if not found or name not in keys:
            raise ValueError(
                f"--config: found {part!r}, expected name=value with {', '.join(keys)}"
            )
        group, _, key = keys[name].rpartition(".")
        owner = config[group] if group else config
        try:
            owner[key] = type(owner[key])(value)
        except ValueError:
            kind = type(owner[key]).__name__
            raise ValueError(f"--config: {name} is {value!r}, expected {kind}") from None
    return config


SHORT = dict(
    rank="lora.rank",
    set="data.set",
    round="round",
    lr="optim.learning_rate",
    model="model",
    data="data.path",
)
