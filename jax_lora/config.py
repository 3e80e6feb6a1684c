"""The configuration of a run: every key with its unit, its default and its domain.

`RunConfig()` is the paper's recipe (section 2.3); where the paper is silent, the values are those
of the code that it builds on (tloen/alpaca-lora). The files in configs/ are short changes of it.

A config is checked as a whole by `validate` and never changes afterwards. `identity` are the keys
that decide a run's results: a run may be resumed with any other value of the rest.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from jax_lora.errors import ConfigError

SETS = "T100 T250 T500 Tall T*100 T*500"


class MeshSizes(NamedTuple):
    """Devices along each axis of the mesh, in the mesh's order of axes."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the device mesh. They multiply to the number of devices; -1 takes what is left."""

    data: int = 1  # copies of the parameters, each with its own rows
    fsdp: int = -1  # shards of the parameters, each with its own rows
    tensor: int = 1  # shards of the heads and of the MLP, all with the same rows

    def sizes(self, devices: int) -> MeshSizes:
        """The sizes on that many devices.

        Raises:
          ConfigError: sizes that do not multiply to the number of devices.
        """
        sizes = [self.data, self.fsdp, self.tensor]
        known = math.prod(size for size in sizes if size != -1)
        if sizes.count(-1) == 1 and known > 0:
            sizes = [devices // known if size == -1 else size for size in sizes]
        if min(sizes) < 1 or math.prod(sizes) != devices:
            raise ConfigError(
                f"config.mesh: found {self.data} × {self.fsdp} × {self.tensor} on {devices} "
                "devices, expected data × fsdp × tensor to be their number; one of the sizes may "
                "be -1, which takes what the others leave"
            )
        return MeshSizes(*sizes)


ALPHA_LAWS = {"r": 1, "sqrt(r)": 0.5, "constant": 0}  # the power of the rank
LAWS_AGREE = 16  # the rank at which all have the same α


@dataclass(frozen=True)
class LoraConfig:
    """The adapters."""

    rank: int = 16  # r, 1 to 4096 and above
    alpha_per_rank: float = 2.0  # α/r; the paper sets α = 2r
    alpha_law: str = "r"  # α grows like r; "sqrt(r)", "constant": as "r" has it at rank 16
    scaling: str = "alpha/r"  # of the update; rsLoRA's is "alpha/sqrt(r)"
    dropout: float = 0.05  # on the input of A, in training only
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")  # of the blocks; "lm_head"
    init: str = "kaiming"  # as PEFT draws A; "gaussian", "pissa"; or the folder of a PEFT adapter
    variant: str = "lora"  # or "dora"
    materialize_delta: str = "auto"  # form A·B once per step where that is cheaper; or "never"

    @property
    def alpha(self) -> float:
        """α, by `alpha_law`: proportional to r, to √r, or the same at all ranks.

        "sqrt(r)" with a scale of α/r is rsLoRA's scale, 1/√r, and "constant" is what "LoRA Without
        Regret" (Thinking Machines 2025) trains with.
        """
        power = ALPHA_LAWS[self.alpha_law]
        return self.alpha_per_rank * self.rank**power * LAWS_AGREE ** (1 - power)


@dataclass(frozen=True)
class DataConfig:
    """The tasks, prompts and rows."""

    path: str = ""  # file, folder or hub id, see docs/data.md; or a Natural Instructions checkout
    format: str = "auto"  # by the content; "ni" (Natural Instructions), "jsonl", "json", "csv", …
    columns: str = ""  # other names of columns, such as "instruction=question,output=answer"
    validation_path: str = ""  # as path; of one's own data, Natural Instructions has its own sets
    test_path: str = ""
    validation: float = 0.0  # share of the distinct questions, in place of a path
    test: float = 0.0
    validation_per_task: int = 0  # examples of Natural Instructions that neither train nor test
    strict: bool = False  # refuse rows that cannot be used; False: leave them out and log it
    categories: str = ""  # JSON, task → category; for the hub's Natural Instructions, without any
    set: str = "T100"  # T100 T250 T500 Tall T*100 T*500
    sizes: tuple[int, ...] = (100, 250, 500)  # tasks in the three nested sets, which they name
    train_per_task: int = 100  # examples
    test_per_task: int = 100  # examples, seen and unseen
    template: str = "alpaca"  # "tk", "plain"; "chat", the tokenizer's own; or a Jinja file
    answer: str = "first"  # which of several references to train on; or "random"
    answer_only: bool = False  # loss on the answer alone; False: on the prompt too
    loss_mean: str = "tokens"  # over a global batch; "examples": each weighs the same
    source_length: int = 1024  # tokens of a prompt; a longer input loses its end
    target_length: int = 128  # tokens set aside for the answer
    buckets: tuple[int, ...] = (128, 256, 384, 512, 768, 1152)  # row lengths, each compiled once
    packed: bool = False  # several examples per row of the last bucket, the rest in a shorter one


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule."""

    name: str = "adamw"  # or "adam", "sgd", "adafactor", "lion": of optax
    learning_rate: float = 5e-5  # adafactor's is relative to the size of each parameter
    schedule: str = "linear"  # to 0; "cosine" to 0, "constant"
    warmup_steps: int = 100
    b1: float = 0.9  # adamw, adam, lion
    b2: float = 0.999  # adamw, adam, lion, whose authors propose 0.99
    eps: float = 1e-8  # adamw, adam
    weight_decay: float = 0.0  # adamw, lion; times the learning rate
    momentum: float = 0.0  # sgd
    clip_norm: float = 1.0  # of the whole gradient; 0: no clip
    loraplus_lr_ratio: float = 1.0  # how many times faster B learns than A; LoRA+ proposes 16


@dataclass(frozen=True)
class EvalConfig:
    """Greedy decoding of the test sets, and the metrics of the answers."""

    metrics: tuple[str, ...] = ("exact_match", "rougeL")  # names in evaluation/metrics.py
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()  # texts that end an answer, besides the end tokens
    buckets: tuple[int, ...] = (128, 256, 384, 512, 768, 1024)  # prompt lengths
    batch_tokens: int = 16384  # prompt tokens at a time on a device, padding included
    max_batch: int = 64  # rows at a time on a device
    devices_per_copy: int = 1  # that share one copy of the weights, and its batch
    int8_products: bool = False  # of a base in int8: activations are rounded to 8 bits, too


@dataclass(frozen=True)
class RunConfig:
    """One training run and its evaluation."""

    # ---- the run
    seed: int = 0  # of A's initialization, the data order and dropout
    round: int = 0  # which draw of the task sets; the paper averages over three
    epochs: int = 6
    max_steps: int = 0  # stop earlier; 0 runs all epochs
    batch_size: int = 128  # examples per optimizer step
    micro_tokens: int = 4096  # most tokens of a micro-batch on a device, padding included
    log_every: int = 1  # steps
    checkpoint_every: int = 100  # steps; the last step is always saved
    tracker: str = "tensorboard"  # or "wandb", "none": of the metrics, beside metrics.jsonl
    validate_every: int = 0  # steps, and the last one; 0: never
    keep: str = "last"  # or "best": the checkpoint of the lowest validation loss beside the last
    stop_after: int = 0  # validations in a row without a lower loss end the run; 0: none does
    on_nonfinite: str = "stop"  # or "skip": a step whose gradient is not finite changes nothing

    # ---- the base model
    model: str = ""  # Hugging Face folder, hub id or GGUF file
    dtype: str = "bfloat16"  # of frozen weights and arithmetic; what trains is float32. "auto":
    # float32 on a CPU without products of bfloat16; a run keeps what its first part had
    model_quantization: str = "none"  # of frozen kernels: "int8", "nf4"; "gguf", the file's blocks
    remat: str = "full"  # recomputed in the backward pass: layers; "products" or "none": less
    unroll: int = 0  # layers per iteration of the scan; 0: all without remat, but 1 on a TPU or
    # with a quantized base
    attention: str = "auto"  # "cudnn" on NVIDIA, "flash" on TPU, "xla" elsewhere; or one of them
    loss_chunk: int = 1024  # positions whose logits exist at once, on a device

    # ---- what trains: regular expressions on leaf names, the first list wins
    method: str = "lora"  # "lora" adds adapters, "full" does not
    trainable: tuple[str, ...] = (r"lora/.*/[abm]",)
    frozen: tuple[str, ...] = (r"lora/.*/scale", r"params/.*")

    mesh: MeshConfig = field(default_factory=MeshConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    @classmethod
    def from_config_dict(cls, config: Mapping[str, object]) -> RunConfig:
        """The typed config of an `ml_collections.ConfigDict`, or of a nested dict.

        Keys that are missing keep their default. The result is validated.

        Raises:
          ConfigError: an unknown key (a renamed one with its new name), a value of another type,
            or one outside of its domain.
        """
        made: RunConfig = read_typed(cls, config, "")
        made.validate()
        return made

    def to_dict(self) -> dict[str, object]:
        """Nested dicts of plain values, tuples as lists: what config.json holds."""
        return to_plain(self)

    def replace(self, **changes: object) -> RunConfig:
        """A copy with other values, by dotted key: `replace(**{"lora.rank": 8, "seed": 1})`. Of a
        group, `lora={"rank": 8}`, the keys that are not given stay.

        Raises:
          ConfigError: as `from_config_dict`.
        """
        tree = self.to_dict()
        for key, value in flatten(changes):
            group, _, name = key.rpartition(".")
            owner = tree.get(group) if group else tree
            if not isinstance(owner, dict) or name not in owner:
                raise ConfigError(f"config.{key}: no such key{_renamed(key)}")
            owner[name] = value
        return RunConfig.from_config_dict(tree)

    def validate(self) -> None:
        """Check what can be checked without the model, the data and the devices.

        Raises:
          ConfigError: the key, what was found and what is expected.
        """
        values = dict(flatten(self.to_dict()))
        for key, allowed in CHOICES.items():
            if values[key] not in allowed:
                raise ConfigError(
                    f"config.{key}: found {values[key]!r}, expected one of {', '.join(allowed)}"
                )
        for key, value in values.items():
            if isinstance(value, list) and len(value) > LONGEST_LIST:
                raise ConfigError(
                    f"config.{key}: found {len(value)} values, expected at most {LONGEST_LIST}"
                )
        for key, (low, high, note) in DOMAINS.items():
            value = values[key]
            for number in value if isinstance(value, list) else [value]:
                if not isinstance(number, int | float) or not low <= number <= high:
                    raise ConfigError(f"config.{key}: found {value!r}, expected {note}")
        for key in ("data.buckets", "eval.buckets", "eval.metrics", "lora.targets"):
            if not values[key]:
                raise ConfigError(f"config.{key}: found none, expected at least one")
        for key in dict.fromkeys(key for keys in OPTIMIZER_KEYS.values() for key in keys):
            found, default = getattr(self.optim, key), getattr(OptimConfig, key)
            if found != default and key not in OPTIMIZER_KEYS[self.optim.name]:
                raise ConfigError(
                    f"config.optim.{key}: found {found!r}, which the optimizer {self.optim.name} "
                    f"does not read; expected {default!r}, its default"
                )
        if len(self.data.sizes) != 3:
            raise ConfigError(f"config.data.sizes: found {self.data.sizes}, expected three sizes")
        if self.data.validation + self.data.test >= 1:
            found = f"{self.data.validation} and {self.data.test}"
            raise ConfigError(
                f"config.data.validation and test: found {found}, expected shares that leave "
                "something to train on"
            )
        if not self.validate_every and (self.keep == "best" or self.stop_after):
            raise ConfigError(
                f"config.validate_every: found 0 with keep={self.keep} and "
                f"stop_after={self.stop_after}, which choose by validation; expected some steps"
            )
        if self.method == "full" and self.model_quantization != "none":
            raise ConfigError(
                f"config.model_quantization: found {self.model_quantization} with method=full, "
                "which trains the kernels; expected none, or method=lora"
            )
        if self.eval.int8_products and (
            self.model_quantization != "int8" or self.lora.init == "pissa"
        ):
            raise ConfigError(
                f"config.eval.int8_products: found True with model_quantization="
                f"{self.model_quantization} and lora.init={self.lora.init}, expected False, or "
                "int8 without pissa, which leaves no integers"
            )
        if "" in self.eval.stop:
            raise ConfigError("config.eval.stop: found an empty text, expected none")
        if self.data.source_length > max(self.eval.buckets):
            raise ConfigError(
                f"config.data.source_length: found {self.data.source_length}, expected at most "
                f"{max(self.eval.buckets)}, the largest of config.eval.buckets"
            )

    def identity(self) -> dict[str, object]:
        """The keys that decide a run's results, by dotted name.

        The base and the data are known by their digests, wherever they lie.
        """
        # Validation changes nothing that trains, unless it ends the run.
        every = self.validate_every if self.stop_after else 0
        return {
            key: value
            for key, value in flatten(self.to_dict() | {"validate_every": every})
            if key not in FREE and not key.startswith(("mesh.", "eval."))
        }


# What may change between the parts of one run: speed, memory, logging, and where files lie.
SPEED = (
    "micro_tokens",
    "log_every",
    "checkpoint_every",
    "remat",
    "unroll",
    "attention",
    "loss_chunk",
    "tracker",
    "eval.batch_tokens",
    "eval.max_batch",
)
# The content of data files is known by its digest.
DATA_FILES = ("data.path", "data.format", "data.validation_path", "data.test_path")
# A run that stopped over a step that is not finite may be resumed to skip it.
FREE = (*SPEED, "keep", "on_nonfinite", "model", "data.categories", *DATA_FILES)
# Optimizer of `training.optimizers.OPTIMIZERS` → the keys of `optim` that it reads, besides those
# that all of them do. What is not listed has optax's default.
OPTIMIZER_KEYS: dict[str, tuple[str, ...]] = {
    "adamw": ("b1", "b2", "eps", "weight_decay"),
    "adam": ("b1", "b2", "eps"),
    "sgd": ("momentum",),
    "adafactor": (),
    "lion": ("b1", "b2", "weight_decay"),
}
CHOICES: dict[str, tuple[str, ...]] = {
    "method": ("lora", "full"),
    "tracker": ("tensorboard", "wandb", "none"),
    "on_nonfinite": ("stop", "skip"),
    "keep": ("last", "best"),
    "dtype": ("bfloat16", "float32", "auto"),  # gradients of this loss underflow in float16
    "model_quantization": ("none", "int8", "nf4", "gguf"),
    "remat": ("none", "full", "products"),
    "attention": ("auto", "xla", "cudnn", "flash"),
    "lora.scaling": ("alpha/r", "alpha/sqrt(r)"),
    "lora.alpha_law": tuple(ALPHA_LAWS),
    "lora.variant": ("lora", "dora"),
    "lora.materialize_delta": ("auto", "never"),
    "data.format": ("auto", "ni", "jsonl", "json", "csv", "parquet", "datasets", "hub"),
    "data.answer": ("first", "random"),
    "data.loss_mean": ("tokens", "examples"),
    "optim.name": tuple(OPTIMIZER_KEYS),
    "optim.schedule": ("linear", "cosine", "constant"),
}
_BELOW_ONE = math.nextafter(1.0, 0.0)
_POSITIVE = (math.nextafter(0.0, 1.0), math.nextafter(math.inf, 0.0), "a number above 0")
_NOT_NEGATIVE = (0.0, math.nextafter(math.inf, 0.0), "a number of at least 0")
_SHARE = (0.0, _BELOW_ONE, "at least 0 and below 1")
# Above what anybody means, and below what overflows or fills the memory before a step is taken.
_COUNT = (1, 2**31 - 1, "at least 1 and below 2^31")
_COUNT_OR_NONE = (0, 2**32 - 1, "0 or more and below 2^32")
_LENGTH = (1, 2**20, "at least 1 and at most 2^20 tokens")
_ROWS = (1, 2**20, "at least 1 and at most 2^20")
_TOKENS = (1, 2**24, "at least 1 and at most 2^24 tokens")
LONGEST_LIST = 1000  # values of a key
DOMAINS: Mapping[str, tuple[float, float, str]] = (
    dict.fromkeys(
        (
            *("epochs", "log_every", "checkpoint_every", "data.sizes", "data.train_per_task"),
            *("data.test_per_task", "eval.devices_per_copy"),
        ),
        _COUNT,
    )
    | dict.fromkeys(("data.source_length", "data.target_length", "data.buckets"), _LENGTH)
    | dict.fromkeys(("eval.max_new_tokens", "eval.buckets", "loss_chunk"), _LENGTH)
    | dict.fromkeys(("batch_size", "lora.rank", "eval.max_batch"), _ROWS)
    | dict.fromkeys(("micro_tokens", "eval.batch_tokens"), _TOKENS)
    | dict.fromkeys(("seed", "round", "max_steps", "unroll", "optim.warmup_steps"), _COUNT_OR_NONE)
    | dict.fromkeys(("validate_every", "stop_after", "data.validation_per_task"), _COUNT_OR_NONE)
    | dict.fromkeys(("lora.alpha_per_rank", "optim.eps", "optim.loraplus_lr_ratio"), _POSITIVE)
    | dict.fromkeys(("optim.learning_rate",), _NOT_NEGATIVE)
    | dict.fromkeys(("optim.weight_decay", "optim.clip_norm"), _NOT_NEGATIVE)
    | dict.fromkeys(("optim.b1", "optim.b2", "optim.momentum"), _SHARE)
    | dict.fromkeys(("data.validation", "data.test"), _SHARE)
    # A mask has 16 random bits per element: no rate is nearer to 1 than half of one of them.
    | {"lora.dropout": (0.0, 1 - 2**-16, "at least 0 and below 1, by 2^-16 or more")}
)
RENAMED = {
    "lora.contract": "lora.materialize_delta",
    "optim.b_ratio": "optim.loraplus_lr_ratio",
}


def flatten(tree: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """The (dotted key, value) pairs of nested dicts."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _renamed(key: str) -> str:
    for old, new in RENAMED.items():
        if f".{key}".endswith(f".{old}"):  # a study has the keys of a run below others
            return f"; it is called {key.removesuffix(old)}{new} now"
    return ""


def to_plain(value: object) -> typing.Any:
    """Dataclasses as nested dicts, tuples as lists."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: to_plain(one) for name, one in value.items()}
    return [to_plain(one) for one in value] if isinstance(value, tuple) else value


_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}


def read_typed(kind: typing.Any, value: object, key: str) -> typing.Any:
    """`value` as a field of that type: a dataclass, a tuple, a mapping or a plain value.

    Raises:
      ConfigError: an unknown key, a renamed one with its new name, or a value of another type.
    """
    if dataclasses.is_dataclass(kind) or typing.get_origin(kind) is Mapping:
        if not isinstance(value, Mapping) and not hasattr(value, "items"):  # a ConfigDict is none
            raise ConfigError(f"config.{key}: found {value!r}, expected a group of keys")
        given = {str(k): v for k, v in typing.cast(Mapping, value).items()}
        names = {name: f"{key}.{name}" if key else name for name in given}
        if not dataclasses.is_dataclass(kind):
            inner = typing.get_args(kind)[1]
            return {name: read_typed(inner, one, names[name]) for name, one in given.items()}
        hints = typing.get_type_hints(kind)
        for name in given:
            if name not in hints:
                raise ConfigError(f"config.{names[name]}: no such key{_renamed(names[name])}")
        made = {name: read_typed(hints[name], one, names[name]) for name, one in given.items()}
        return typing.cast(typing.Any, kind)(**made)
    if isinstance(kind, types.GenericAlias):
        (inner, *_) = typing.get_args(kind)
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise ConfigError(f"config.{key}: found {value!r}, expected a list")
        return tuple(read_typed(inner, one, key) for one in value)
    if kind is object:  # of any type: what a key of another config is given
        return read_typed(Mapping[str, object], value, key) if hasattr(value, "items") else value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    kinds = typing.get_args(kind) or (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join(_WORDS[one] for one in kinds)
        raise ConfigError(f"config.{key}: found {value!r}, expected {expected}")
    return value
