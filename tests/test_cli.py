"""What scripts share that their own tests do not show."""

import gc
import importlib
import os
import signal
import subprocess
import sys
from importlib import metadata

import jax
import pytest
from absl import flags

from jax_lora import cli, distributed, signals
from jax_lora.config import RunConfig
from jax_lora.errors import ConfigError, DataError, RunFailed, Stopped
from jax_lora.files import write_json
from jax_lora.run import folder
from tests.conftest import REPOSITORY


def test_programs_are_kept_in_the_users_cache_unless_jax_is_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_LORA_CACHE", str(tmp_path))
    name = "jax_compilation_cache_dir"
    before = jax.config.values[name]
    try:
        for given, expected in ((None, f"{tmp_path}/programs-"), ("elsewhere", "elsewhere")):
            jax.config.update(name, given)
            cli.keep_programs()
            assert jax.config.values[name].startswith(expected)
    finally:
        jax.config.update(name, before)


def test_a_folder_belongs_to_the_config_that_decides_its_results(tmp_path):
    config = RunConfig().replace(model="here/base", **{"data.path": "here/tasks"})
    digests = {"data_fingerprint": "d", "base_digest": "b"}
    write_json(tmp_path / "config.json", {"config": config.to_dict(), **digests, "versions": {}})
    same = {
        "model": "there/base",
        "data.path": "there/tasks",
        "micro_tokens": 64,
        "loss_chunk": 7,
        "remat": "none",
        "attention": "xla",
        "unroll": 3,
        "log_every": 5,
        "checkpoint_every": 6,
        "eval.max_new_tokens": 3,
        "mesh.fsdp": 2,
    }
    folder.check_same_run(tmp_path, config.replace(**same), digests)
    for changes, message in (
        ({"seed": 1}, "config.seed is 0 there and 1 here"),
        ({"lora.rank": 8}, "config.lora.rank is 16 there and 8 here"),
        ({"data.buckets": (64,)}, "config.data.buckets"),
        ({"optim.learning_rate": 1.0}, "config.optim.learning_rate"),
    ):
        with pytest.raises(ConfigError, match=message):
            folder.check_same_run(tmp_path, config.replace(**changes), digests)
    for name in digests:
        with pytest.raises(ConfigError, match=f"{name} is .* there and 'other' here"):
            folder.check_same_run(tmp_path, config, digests | {name: "other"})


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("config.x"), 2),
        (DataError("f.json"), 2),
        (FileNotFoundError(2, "no such file", "f.json"), 2),
        (RunFailed("disk"), 1),
        (Stopped("at 3"), 75),
    ],
)
def test_what_a_user_can_mend_is_one_line(error, code, capsys, monkeypatch):
    for setting, has_traceback in (("", False), ("1", True)):
        monkeypatch.setenv("JAX_LORA_TRACEBACK", setting)
        with pytest.raises(SystemExit) as end, cli.exit_codes():
            raise error
        text = capsys.readouterr().err
        assert end.value.code == code
        assert ("Traceback" in text) == has_traceback
        words = "f.json: no such file" if isinstance(error, OSError) else str(error)
        assert text.splitlines()[-1].endswith(words)


@pytest.mark.parametrize(
    "error",
    [ValueError("shapes (2, 3) and (4, 5)"), KeyError("x"), OSError("no path"), IndexError()],
)
def test_a_fault_of_ours_passes_through(error):
    with pytest.raises(type(error)) as found, cli.exit_codes():
        raise error
    assert found.value is error


def test_memory_is_kept_where_only_a_cpu_computes(monkeypatch):
    before = jax.config.values["jax_platforms"]
    try:
        jax.config.update("jax_platforms", "cpu")
        assert cli.only_cpu()
        jax.config.update("jax_platforms", "cuda,cpu")
        assert not cli.only_cpu()
        jax.config.update("jax_platforms", None)
        assert cli.only_cpu()  # none of the test environment's packages is a plugin
        plugin = metadata.EntryPoint("cuda", "x", "jax_plugins")
        monkeypatch.setattr(metadata, "entry_points", lambda group: [plugin])
        assert not cli.only_cpu()
    finally:
        jax.config.update("jax_platforms", before)


def test_xla_flags_of_the_user_are_left(monkeypatch):
    monkeypatch.setattr(cli, "only_cpu", lambda: True)
    for before, after in (("", ""), ("--xla_cpu_max_isa=AVX2", "--xla_cpu_max_isa=AVX2")):
        monkeypatch.setenv("XLA_FLAGS", before)
        cli.set_xla_flags()
        assert os.environ["XLA_FLAGS"] == after
    monkeypatch.delenv("XLA_FLAGS")
    for version in ("0.9.2", "0.13.0"):  # XLA aborts at a flag that it does not know
        monkeypatch.setattr(cli.metadata, "version", lambda _, version=version: version)
        cli.set_xla_flags()
        assert "XLA_FLAGS" not in os.environ


def test_imports_collect_no_garbage_and_leave_collections_on(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name, text in (("whole", "import gc\nis_on = gc.isenabled()\n"), ("broken", "1 / 0\n")):
        (tmp_path / f"imported_{name}.py").write_text(text)
    with cli.fast_imports():
        whole = importlib.import_module("imported_whole")
    assert not whole.is_on and gc.isenabled()
    with pytest.raises(ZeroDivisionError), cli.fast_imports():
        importlib.import_module("imported_broken")
    assert gc.isenabled()
    frozen = gc.get_freeze_count()
    with cli.fast_imports():
        importlib.import_module("imported_whole")
    assert gc.get_freeze_count() == frozen > 0  # what a caller has made since may become garbage


# ---------------------------------------------------------------- stops

STOPPED = """
import os, signal, sys, threading
from jax_lora import cli, signals
signals.PATIENCE = 0.5
signals.stop_on_signals()
def ask(): os.kill(os.getpid(), getattr(signal, sys.argv[1]))
{body}
"""
BODIES = {
    "anywhere": "try:\n    ask()\nfinally:\n    print('cleaned up')",
    "swallowed": "try:\n    ask()\nexcept BaseException:\n    threading.Event().wait()",
    "waits for a thread": "threading.Thread(target=threading.Event().wait).start()\nask()",
    "before the first step": "with cli.StopRequest():\n    ask()",
    "twice": "with cli.StopRequest() as stop:\n    stop()\n    ask()\n    assert stop()\n    ask()",
    "at the end": "import atexit\natexit.register(os.abort)\nask()",  # as a library might crash
    "in a handler": "with cli.exit_codes():\n    try:\n        ask()\n    finally:\n        ask()",
}


@pytest.mark.parametrize("name", [number.name for number in signals.STOPS])
@pytest.mark.parametrize("body", BODIES)
def test_a_stop_is_a_line_and_an_exit_code(name, body):
    program = STOPPED.format(body=BODIES[body])
    done = subprocess.run(
        [sys.executable, "-c", program, name], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.returncode == 75, done.stderr
    assert done.stderr == f"\nstopped by {name}; rerun the same command to resume\n"
    assert done.stdout == ("cleaned up\n" if body == "anywhere" else "")


LAST = """
class Last:
    def __del__(self, os=os, number=getattr(signal, sys.argv[1])):
        os.write(1, b"taken down")
        os.kill(os.getpid(), number)
last = Last()
"""


@pytest.mark.parametrize("name", [number.name for number in signals.STOPS])
def test_a_stop_while_python_takes_itself_down_is_no_failure(name):
    program = STOPPED.format(body=LAST)
    done = subprocess.run(
        [sys.executable, "-c", program, name],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "taken down", "")


def test_the_loop_is_asked_to_stop_and_processes_that_train_together_always(monkeypatch):
    before = [signal.getsignal(number) for number in signals.STOPS]
    for store in (None, object()):
        monkeypatch.setattr(distributed, "key_value_store", lambda store=store: store)
        for number in signals.STOPS:
            with cli.StopRequest() as stop:
                assert store or not stop()
                os.kill(os.getpid(), number)
                assert stop() and stop.asked
    assert [signal.getsignal(number) for number in signals.STOPS] == before


@pytest.mark.parametrize("number", signals.STOPS)
def test_a_stop_after_the_last_question_is_not_lost_on_a_script_that_goes_on(number):
    with cli.StopRequest() as stop:  # one that ends here has done all of its work
        stop()
        os.kill(os.getpid(), number)
    with pytest.raises(Stopped, match="rerun"), cli.StopRequest(goes_on=True) as stop:
        stop()
        os.kill(os.getpid(), number)
    with pytest.raises(ZeroDivisionError), cli.StopRequest(goes_on=True) as stop:
        stop()
        os.kill(os.getpid(), number)
        raise ZeroDivisionError


def test_a_signal_that_is_ignored_stays_so():
    program = STOPPED.format(body="ask()\nprint('goes on')")
    done = subprocess.run(
        ["nohup", sys.executable, "-c", program, "SIGHUP"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert (done.returncode, done.stdout) == (0, "goes on\n")


def test_a_flag_that_a_mode_does_not_read_is_refused():
    given = flags.FlagValues()
    for name in ("checkpoint", "sets"):
        flags.DEFINE_string(name, "last", "", flag_values=given)
    given(["eval.py", "--checkpoint=last"])
    cli.refuse_unread(given, "--check", "sets")
    with pytest.raises(ConfigError, match="--checkpoint: found with --check, which does not read"):
        cli.refuse_unread(given, "--check", "sets", "checkpoint")


def test_a_tuple_that_is_given_twice_is_refused_as_it_would_be_joined(capsys):
    once = ["train.py", "--config.data.buckets=(384,)", "--config.eval.buckets=(384,)"]
    assert cli.parse_flags(lambda argv: argv[:1], [*once, "--config.seed=1", "--config.seed=2"])
    with pytest.raises(SystemExit) as end:
        cli.parse_flags(list, [*once, "--config.data.buckets=(512,)"])
    found = "error: flags: --config.data.buckets: found 2 times, expected once\n"
    assert end.value.code == 2 and capsys.readouterr().err == found
