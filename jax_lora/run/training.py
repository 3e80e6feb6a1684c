"""The training of a run: the loop's log, its checkpoints, its stop and its faults."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import tqdm

from jax_lora import distributed, sharding
from jax_lora.config import RunConfig
from jax_lora.errors import ConfigError, DataError, RunFailed, Stopped
from jax_lora.model import variants
from jax_lora.planning.memory import memory
from jax_lora.planning.steps import steps_of
from jax_lora.run import nonfinite, prepare
from jax_lora.run.folder import MetricsLog
from jax_lora.run.prepare import Inputs, Training
from jax_lora.run.trackers import open_tracker
from jax_lora.training import loop, trainable_mask
from jax_lora.training.checkpoints import Checkpoints, step_named
from jax_lora.training.step import State
from jax_lora.training.validation import Validation, validate
from jax_lora.weights import peft

logger = logging.getLogger(__name__)
WINDOW = 20  # steps that the reported speed is a mean of


class Speed:
    """Real tokens per second over the last steps between which nothing was compiled.

    A step that compiles shares its time with the compiler, and no clock separates the two: it
    counts in full, but only as long as there has been no other.

    Args:
      clock: seconds.
      compiled: seconds of compiling so far, see `loop.compiled_seconds`.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        compiled: Callable[[], float] = loop.compiled_seconds,
    ):
        self._clock, self._compiled = clock, compiled
        self._before = clock(), compiled()
        self._window: deque[tuple[int, float]] = deque(maxlen=WINDOW)
        self._is_clean = False  # the window holds no step that compiled

    def step(self, tokens: int) -> float:
        """A step of so many tokens has ended; seconds of compiling since the one before."""
        now = self._clock(), self._compiled()
        seconds, compiling = (x - before for x, before in zip(now, self._before, strict=True))
        self._before = now
        if not compiling and not self._is_clean:
            self._window.clear()
            self._is_clean = True
        if not (compiling and self._is_clean):
            self._window.append((tokens, max(seconds, 1e-9)))
        return compiling

    def resume(self) -> None:
        """Do not count what was done since the last step ended."""
        self._before = self._clock(), self._compiled()

    @property
    def tokens_per_second(self) -> float:
        """The mean of the window."""
        tokens, seconds = (sum(part) for part in zip(*self._window, strict=True))
        return tokens / seconds


def fit(
    given: Inputs, training: Training, workdir: Path, asked_to_stop: Callable[[], bool]
) -> tuple[State, int]:
    """Train to the end, or until `config.stop_after` validations brought no improvement.

    A checkpoint stores what its validations chose: a run that is killed between a validation and
    its checkpoint validates that step again, and chooses the same.

    Returns:
      The last state, and the real tokens that were trained on.

    Raises:
      Stopped: `asked_to_stop` said so; the last step has a checkpoint.
      RunFailed: a fault while running.
    """
    total, config = given.total, given.resolved.config
    is_primary = jax.process_index() == 0
    checkpoints, state, last = training.checkpoints, training.state, training.start
    stop = last if checkpoints.best.ends(config.stop_after) else total
    agreement = distributed.StopAgreement(distributed.key_value_store(), jax.process_index())
    batches = given.batches.stream(training.start, stop)
    unread = None  # the report of the step before: read only once the next one is on its way
    stopping = False
    log = _Log(given, training, workdir if is_primary else None)
    with running(what_is_safe(given, checkpoints)), closing(log):
        steps = loop.train(state, training.frozen, batches, training.step, given.device_put)
        for state, report in steps:
            if unread is not None:
                log.read(unread, state)
            unread, last = report, report.step
            stopping = agreement.is_last(last, asked_to_stop())
            is_due = last == total or last % config.checkpoint_every == 0 or stopping
            every = config.validate_every
            validates = bool(every) and (last == total or last % every == 0)
            if is_due or validates:
                before = checkpoints.best
                log.read(unread, state, validates)
                unread = None
                is_over = checkpoints.best.ends(config.stop_after)
                is_better = checkpoints.best.step != before.step
                stop = last if is_over else stop
                if is_due or is_over or (is_better and config.keep == "best"):
                    checkpoints.save(state)
            checkpoints.check()
            if stopping or last == stop:
                break
        checkpoints.close()
    if last < stop:
        raise Stopped(f"stopped at step {last} of {total}; rerun the same command to resume there")
    return state, log.tokens


class _Log:
    """Reads the reports of steps: metrics.jsonl, the progress bar, and whether all is finite."""

    def __init__(self, given: Inputs, training: Training, workdir: Path | None):
        self.tokens = self._padded = 0
        self._given, self._training = given, training
        self._validation, self._metrics = "", None
        if workdir:
            tracker = open_tracker(workdir, training.start, given.resolved.config)
            self._metrics = MetricsLog(workdir, training.start, tracker)
        self._bar = tqdm.tqdm(
            total=given.total,
            initial=training.start,
            unit="step",
            dynamic_ncols=True,
            disable=workdir is None,
        )
        self._speed = Speed()

    def read(self, report: loop.Report, state: State, validates: bool = False) -> None:
        """Wait for a step and write it down.

        Args:
          report: of the step.
          state: of the step or a later one.
          validates: the state is the step's, and validated.

        Raises:
          FloatingPointError: its loss or gradient is not finite.
        """
        loss, norm = float(report.loss), float(report.gradient_norm)
        skipped = ""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            skipped = nonfinite.handle(self._given, self._training, state, report)
        self.tokens += report.tokens
        self._padded += report.padded
        compile_seconds = self._speed.step(report.tokens)
        values = {
            "loss": loss,
            "learning_rate": float(self._training.learning_rates[report.step - 1]),
            "gradient_norm": norm,
            "tokens_per_second": self._speed.tokens_per_second,
            "compile_seconds": compile_seconds,
            "padding_percent": 100 * self._padded / max(1, self.tokens + self._padded),
            "examples": self._given.batches.examples_until(report.step),
            "loss_tokens": report.loss_tokens,
        }
        if validates:
            values |= self._validate(report.step, state)
        every = self._given.resolved.config.log_every
        is_due = report.step % every == 0 or report.step == self._given.total
        if skipped or validates or is_due:
            if self._metrics:
                self._metrics.write(report.step, values, skipped)
        self._bar.set_postfix_str(
            f"loss {loss:.3f}, lr {values['learning_rate']:.1e}, "
            f"{values['tokens_per_second']:.0f} tokens/s, {values['padding_percent']:.0f}% padding"
            f"{self._validation}"
        )
        self._bar.update()

    def _validate(self, step: int, state: State) -> dict[str, float]:
        given, training = self._given, self._training
        assert given.validation is not None  # see `validation.read`
        found = validate(state, training.frozen, given.validation, training.step, given.device_put)
        training.checkpoints.best = training.checkpoints.best.after(step, found.loss)
        self._validation = f", validation {found.loss:.3f}"
        self._speed.resume()
        return found.values()

    def close(self) -> None:
        """Finish the files and the bar."""
        self._bar.close()
        if self._metrics:
            self._metrics.close()


def validate_checkpoint(
    config: RunConfig, workdir: Path, checkpoint: str = "last"
) -> tuple[int, Validation]:
    """Validate a checkpoint of a run, which nothing is written to.

    Args:
      config: of the run.
      workdir: its folder.
      checkpoint: "last", "best" or a step.

    Returns:
      Its step, and the losses.

    Raises:
      ConfigError, DataError, OSError: one line, see `jax_lora.errors`.
    """
    given = prepare.read_inputs(config, workdir)
    if given.validation is None:
        raise ConfigError("config.data: found no validation data, expected some; see docs/data.md")
    folder = workdir / "checkpoints"
    step = step_named(folder, checkpoint)
    if not folder.is_dir():
        raise DataError(f"{folder}: found no checkpoint, expected a run that trained")
    trainable, frozen = prepare.load_variables(given, workdir)
    step, trainable = Checkpoints(folder, single_process=True).restore_trainable(trainable, step)
    state = State(sharding.shard(jnp.asarray(step, jnp.int32), given.mesh), trainable, None)
    functions = given.resolved.step(optax.identity(), given.mesh)
    return step, validate(state, frozen, given.validation, functions, given.device_put)


def what_is_safe(given: Inputs, checkpoints: Checkpoints) -> Callable[[BaseException], str]:
    """What a fault leaves behind, how to resume, and for too little memory what to lower."""
    config = given.resolved.config

    def tell(error: BaseException) -> str:
        step = checkpoints.latest()
        safe = "there is no checkpoint yet: rerun the same command to start over"
        if step is not None:
            safe = f"the last checkpoint is step {step}: rerun the same command to resume there"
        if "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower():
            remat = "" if config.remat == "full" else ", or set config.remat=full"
            safe += (
                f"; {_need(given)}: to need less, lower config.micro_tokens (now "
                f"{config.micro_tokens}){remat}; both may change in a resumed run"
            )
        return safe

    return tell


def _need(given: Inputs) -> str:
    need = max(memory(step).peak for step in steps_of(given.resolved)) / 2**30
    return f"by plan.py's formula a step needs {need:.1f} GiB on each device"


def building(given: Inputs) -> AbstractContextManager[None]:
    """As `running`, of what is put on the devices before the first step."""
    return holding(
        f"no step was taken; {_need(given)}: to need less, lower config.lora.rank, quantize the "
        "base (config.model_quantization), or take more devices"
    )


@contextmanager
def holding(advice: str) -> Iterator[None]:
    """Turn what a device says that cannot hold the weights into `RunFailed`, with advice."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        raise RunFailed(f"{_in_short(error)}; {advice}") from error


@contextmanager
def running(what_is_safe: Callable[[BaseException], str]) -> Iterator[None]:
    """Turn a fault of the machine or of the numbers into `RunFailed`: what happened, what is safe.

    That is a lost or full disk, a loss that is not finite, or an error of the runtime such as too
    little memory. Anything else is a fault of ours and is raised as it is.
    """
    try:
        yield
    except (OSError, FloatingPointError, MemoryError, jax.errors.JaxRuntimeError) as error:
        raise RunFailed(f"{_in_short(error)}; {what_is_safe(error)}") from error


def _in_short(error: BaseException) -> str:
    text = " ".join(str(error).split("\n\n")[0].split()) or type(error).__name__
    return text[:500]


def save_adapter(given: Inputs, training: Training, state: State, workdir: Path) -> None:
    """Write the trained adapter in PEFT's format; all processes take part, one writes."""
    config = given.resolved.config
    adapters = sharding.gather(trainable_mask.combine(state.trainable, training.frozen)["lora"])
    rank, alpha = config.lora.rank, config.lora.alpha
    rslora = config.lora.scaling == "alpha/sqrt(r)"
    if config.lora.init == "pissa":
        # For the whole base, whose principal part the adapters held at the start.
        adapters = variants.since(adapters, peft.load(workdir / "pissa").adapters)
        rank, alpha = 2 * rank, alpha * (2**0.5 if rslora else 2)
    trained = [row["module"] for row in given.parameters.to_dict("records") if row["trainable"]]
    if jax.process_index() == 0:
        peft.save(
            workdir / "adapter",
            jax.device_get(adapters),
            rank=rank,
            alpha=alpha,
            dropout=config.lora.dropout,
            base_name=config.model,
            base_digest=given.digests["base_digest"],
            quantization=config.model_quantization,
            template=config.data.template,
            base_trained=[name for name in trained if not name.startswith("lora.")],
            use_rslora=rslora,
        )
