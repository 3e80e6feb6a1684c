"""benchmarks/run.py at its smallest: what it counts and compares, never how fast it was."""

import json
import math
import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest

from benchmarks import curves, decoding, epoch, parts, report, run, work
from jax_lora.data.toy import write_checkout
from jax_lora.model.arch import ATTENTION, LINEAR_NAMES
from jax_lora.model.families import CONFIGS

slow = pytest.mark.slow  # the fixture takes half a minute
TINY = ["--size=tiny", "--ranks=2", "--loss=answer", "--repeats=1", "--examples=12"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    run.main([*TINY, f"--out={folder}"])
    return json.loads((folder / "results.json").read_text()), (folder / "results.md").read_text()


@slow
def test_every_part_has_results_and_a_table(found):
    records, text = found
    for part in ("products", "step", "epoch", "startup", "curves"):
        assert records[part] and f"## {report.TITLES[part]}\n" in text
    assert {"jax", "flax", "optax"} <= records["versions"].keys()
    assert " ".join(TINY) in records["command"] and records["command"] in text


@slow
def test_a_step_is_its_tokens_in_its_seconds(found):
    (record,) = found[0]["step"]
    ours = record["ours"]
    assert ours["tokens_per_second"] * ours["seconds"] == pytest.approx(2 * 32)
    assert ours["losses"] == sorted(ours["losses"], reverse=True)  # it trains, on one batch
    assert ours["losses"][0] == pytest.approx(math.log(512), abs=0.3)


@slow
def test_padding_of_an_epoch_is_counted(found):
    rows, _ = work.task_rows(work.case(), 12)
    real = sum(len(row.ids) for row in rows)
    for record, (buckets, _) in zip(found[0]["epoch"], epoch.OURS.values(), strict=True):
        assert record["real_tokens"] == real <= record["computed_tokens"]
        assert record["computed_tokens"] % math.gcd(*buckets) == 0
        assert record["padding"] == pytest.approx(1 - real / record["computed_tokens"])
        assert record["real_tokens_per_second"] * record["seconds"] == pytest.approx(real)


@slow
def test_a_fresh_process_is_timed_from_its_start(found):
    (record,) = found[0]["startup"]
    parts_of_it = (record[f"{name}_seconds"] for name in ("import", "build", "first"))
    assert record["start_seconds"] == pytest.approx(sum(parts_of_it))
    assert record["peak_bytes"] > 50e6  # JAX alone is more


@slow
def test_curves_change_one_size_at_a_time(found):
    axes = {record["axis"] for record in found[0]["curves"]}
    assert axes == {*curves.VALUES["tiny"], "examples"}
    packed = found[0]["curves"][-1]  # 200 made-up rows, in rows of 384
    computed = packed["tokens_per_second"] * packed["seconds"] / (1 - packed["padding"])
    assert 0 <= packed["padding"] and computed / 384 == pytest.approx(round(computed / 384))


def test_an_interruption_loses_nothing(tmp_path, monkeypatch):
    def broken(flags, sides):
        yield {"ratio": 2.0, "theirs": {"peak_bytes": 3 * 10**9}}
        raise KeyboardInterrupt

    monkeypatch.setitem(run.PARTS, "step", broken)
    monkeypatch.setattr(parts, "device", lambda: "a device")
    monkeypatch.setattr(parts, "products", lambda *_: {"ours": {"operations_per_second": 1.0}})
    with pytest.raises(KeyboardInterrupt):
        run.main([*TINY, "--parts=step", f"--out={tmp_path}"])
    (record,) = json.loads((tmp_path / "results.json").read_text())["step"]
    assert record["ratio"] == 2.0
    assert "| 2 | 3.00 GB |" in (tmp_path / "results.md").read_text()


def test_what_all_rows_share_stands_above_the_table():
    text = report.table([{"rank": None, "rows": 8, "all_seconds": [1]}, {"rank": 4, "rows": 8}])
    assert text == "rows 8\n\n| rank |\n| ---: |\n| full |\n| 4 |\n"


@pytest.mark.parametrize(
    "flag", ["--ranks=many", "--shapes=8", "--parts=steps", "--shapes=0x4", "--batches=x"]
)
def test_a_wrong_flag_is_named(flag, capsys):
    with pytest.raises(SystemExit) as end:
        run.parse([*TINY, flag])
    assert end.value.code == 2
    name, _, value = flag.partition("=")
    assert f"error: {name}: found {value!r}, expected" in capsys.readouterr().err


def test_the_mix_has_as_many_prompts_as_asked_for(tmp_path):
    data, tokenizer = write_checkout(tmp_path), work.Words(512)
    some = decoding.mix(tokenizer, data, per_task=2, new_tokens=4)
    fewer = decoding.mix(tokenizer, data, per_task=2, new_tokens=4, prompts=3)
    assert len(some.prompts) == 2 * len(set(some.tasks)) > 3
    assert (fewer.prompts, fewer.tasks) == (some.prompts[:3], some.tasks[:3])


@pytest.mark.parametrize("size", ["tiny", "7b"])
def test_the_script_for_cards_asks_for_what_there_is(size, tmp_path):
    log, python = tmp_path / "commands", tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$*" >>{log}\n')
    python.chmod(0o755)
    parts = ["ranks", "large", "llama3", "mix", "study", "options", "decode", "large_batch"]
    for chosen in ([], parts[5:]):
        subprocess.run(
            ["bash", "benchmarks/gpu.sh", *chosen],
            cwd=work.REPOSITORY,
            env=os.environ | {"PYTHON": str(python), "SIZE": size, "OUT": str(tmp_path)},
            check=True,
        )
    commands = [line.split() for line in log.read_text().splitlines()]
    studies = [command for command in commands if "study.py" in command]
    rounds = [0] if size == "tiny" else [0, 1, 2]
    assert [command[-3:] for command in studies] == [
        ["--only=round", "==", f"{number}"] for number in rounds
    ]
    commands = [command for command in commands if command not in studies[1:]]
    assert [re.search(rf"{tmp_path}/(\w+)", " ".join(c))[1] for c in commands] == parts  # pyright: ignore
    asked = {
        part: run.parse(command[1:])
        for part, command in zip(parts, commands, strict=True)
        if command[0] == "benchmarks/run.py"
    }
    assert len(asked) == 6 and all(flags.isolate for flags in asked.values())
    if size == "7b":
        assert [case.rank for case in asked["ranks"].cases] == [8, 512, 2048, 4096]
        assert {(case.rows, case.length) for case in asked["ranks"].cases} == {(4, 2048)}
        assert None in [case.rank for case in asked["large"].cases]
        llama3 = asked["llama3"].cases[0]
        assert llama3.shape == CONFIGS["llama-3-8b"] and llama3.config.lora.targets == LINEAR_NAMES
        assert (llama3.rank, llama3.rows, llama3.length) == (16, 2, 4096)
        assert llama3.config.lora.dropout == 0.1


PRETENDS = """#!/bin/sh
# Writes down what it was asked, and leaves what a study that was stopped leaves.
echo "$*" >>{log}
case $* in *--report*) exit 0 ;; esac
mkdir -p {out}/study/cells/a/checkpoints/3 {out}/study/cells/b
echo big >{out}/study/cells/a/checkpoints/3/state
echo done >{out}/study/cells/b/done.json
echo results >{out}/study/results.parquet
exit 75
"""


def test_a_study_goes_to_a_machine_in_parts_and_back_to_the_next_one(tmp_path):
    """Packed here; unpacked, stopped and packed up there; gone on with on a third machine."""
    data, model = tmp_path / "niv2", tmp_path / "base.gguf"
    (data / "tasks").mkdir(parents=True)
    (data / "tasks" / "task1.json").write_text("{}")
    model.write_bytes(bytes(range(251)) * 11)
    carried = tmp_path / "carried"
    settings = {"PACKED": str(carried), "DATA": str(data), "MODEL": str(model)}

    def on_machine(name: str, *parts: str) -> str:
        out, log, python = (tmp_path / name / x for x in ("out", "log", "python"))
        out.parent.mkdir()
        python.write_text(PRETENDS.format(log=log, out=out))
        python.chmod(0o755)
        changes = settings | {"PYTHON": str(python), "OUT": str(out), "STUDY": "--config.x=1"}
        subprocess.run(
            ["bash", "benchmarks/gpu.sh", *parts],
            cwd=work.REPOSITORY,
            env=os.environ | changes,
            check=True,
        )
        return log.read_text() if log.exists() else ""

    on_machine("here", "pack")
    assert sorted(path.name for path in carried.iterdir()) == ["base.aa", "base.ab", "niv2.tar.xz"]
    sizes = [(carried / f"base.a{x}").stat().st_size for x in "ab"]
    assert sum(sizes) == model.stat().st_size and max(sizes) - min(sizes) <= 1

    settings |= {"DATA": str(tmp_path / "none"), "MODEL": str(tmp_path / "there" / "base.gguf")}
    asked = on_machine("first", "study").splitlines()
    there = f"model={settings['MODEL']},data={carried / 'niv2'}"
    assert [line.partition("--only=")[2] for line in asked] == [
        *(f"round == {i} --config.x=1" for i in range(3)), "",
    ]  # fmt: skip
    assert all(f"study_smollm2.py:{there} " in line for line in asked[:3])
    assert Path(settings["MODEL"]).read_bytes() == model.read_bytes()
    assert (carried / "niv2" / "tasks" / "task1.json").read_text() == "{}"

    shutil.copy(tmp_path / "first" / "out" / "study.tar.xz", carried)
    settings["ROUNDS"] = "1"
    assert on_machine("second", "study").count("--only=round == 1") == 1
    study = tmp_path / "second" / "out" / "study"
    assert (study / "cells" / "b" / "done.json").read_text() == "done\n"
    with tarfile.open(carried / "study.tar.xz") as packed:  # what the second machine began with
        names = packed.getnames()
    assert "study/cells/b/done.json" in names and not any("checkpoints" in n for n in names)
    settings["LIMIT"] = "30"  # no time for a cell and a report
    assert "--only" not in on_machine("third", "study")


# ---------------------------------------------------------------- beside the peer


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("rank", "targets"), [(2, ATTENTION), (2, LINEAR_NAMES), (None, ATTENTION)]
)
def test_both_sides_do_the_same_work(rank, targets):
    pytest.importorskip("peft")
    from benchmarks import measure

    case = work.case(rank=rank, rows=2, length=16, **{"lora.targets": targets})
    both = measure.together(case, ["ours", "theirs"], 1)
    ours, theirs = (both[side]["answers"] for side in ("ours", "theirs"))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert ours[2] < ours[0]


@pytest.mark.parity
@pytest.mark.parametrize("grouped", [False, True])
def test_their_batches_hold_every_row_once(grouped):
    pytest.importorskip("peft")
    from benchmarks import theirs

    rows, _ = work.task_rows(work.case(), 20)
    batches = list(theirs.batches(rows, 8, 4, grouped=grouped, answer_only=True))
    micros = [micro for batch in batches for micro in batch]
    assert [len(batch) for batch in batches] == [2, 2, 1]
    held = [m.tokens[i][m.real[i] == 1].tolist() for m in micros for i in range(len(m.tokens))]
    assert sorted(held) == sorted(row.ids.tolist() for row in rows)
    assert all(micro.real.sum(1).max() == micro.tokens.shape[1] for micro in micros)
    loss_tokens = sum(int((micro.labels != theirs.IGNORED).sum()) for micro in micros)
    assert loss_tokens == sum(len(row.ids) - row.prompt_length for row in rows)
