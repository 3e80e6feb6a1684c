"""What the scripts share: flags, one-line errors for wrong input, whole files, tables."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from jax_lora.data.cache import cache_folder
from jax_lora.weights.hf import read_json


@contextmanager
def input_errors() -> Iterator[None]:
    """Turn a ValueError or OSError of the enclosed block into one line and exit code 2.

    For the part of a program that reads and checks its input: what fails there is the user's to
    mend. For faults of the run itself see `running`.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        sys.stderr.write(f"error: {text}\n")
        raise SystemExit(2) from error


@contextmanager
def running(what_stays: Callable[[], str]) -> Iterator[None]:
    """Turn a fault of the enclosed run into one line and exit code 1.

    Args:
      what_stays: says what is safe and how to go on.
    """
    try:
        yield
    except (OSError, FloatingPointError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        sys.stderr.write(f"\nerror: {text}; {what_stays()}\n")
        raise SystemExit(1) from error


def keep_programs() -> None:
    """Keep what is compiled for the next process of this machine or of one like it.

    In a folder of the user's cache, unless JAX's own settings name another one.
    """
    import jax

    folder = cache_folder()
    if folder is None or jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    info = Path("/proc/cpuinfo")  # a program for a processor may not run on another one
    lines = info.read_text().splitlines() if info.is_file() else [platform.processor()]
    kind = "".join(sorted({x for x in lines if x.startswith(("model name", "flags"))}))
    programs = folder / f"programs-{zlib.crc32(kind.encode()):08x}"
    jax.config.update("jax_compilation_cache_dir", str(programs))


def keep_memory() -> None:
    """Keep the memory of one step for the next, on a CPU whose C library is glibc.

    XLA asks for the temporaries of every call anew. glibc would give back what is as large at
    once, and the kernel would clear every page of it again: a tenth of a step of SmolLM2. To be
    called before the first thread begins, since threads have heaps that cannot be so large.
    """
    if not hasattr(os, "confstr") or "glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""):
        return
    # From malloc.h: no mapping of its own for a large block, no trimming, one heap.
    for parameter, value in ((-4, 0), (-1, -1), (-8, 1)):
        ctypes.CDLL(None).mallopt(parameter, value)


@contextmanager
def all_or_nothing(folder: Path, mine: bool = True) -> Iterator[None]:
    """Remove a folder that the enclosed block made and could not fill (a full disk).

    `mine` is False where another process makes it.
    """
    there = folder.exists() or not mine
    try:
        yield
    except OSError:
        if not there:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def parse_flags(parser: Callable[[Sequence[str]], list[str]], argv: Sequence[str]) -> list[str]:
    """`parser(argv)`, where a wrong flag or config key is a line and exit code 2.

    absl's own way is a page of usage and exit code 1, and a config file may raise anything.
    """
    with input_errors():
        try:
            return parser(argv)
        except Exception as error:
            # A wrong key comes as the repr of a KeyError's text.
            text = str(error).strip("'\"").replace("\\'", "'").replace("\\n", "; ")
            if "Traceback" in text:  # ml_collections quotes a config file's own error with it
                text = text.strip().splitlines()[-1].partition(": ")[2]
            # It names the last part of a wrong key alone; the flag itself says where.
            at = [a for a in argv if a.startswith("--config.") and f"'{_last_key(a)}'" in text]
            raise ValueError(" ".join(["flags:", *at, text])) from None


def _last_key(flag: str) -> str:
    return flag.partition("=")[0].rpartition(".")[2]


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole: a reader finds the old one or the new one, a full disk neither."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    try:
        fresh.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(fresh, path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in plain text: the first column left, the others right, floats to one place."""

    def text(cell: Any) -> str:
        if cell is None:
            return "-"
        if isinstance(cell, float):
            return f"{cell:.1f}"
        return f"{cell:,}" if isinstance(cell, int) else str(cell)

    cells = [list(header), *([text(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def adapter_options(config: Any) -> dict[str, Any]:
    """What `jax_lora.inputs.new_adapters` is told."""
    c = config.lora
    return {
        "seed": config.seed,
        "rank": c.rank,
        "alpha": c.alpha_per_rank * c.rank,
        "targets": tuple(c.targets),
        "scaling": c.scaling,
        "init": c.init,
        "variant": c.variant,
    }


def data_options(config: Any) -> tuple[Any, ...]:
    """What `jax_lora.inputs.task_sets` is told."""
    d = config.data
    sizes = tuple(d.sizes)
    return d.path, d.categories, config.round, sizes, d.train_per_task, d.test_per_task


def encoder_options(config: Any) -> tuple[Any, ...]:
    """What `jax_lora.inputs.encoder` is told."""
    d = config.data
    return config.model, d.template, d.source_length, d.target_length


def check_same_run(path: Path, resolved: dict[str, Any]) -> None:
    """Raise ValueError where a run's config.json says another config or other data.

    The mesh may be another one: no result depends on it.
    """
    if not path.is_file():
        return
    here, there = (dict(_flat(one)) for one in (resolved, read_json(path)))
    # Of what only the file has, such as versions, the config's keys alone must be gone by mistake.
    gone = (key for key in there if key.startswith("config.") and "config" in resolved)
    for key in dict.fromkeys((*here, *gone)):
        found, wanted = (repr(one[key]) if key in one else "not set" for one in (there, here))
        if found != wanted and not key.startswith(("config.mesh.", "config.run.mesh.")):
            raise ValueError(
                f"{path} belongs to another run: {key} is {found} there and {wanted} here; "
                "expected the same config, or an empty --workdir"
            )


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, tree


def versions() -> dict[str, str]:
    """Versions of Python and of what decides the numbers."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
    return {"python": platform.python_version()} | {n: metadata.version(n) for n in names}


class MetricsLog:
    """`metrics.jsonl` and TensorBoard events of a run.

    Args:
      workdir: the run's folder.
      step: where the run goes on; lines of later steps, written before an interruption, go.
    """

    def __init__(self, workdir: Path, step: int):
        from tensorboardX import SummaryWriter

        path = workdir / "metrics.jsonl"
        fresh = path.with_name(path.name + ".new")
        with fresh.open("w", encoding="utf-8") as kept:
            if step and path.is_file():
                for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
                    if json.loads(line)["step"] <= step:
                        kept.write(line + "\n")
        os.replace(fresh, path)
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add a step."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Finish both files."""
        self._file.close()
        self._board.close()
