"""`Run`: one config and one folder, trained, scored and exported."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import pandas as pd
from jaxtyping import PyTree

from jax_lora import distributed
from jax_lora.config import RunConfig
from jax_lora.evaluation import metrics
from jax_lora.files import local_path
from jax_lora.model.config import LlamaConfig
from jax_lora.run import (
    check,
    folder,
    inputs,
    losses,
    prepare,
    programs,
    score_tables,
    scoring,
    training,
)
from jax_lora.text import table
from jax_lora.training.resolve import with_dtype
from jax_lora.weights import merge, origin, peft

logger = logging.getLogger(__name__)
Say = Callable[[str], None]


class Run:
    """One training run and its scores, in a folder.

        run = Run.open(RunConfig().replace(model="…", **{"data.path": "…"}), "runs/r16")
        run.train()
        run.score(["seen", "unseen"])

    Nothing here exits or prints: what there is to say goes to `say` and, for progress, to the
    logger "jax_lora". Every method may be called again: what is finished is not done twice.

    Attributes:
      config: the run's `RunConfig`.
      workdir: its folder; docs/training.md says what lies in it.
    """

    def __init__(self, config: RunConfig, workdir: Path, say: Say):
        self.config, self.workdir, self._say = config, workdir, say

    @classmethod
    def open(
        cls,
        config: RunConfig | Mapping[str, object] | None,
        workdir: str | os.PathLike[str],
        say: Say = logger.info,
    ) -> Run:
        """A new run, or one that is in the folder already.

        Args:
          config: of the run, a `RunConfig` or what `RunConfig.from_config_dict` takes; None reads
            the folder's own config.json.
          workdir: the run's folder; made by `train`.
          say: gets tables and results as text.

        Raises:
          ConfigError, DataError, OSError: one line, see `jax_lora.errors`.
        """
        programs.forget_if_many()
        path = local_path(workdir)
        if config is None:
            config, _ = folder.read_saved(path)
        elif not isinstance(config, RunConfig):
            config = RunConfig.from_config_dict(config)
        config.validate()
        metrics.check_names(config.eval.metrics)
        if config.dtype == "auto":
            if (path / "config.json").is_file():
                config = config.replace(dtype=folder.read_saved(path)[0].dtype)
            config = with_dtype(config, jax.default_backend())
            logger.info("config.dtype: auto is %s here", config.dtype)
        return cls(config, path, say)

    def train(
        self, *, verify: bool = False, asked_to_stop: Callable[[], bool] = lambda: False
    ) -> pd.DataFrame:
        """Train to the end, from the start or from the last checkpoint.

        On all devices of all processes: each of them calls this.

        Args:
          verify: read every file of a large checkout, whatever its size and time say.
          asked_to_stop: asked after every step; True saves a checkpoint and raises `Stopped`.

        Returns:
          `metrics()`.

        Raises:
          ConfigError, DataError, OSError: wrong input, before any compute; or another process is at
            work in the folder.
          RunFailed: a fault while running: what is safe and how to resume.
          Stopped: see `asked_to_stop`.
        """
        is_primary = jax.process_index() == 0
        with folder.owned(self.workdir, "training", distributed.key_value_store(), is_primary):
            self._train(is_primary, verify, asked_to_stop)
        return self.metrics()

    def _train(self, is_primary: bool, verify: bool, asked_to_stop: Callable[[], bool]) -> None:
        say = self._say if is_primary else lambda _: None
        given = prepare.read_inputs(self.config, self.workdir, verify)
        with folder.all_or_nothing(self.workdir, is_primary):
            if is_primary:
                prepare.write_start(given, self.workdir)
            with training.building(given):
                ready = prepare.build(given, self.workdir)
        say(_summary(given))
        best, stop_after = ready.checkpoints.best, self.config.stop_after
        if ready.start and not best.ends(stop_after):
            say(f"resuming from step {ready.start}")
        began = time.perf_counter()
        state, tokens = training.fit(given, ready, self.workdir, asked_to_stop)
        best, last = ready.checkpoints.best, int(state.step)
        if best.step is not None:
            say(f"lowest validation loss: {best.loss:.4f} at step {best.step}")
        if last < given.total:
            say(
                f"finished at step {last} of {given.total}: {best.since} validations in a row "
                "brought no lower loss"
            )
        if self.config.method == "lora":
            safe = "rerun the same command to write the adapter again"
            with training.running(lambda _: safe):
                training.save_adapter(given, ready, state, self.workdir)
            say(f"adapter: {self.workdir / 'adapter'}")
            if any(jax.tree.leaves(given.mask["params"])):
                say("it holds A and B alone; what else trained is in the checkpoint")
        seconds = time.perf_counter() - began
        say(f"{seconds:.0f} s of training, {tokens:,} tokens; {self.workdir}")

    def metrics(self) -> pd.DataFrame:
        """What metrics.jsonl holds: one row per logged step."""
        return pd.DataFrame(folder.read_metrics(self.workdir))

    def validate(self, checkpoint: str = "last") -> dict[str, float]:
        """The loss of a checkpoint on the validation data, as training computes it.

        Args:
          checkpoint: "last"; "best", the one with the lowest validation loss; or a step.

        Returns:
          step, validation_loss, validation_bits_per_byte and validation_tokens, see
          `training.validation.Validation`.

        Raises:
          ConfigError, DataError, OSError: wrong input, no validation data or no such checkpoint.
        """
        folder.read_saved(self.workdir)
        step, found = training.validate_checkpoint(self.config, self.workdir, checkpoint)
        return {"step": step, **found.values()}

    def score(
        self,
        sets: Sequence[str] | None = None,
        adapter: str = "last",
        *,
        checkpoint: str = "last",
        overwrite: bool = False,
        base_on_host: bool = True,
        any_base: bool = False,
        **eval_options: object,
    ) -> pd.DataFrame:
        """Answer test sets greedily and score the answers.

        Args:
          sets: "seen", held-out examples of the smallest task set, and "unseen", the test tasks;
            of data of one's own "test". None is all that there are.
          adapter: "last", the run's own; "none", the bare base; or a PEFT folder.
          checkpoint: "last"; "best", the one with the lowest validation loss; or a step. It has
            results of its own, `eval-best` or `eval-step-N`.
          overwrite: make answers again that are there already.
          base_on_host: the host keeps the base, and a device holds it once; False leaves it on the
            device, where several runs of a process share it.
          any_base: score an adapter that was trained on another base, too.
          **eval_options: other values of `config.eval`, such as max_new_tokens or metrics.

        Returns:
          One row per set and task: examples, each of `config.eval.metrics` and more, in percent.

        Raises:
          ConfigError, DataError, OSError: wrong input, before any compute.
          RunFailed: a fault while running.
        """
        config = self._with_eval(eval_options)
        self._check_base(adapter, any_base)
        sets = list(inputs.test_sets(config, sets))
        put = scoring.on_host if base_on_host else None
        folder.read_saved(self.workdir)
        with folder.owned(self.workdir, "scoring"):
            scoring.score(
                self.workdir,
                config,
                sets,
                adapter,
                checkpoint,
                say=self._say,
                put=put,
                overwrite=overwrite,
            )
        results = self.workdir / scoring.folder_name(adapter, checkpoint)
        return score_tables.score_frame(results, sets)

    def losses(
        self, adapter: str = "last", *, checkpoint: str = "last", any_base: bool = False
    ) -> losses.Losses:
        """The losses per token of a model: `.references(task set)` and `.text(text)`.

        Args:
          adapter, checkpoint, any_base: as for `score`.

        Returns:
          The model on this process's devices, as long as the object lives.

        Raises:
          ConfigError, DataError, OSError: wrong input.
        """
        self._check_base(adapter, any_base)
        self._check_same_run()
        return losses.load(self.workdir, self.config, adapter, checkpoint)

    def check(
        self,
        adapter: str = "last",
        prompts: int = 64,
        any_base: bool = False,
        **eval_options: object,
    ) -> bool:
        """Say what changes when answers and updates are batched otherwise.

        Args:
          adapter: as for `score`.
          prompts: how many are answered; a quarter as many examples are trained on.
          any_base, **eval_options: as for `score`.

        Returns:
          Whether no answer in float32 changes, and no update or sum by more than rounding.

        Raises:
          ConfigError, DataError, OSError: wrong input, before any compute.
        """
        self._check_base(adapter, any_base)
        self._check_same_run()
        given = self._with_eval(eval_options)
        return check.check(self.workdir, given, adapter, prompts, self._say)

    def weights(self, base: str | None = None) -> tuple[LlamaConfig, PyTree]:
        """The shape, and the weights with all that was trained in float32, adapters merged.

        Args:
          base: where the base lies; by default where the run found it.
        """
        config = self.config.replace(dtype="float32", **({"model": base} if base else {}))
        scored = scoring.load(self.workdir, config, "last")
        shape, params = scored.shape, scored.variables["params"]
        if "lora" in scored.variables:
            params = merge.merge(params, scored.variables["lora"])
            shape = merge.merged_config(shape, params)
        return shape, params

    def _check_base(self, adapter: str, any_base: bool) -> None:
        if adapter not in ("last", "none") and not any_base:
            wanted = peft.base_digest(adapter)
            origin.check_base(adapter, wanted, self.config.model, "--any_base")

    def _check_same_run(self) -> None:
        """Refuse another config or base than the run's; its data may be somewhere else by now."""
        digests = {"base_digest": inputs.base_digest(self.config.model)}
        folder.check_same_run(self.workdir, self.config, digests)

    def _with_eval(self, options: Mapping[str, object]) -> RunConfig:
        return self.config.replace(**{f"eval.{key}": value for key, value in options.items()})


def _summary(given: prepare.Inputs) -> str:
    """The parameters by module, and what will be trained on, in words."""
    parameters = given.parameters
    frozen, trainable = (int(parameters[k].to_numpy().sum()) for k in ("frozen", "trainable"))
    rows = [
        (r["module"], "×".join(map(str, r["shape"])), r["frozen"], r["trainable"])
        for r in parameters.to_dict("records")
    ]
    rows.append(("all", "", frozen, trainable))
    cut = sum(row.truncated for row in given.rows)
    return "\n".join(
        (
            table(("module", "shape", "frozen", "trainable"), rows),
            f"trainable {100 * trainable / (frozen + trainable):.3f}% of the parameters; "
            f"{given.taskset.name}: {len(given.taskset.tasks)} tasks, {len(given.rows)} examples, "
            f"{cut} inputs cut to fit; {given.total} steps of "
            f"{given.resolved.config.batch_size}",
        )
    )
