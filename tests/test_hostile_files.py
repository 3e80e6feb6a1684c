"""Files that mean harm: no code of theirs runs, and nothing of theirs reaches a terminal or a shell
as anything but text. What they may not name or claim is in the table of bad_inputs."""

import ast
import io
import logging
import subprocess
from pathlib import Path

import pytest

from jax_lora import cli
from jax_lora.errors import ConfigError, DataError
from jax_lora.study import slurm, view
from jax_lora.text import printable
from tests.conftest import REPOSITORY

# Calls that can run what a file says, whatever their arguments.
RUNS_CODE = ("eval", "exec", "compile", "pickle.load", "pickle.loads", "torch.load", "yaml.load")
RUNS_CODE += ("joblib.load", "dill.load", "marshal.loads", "os.system", "shelve.open")


def dangers(source: str) -> list[str]:
    """The calls of a file that could run what another file says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name, values = ast.unparse(node.func), {k.arg: k.value for k in node.keywords}
        said = {key: ast.unparse(value) for key, value in values.items()}
        if name.rpartition(".")[2] in ("from_pretrained", "from_config", "pipeline"):
            if said.get("trust_remote_code") != "False":
                found.append(f"line {node.lineno}: {name} without trust_remote_code=False")
        elif "trust_remote_code" in said or said.get("allow_pickle", "False") != "False":
            found.append(f"line {node.lineno}: {name}")
        elif name in RUNS_CODE or said.get("shell", "False") != "False":
            found.append(f"line {node.lineno}: {name}")
    return found


def test_no_call_can_run_the_code_of_a_file():
    command = ["git", "ls-files", "--", "jax_lora", "*.py", "benchmarks", "configs"]
    listed = subprocess.check_output(command, cwd=REPOSITORY, text=True).splitlines()
    files = {p for p in listed if p.endswith(".py") and not p.startswith("tests/")}
    assert "jax_lora/weights/tokenizers.py" in files and "train.py" in files
    found = {path: dangers((REPOSITORY / path).read_text("utf-8")) for path in sorted(files)}
    assert not {path: lines for path, lines in found.items() if lines}


@pytest.mark.parametrize(
    "call",
    [
        "AutoTokenizer.from_pretrained(path)",
        "AutoTokenizer.from_pretrained(path, trust_remote_code=True)",
        "AutoConfig.from_pretrained(path, trust_remote_code=trust)",
        "load_dataset(path, trust_remote_code=True)",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
        "pickle.load(file)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_the_rule_sees_what_it_should(call):
    assert len(dangers(call)) == 1


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;title\x07\x1b[2J", r"\x1b]0;title\x07\x1b[2J"),
        ("a\rb\x08\x7f\x9b1m", r"a\rb\x08\x7f\x9b1m"),
        ("\u202egnp.exe\u2066", r"\u202egnp.exe\u2066"),
        ("\ud800", r"\ud800"),
        ("two\nlines\tand é × 日本", "two\nlines\tand é × 日本"),
    ],
)
def test_control_characters_become_escapes(text, shown):
    assert printable(text) == shown


def test_nothing_that_the_scripts_show_moves_the_cursor(capsys):
    title = "\x1b]0;owned\x07"
    with pytest.raises(SystemExit), cli.exit_codes():
        raise DataError(f"a {title} file")
    with pytest.raises(SystemExit), cli.exit_codes():
        raise FileNotFoundError(2, f"no {title}", f"a{title}b")
    cli.say(f"a {title} table")
    logger = logging.getLogger("jax_lora")
    before = logger.handlers, logger.propagate, logger.level
    others = [(logging.getLogger(name), logging.getLogger(name).level) for name in (None, "absl")]
    try:
        cli.log_progress()
        logger.warning("%s", f"a {title} task")
    finally:
        logger.handlers, logger.propagate = before[:2]
        logger.setLevel(before[2])
        for one, level in others:
            one.setLevel(level)
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err and "\x07" not in out + err
    assert (out + err).count(r"\x1b]0;owned\x07") >= 4


def test_a_view_shows_what_failed_as_text():
    drawn = view.draw("head", [("a", "failed", "\x1b[2Jwhy")], "now\x1b[2J", 80, 24)
    assert not [line for line in drawn if "\x1b[2J" in line]


@pytest.mark.parametrize("name", ["a\n#SBATCH --wrap=x", "a\rb", "a\0b"])
def test_no_name_becomes_a_line_of_a_batch_script(name):
    good = ["python", "study.py"], 1, ["--gres=gpu:1"], Path("s")
    for bad in (
        (["python", f"--workdir={name}"], 1, [], Path("s")),
        (["python"], 1, [f"--comment={name}"], Path("s")),
        (["python"], 1, [], Path(name)),
    ):
        with pytest.raises(ConfigError, match="--launcher: found .* of one line"):
            slurm.script(*bad)
    assert len(slurm.script(*good).splitlines()) == 7


def test_what_is_printed_is_flushed_and_ends_a_line(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr("sys.stdout", stream)
    cli.say("a")
    assert stream.getvalue() == "a\n"
