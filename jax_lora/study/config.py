"""The configuration of a study: its axes, the runs' config, and the toy tasks and base.

`StudyConfig()` is the paper's grid (section 2.3, Tables 1 and 2). It is read by the same typed
reader as `RunConfig`, checked once and never changes. Each axis is one field.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from jax_lora.config import SPEED, RunConfig, flatten, read_typed, to_plain
from jax_lora.data.toy_pairs import CODEBOOKS
from jax_lora.errors import ConfigError
from jax_lora.evaluation import metrics

FULL = "full"  # among the ranks: full fine-tuning
EACH = "each"  # in place of a set's name: every set chooses its learning rates
MOST_CELLS = 100_000
AXES = ("ranks", "sets", "rounds", "learning_rates", "variants")
OF_AXES = ("lora.rank", "data.set", "round", "optim.learning_rate")  # of a run, set by the axes
Changes = Mapping[str, object]  # nested as a run's config is: {"lora": {"rank": 4}}


@dataclass(frozen=True)
class LearningRates:
    """The learning rates to try, by method."""

    lora: tuple[float, ...] = (5e-5,)
    full: tuple[float, ...] = (3e-5,)


@dataclass(frozen=True)
class ToyShape:
    """The shape of the toy base: fields of `LlamaConfig`."""

    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    head_dim: int = 32


@dataclass(frozen=True)
class ToyConfig:
    """Tasks and a base of the study's own, in place of `run.data.path` and `run.model`."""

    instances: int = 0  # of each toy task; 0: a checkout and a base are given
    codebooks: int = 0  # tasks of random pairs in place of the grid's; 0: none. A memory probe
    outside: tuple[str, ...] = (  # categories that are not in the grid: the base learns their tasks
        "Program Execution",
        "Information Extraction",
        "Word Semantics",
        "Sentence Composition",
    )
    unseen: tuple[str, ...] = (  # train tasks that become test tasks, with relatives in the grid
        "task003_toy_mood_of_person",
        "task007_toy_mentions_colour",
        "task012_toy_same_person",
        "task109_toy_extract_colour",
        "task114_toy_where_is_it",
    )
    vocabulary: int = 1024  # tokens
    shape: ToyShape = field(default_factory=ToyShape)
    run: Changes = field(default_factory=dict)  # of the base's training, after those of `full`


@dataclass(frozen=True)
class MeasureConfig:
    """What a trained cell is measured by, beside its answers; see docs/study.md."""

    losses_per_task: int = 1  # test examples of each task whose reference's loss is measured
    text: str = ""  # a file, whose loss says what was forgotten; "": a passage of the package
    spectra: bool = True  # of weight updates, and intruder dimensions; on the host, hours at 7B


@dataclass(frozen=True)
class StudyConfig:
    """A run for every rank × variant × set × round × learning rate, and what these runs share."""

    run: RunConfig = field(default_factory=RunConfig)  # of every cell; the axes replace its keys

    # ---- the axes
    ranks: tuple[int | str, ...] = (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, FULL)
    sets: tuple[str, ...] = ("T100", "T250", "T500", "Tall", "T*100", "T*500")
    rounds: tuple[int, ...] = (0, 1, 2)
    learning_rates: LearningRates = field(default_factory=LearningRates)
    choose_on: str = EACH  # of several learning rates one goes on to all rounds and is scored: the
    # one with the lowest last validation loss in the first round, on every set; or on this set
    # for all sets
    variants: Mapping[str, Changes] = field(default_factory=dict)  # in addition to the plain recipe
    match_parameters: bool = False  # a variant with other lora.targets gets the rank that has most
    # nearly as many parameters as the plain recipe's

    # ---- what full fine-tuning changes in `run`
    full: Changes = field(
        default_factory=lambda: {
            "method": "full",
            "trainable": (r"params/.*",),
            "frozen": (),
            "optim": {"schedule": "cosine"},
        }
    )

    toy: ToyConfig = field(default_factory=ToyConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)

    @classmethod
    def from_config_dict(cls, config: Mapping[str, object]) -> StudyConfig:
        """The typed config of an `ml_collections.ConfigDict`, or of a nested dict.

        Keys that are missing keep their default. The result is validated.

        Raises:
          ConfigError: an unknown key (a renamed one with its new name), a value of another type,
            or one outside of its domain.
        """
        made: StudyConfig = read_typed(cls, config, "")
        made.validate()
        return made

    def to_dict(self) -> dict[str, object]:
        """Nested dicts of plain values, tuples as lists: what study.json holds."""
        return to_plain(self)

    def run_with(self, *changes: Changes) -> RunConfig:
        """The runs' config with changes, the later ones first.

        Raises:
          ConfigError: a key or a value that no run has.
        """
        values = {key: value for one in changes for key, value in flatten(dict(one))}
        return self.run.replace(**values)

    def validate(self) -> None:
        """Check what can be checked without the model, the data and the devices.

        Raises:
          ConfigError: the key, what was found and what is expected.
        """
        self._validate_axes()
        changes = {"full": self.full, "toy.run": self.toy.run}
        changes |= {f"variants.{name}": change for name, change in self.variants.items()}
        for key, change in {"run": {}, **changes}.items():
            try:
                run = self.run_with(self.full if key == "toy.run" else {}, change)
            except ConfigError as error:
                text = str(error).removeprefix("config.")
                raise ConfigError(f"config.{key}.{text}") from None
            if run.stop_after:
                raise ConfigError(
                    f"config.{key}.stop_after: found {run.stop_after}, expected 0: the cells of a "
                    "study are compared at the tokens that they were planned with"
                )
            if run.dtype == "auto":
                raise ConfigError(
                    f"config.{key}.dtype: found 'auto', expected 'bfloat16' or 'float32': "
                    "the cells of a study are compared, and may be computed on several machines"
                )
        self._validate_variants()
        if self.measure.losses_per_task < 0:
            raise ConfigError(
                f"config.measure.losses_per_task: found {self.measure.losses_per_task}, expected a "
                "number of at least 0"
            )
        most = CODEBOOKS // 2  # half are for the base
        if not 0 <= self.toy.codebooks <= most:
            raise ConfigError(
                f"config.toy.codebooks: found {self.toy.codebooks}, expected 0 to {most}"
            )
        self._validate_choice()
        metrics.check_names(self.run.eval.metrics)
        if absent := set(metrics.OFFICIAL) - set(self.run.eval.metrics):
            raise ConfigError(
                f"config.run.eval.metrics: {', '.join(sorted(absent))} not found, expected "
                f"{' and '.join(metrics.OFFICIAL)} among them: the report is about these"
            )

    def _validate_variants(self) -> None:
        """Refuse what would train the same cells twice, or what an axis overrules."""
        known = {_without_speed(self.run): "the plain recipe"}
        for name, change in self.variants.items():
            if taken := sorted({key for key, _ in flatten(dict(change))} & {*OF_AXES}):
                raise ConfigError(
                    f"config.variants.{name}.{taken[0]}: found a key that an axis of the study "
                    f"sets, expected others than {', '.join(OF_AXES)}"
                )
            run = _without_speed(self.run_with(change))
            if run in known:
                raise ConfigError(
                    f"config.variants.{name}: found the same config as {known[run]}, but for what "
                    "changes no result, expected another"
                )
            known[run] = f"config.variants.{name}"

    def _validate_choice(self) -> None:
        if self.choose_on != EACH and self.choose_on not in self.sets:
            raise ConfigError(
                f"config.choose_on: found {self.choose_on!r}, expected {EACH!r} or one of "
                f"config.sets, {', '.join(self.sets)}"
            )
        methods = {FULL if rank == FULL else "lora" for rank in self.ranks}
        for method in sorted(methods):
            if len(getattr(self.learning_rates, method)) == 1:
                continue
            recipe = self.full if method == FULL else {}
            for change in ({}, *self.variants.values()):
                run = self.run_with(recipe, change)
                for key in ("validate_every", "data.validation_per_task"):
                    if not dict(flatten(run.to_dict()))[key]:
                        raise ConfigError(
                            f"config.run.{key}: found 0 with several learning_rates.{method}, "
                            "which are chosen by the validation loss; expected at least 1"
                        )

    def _validate_axes(self) -> None:
        axes = {"ranks": self.ranks, "sets": self.sets, "rounds": self.rounds}
        if set(self.ranks) != {FULL}:
            axes["learning_rates.lora"] = self.learning_rates.lora
        if FULL in self.ranks:
            axes["learning_rates.full"] = self.learning_rates.full
        for name, values in axes.items():
            # A rate is a part of a cell's name, in six digits.
            names = {f"{x:g}" if isinstance(x, float) else x for x in values}
            if not values or len(names) < len(values):
                raise ConfigError(
                    f"config.{name}: found {values}, expected at least one, none twice"
                )
        for rank in self.ranks:
            if rank != FULL and (isinstance(rank, str) or rank < 1):
                raise ConfigError(
                    f"config.ranks: found {rank!r}, expected numbers of at least 1 or {FULL!r}"
                )
        rates = max(len(self.learning_rates.lora), len(self.learning_rates.full))
        count = math.prod(map(len, (self.ranks, self.sets, self.rounds, ["", *self.variants])))
        if count * rates > MOST_CELLS:
            raise ConfigError(
                f"config: found axes of {count * rates:,} cells, expected at most {MOST_CELLS:,}"
            )
        if min(self.rounds) < 0:
            raise ConfigError(f"config.rounds: found {self.rounds}, expected numbers of at least 0")
        for name in self.variants:
            if not re.fullmatch(r"[\w.]+", name):
                raise ConfigError(
                    f"config.variants: found {name!r}, expected a name of letters and digits"
                )


def _without_speed(run: RunConfig) -> RunConfig:
    """The config with the defaults of what changes no result."""
    keys = dict(flatten(RunConfig().to_dict()))
    return run.replace(**{k: v for k, v in keys.items() if k in SPEED or k.startswith("mesh.")})


def read_axes(saved: Mapping[str, object]) -> StudyConfig:
    """The axes of a study.json, whatever version of this package wrote the rest of it.

    Raises:
      ConfigError: an axis of another type.
    """
    names = (*AXES, "choose_on")  # which older versions did not write
    return read_typed(StudyConfig, {name: saved[name] for name in names if name in saved}, "")
