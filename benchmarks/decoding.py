"""Greedy answers per second: ours, and transformers' generate on the same prompts and weights.

    python benchmarks/decoding.py --peer=hf

The prompts are those of the test tasks of ../shared/data/niv2-slice, through the project's own
reader and template; an answer ends where the model ends it. (`run.py --parts=decode` measures
prompts of one length whose answers never end early.) The peer answers its batches sorted by
length, padded on the left, with its cache and sdpa attention. Sides take turns; the first call of
each, which compiles, does not count. With --isolate each has its own process: on a CPU threads of
torch that wait for work would slow ours.
Results are in FOLDER/decoding.json and, as a table, in FOLDER/decoding.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_lora import cli
from jax_lora.data.instructions import read_checkout
from jax_lora.data.prompts import Encoder
from jax_lora.generation import greedy, scheduler
from jax_lora.model.transformer import Llama
from jax_lora.weights import base as base_weights
from jax_lora.weights.tokenizers import load_tokenizer

REPOSITORY = Path(__file__).resolve().parents[1]
Answers = list[list[int]]


@dataclass(frozen=True)
class Work:
    """Prompts, the task of each, and what ends an answer: `new_tokens`, and the id `end`."""

    name: str
    prompts: list[list[int]]
    tasks: list[str]
    new_tokens: int
    end: int


Side = Callable[[Work], Answers]


def mix(
    tokenizer: Any, data: Path, per_task: int, new_tokens: int, prompts: int | None = None
) -> Work:
    """Prompts of the test tasks, `per_task` of each, no more than `prompts` in all."""
    encoder, asked = Encoder(tokenizer), []
    for task in read_checkout(data).test:
        for instance in task.instances()[:per_task]:
            asked.append((task.name, encoder.prompt_row(task.example(instance)).ids.tolist()))
    tasks, rows = map(list, zip(*asked[:prompts], strict=True))
    name = f"{len(set(tasks))} tasks, {len(tasks)} prompts"
    return Work(name, rows, tasks, new_tokens, tokenizer.eos_token_id)


# ------------------------------------------------------------------ the two sides


def our_side(model: str, dtype: str, batch: int, buckets: tuple[int, ...]):
    """Answers as eval.py makes them."""
    config, base = base_weights.load(model, dtype)
    module, weights = Llama(config, dtype=jnp.dtype(dtype)), greedy.unstack_layers({"params": base})

    def answer(work: Work) -> Answers:
        one = partial(
            scheduler.answers,
            module,
            weights,
            max_new_tokens=work.new_tokens,
            end_ids=(work.end,),
            buckets=buckets,
            batch_tokens=batch * max(buckets),
            max_batch=batch,
        )
        ended = scheduler.round_robin(scheduler.batches(one))(work.prompts, work.tasks)
        ids = dict(itertools.chain.from_iterable(ended))
        return [ids[i].tolist() for i in range(len(work.prompts))]

    return answer


def their_side(model: str, dtype: str, batch: int) -> Side:
    """Answers of transformers' generate."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers

    folder, file = (model, None) if Path(model).is_dir() else os.path.split(model)
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=file,
        dtype=getattr(torch, dtype),
        attn_implementation="sdpa",
        trust_remote_code=False,
    ).eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    peer.to(device)

    @torch.inference_mode()
    def answer(work: Work) -> Answers:
        lengths = np.asarray([len(prompt) for prompt in work.prompts])
        order = np.argsort(-lengths, kind="stable").tolist()
        answers: dict[int, list[int]] = {}
        for some in (order[i : i + batch] for i in range(0, len(order), batch)):
            width = lengths[some[0]]
            ids, mask = np.zeros((2, len(some), width), np.int64)
            for row, i in enumerate(some):
                ids[row, width - lengths[i] :] = work.prompts[i]
                mask[row, width - lengths[i] :] = 1
            found = peer.generate(
                torch.from_numpy(ids).to(device),
                attention_mask=torch.from_numpy(mask).to(device),
                generation_config=transformers.GenerationConfig(
                    do_sample=False,
                    max_new_tokens=work.new_tokens,
                    eos_token_id=work.end,
                    pad_token_id=0,
                ),
            )
            for i, new in zip(some, found[:, width:].tolist(), strict=True):
                answers[i] = new[: new.index(work.end) + 1] if work.end in new else new
        return [answers[i] for i in range(len(order))]

    return answer


_side: Side  # of a process that `isolated` started


def isolated(make: Callable[..., Side], *args: Any) -> Side:
    """The side `make(*args)`, in its own process."""
    pool = ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(make, *args)
    )
    return lambda work: pool.submit(_answer, work).result()


def _begin(make: Callable[..., Side], *args: Any) -> None:
    global _side
    cli.keep_memory()
    _side = make(*args)


def _answer(work: Work) -> Answers:
    return _side(work)


# ------------------------------------------------------------------ the stopwatch


def measure(
    sides: dict[str, Side],
    work: Work,
    repeats: int,
    reference: Side | None = None,
) -> dict:
    """Seconds of every side and call, in turn, and whether the answers are the same.

    With a reference, also how many answers of each side equal its.
    """
    answers: dict[str, Answers] = {}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _, (side, answer) in itertools.product(range(1 + repeats), sides.items()):
        start = time.perf_counter()
        answers[side] = answer(work)
        seconds[side].append(time.perf_counter() - start)
    record: dict[str, Any] = {
        "work": work.name,
        "most_new_tokens": work.new_tokens,
        "prompt_tokens": sum(map(len, work.prompts)),
        "new_tokens": sum(map(len, answers["ours"])),
    }
    for side, took in seconds.items():
        record[side] = {"first": took[0], "all": took[1:], "median": float(np.median(took[1:]))}
    if "theirs" in sides:
        record["ratio"] = record["theirs"]["median"] / record["ours"]["median"]
        pairs = zip(answers["ours"], answers["theirs"], strict=True)
        record["same_answers"] = sum(a == b for a, b in pairs)
        record["answers"] = len(work.prompts)
    if reference:
        right = reference(work)
        record["same_as_float32"] = {
            side: sum(a == b for a, b in zip(found, right, strict=True))
            for side, found in answers.items()
        }
    return record


def table(records: Sequence[dict]) -> str:
    """The records as a Markdown table, seconds being medians."""
    rows = [
        "| work | most new tokens | ours | theirs | ratio | same answers | as in float32: ours "
        "| theirs |",
        "|---|" + "--:|" * 7,
    ]
    for r in records:
        cells = [r["work"], r["most_new_tokens"], f"{r['ours']['median']:.1f} s"]
        if "theirs" in r:
            cells += [f"{r['theirs']['median']:.1f} s", f"**{r['ratio']:.2f}**"]
            cells += [f"{r['same_answers']} of {r['answers']}"]
            cells += [r.get("same_as_float32", {}).get(side, "") for side in ("ours", "theirs")]
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(rows) + "\n"


def main(argv: Sequence[str]) -> None:
    """Measure what the flags say."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    flag("--peer", choices=("none", "hf"), default="none")
    flag("--model", default=str(REPOSITORY / ".cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"))
    flag("--data", type=Path, default=REPOSITORY.parent / "shared" / "data" / "niv2-slice")
    flag("--dtype", default="float32", choices=("float32", "bfloat16"))
    flag("--batch", type=int, default=32, help="rows, of both sides")
    flag("--buckets", default="128,256,384,512,768,1024", help="prompt lengths; ours")
    flag("--per-task", type=int, default=20, help="prompts of a task")
    flag("--prompts", type=int, help="most in all")
    flag("--new-tokens", default="64,128", help="most of an answer")
    flag("--repeats", type=int, default=3, help="calls that count, behind one that does not")
    flag("--isolate", action="store_true", help="each side in its own process")
    flag("--out", type=Path, default=REPOSITORY / "runs" / "benchmark")
    flags = parser.parse_args(argv)

    cli.set_xla_flags()
    cli.keep_memory()  # as eval.py does; the peer gains as much
    buckets = tuple(map(int, flags.buckets.split(",")))

    def side(make: Callable[..., Side], *more: Any) -> Side:
        settings = (flags.model, flags.dtype, flags.batch, *more)
        return isolated(make, *settings) if flags.isolate else make(*settings)

    sides = {"ours": side(our_side, buckets)}
    if flags.peer == "hf":
        sides["theirs"] = side(their_side)
    reference = None
    if flags.dtype != "float32":
        reference = our_side(flags.model, "float32", flags.batch, buckets)
    tokenizer = load_tokenizer(flags.model)
    works = [
        mix(tokenizer, flags.data, flags.per_task, new_tokens, flags.prompts)
        for new_tokens in map(int, flags.new_tokens.split(","))
    ]
    machine = f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {platform.machine()}"
    setting = {"command": ["python", "benchmarks/decoding.py", *argv], "machine": machine}
    setting |= {"dtype": flags.dtype, "batch": flags.batch, "works": []}
    flags.out.mkdir(parents=True, exist_ok=True)
    for work in works:
        setting["works"].append(measure(sides, work, flags.repeats, reference))
        (flags.out / "decoding.json").write_text(json.dumps(setting, indent=1) + "\n")
        (flags.out / "decoding.md").write_text(table(setting["works"]))
        print(table(setting["works"][-1:]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
