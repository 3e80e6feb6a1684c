"""Fixtures shared by the suite."""

import atexit
import fcntl
import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

from jax_lora import signals
from tests.exactness import Ledger

REPOSITORY = Path(__file__).resolve().parents[1]

# What several tests, their scripts and the other worker compile alike is compiled once.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _programs = tempfile.mkdtemp(prefix="jax_lora-tests-")
    atexit.register(shutil.rmtree, _programs, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# Annotations of shapes execute: a module that has some checks what its functions get and return.
install_import_hook(
    [
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
        for path in (REPOSITORY / "jax_lora").rglob("*.py")
        if "from jaxtyping import" in path.read_text(encoding="utf-8")
    ],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",  # 1 is a float too
)

# Tracing makes many objects and hardly any garbage: a look for it now and then is enough.
gc.set_threshold(100_000, 20, 100)

# A script's job in the background ignores SIGINT, one under nohup SIGHUP, and what they start does.
for _number in set(signals.STOPS) - set(signals.heeded()):
    signal.signal(_number, signal.SIG_DFL)

# Code for a core that compiles faster, by a quarter; later versions do not know the flag and abort.
_jaxlib = tuple(map(int, version("jaxlib").split(".")[:2]))
HURRY = "--xla_cpu_use_fusion_emitters=false" if _jaxlib < (0, 11) else ""
# Scripts leave flags that are set: what runs here and in processes of their own is equal.
os.environ.setdefault("XLA_FLAGS", HURRY if "JAX_DISABLE_MOST_OPTIMIZATIONS" in os.environ else "")


LEDGER = pytest.StashKey[Ledger]()
# Files of minutes. They begin first, or one worker would be at the last of them alone.
LONG = (
    "test_reliability.py",
    "test_killed_runs.py",
    "test_many_devices.py",
    "test_train_on_many.py",
    "test_study.py",
    "test_transformers.py",
    "test_peft_training.py",
    "test_scripts.py",
    "test_step.py",
    "test_bfloat16.py",
    "test_benchmarks.py",
    "test_wheel.py",
)


@pytest.fixture(scope="module", autouse=True)
def _programs_of_one_file():
    """A worker holds the compiled programs of one file. Those of all would fill its memory and,
    on Linux, the number of maps that a process may have, at which XLA dies."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the repository; what needs it skips where it is missing."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip("the folder ../shared with real data is not here")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """A real GGUF file: JAX_LORA_SMOLLM2 names it, or it lies in the repository's .cache."""
    default = REPOSITORY / ".cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    path = Path(os.environ.get("JAX_LORA_SMOLLM2", default))
    if not path.is_file():
        pytest.skip(f"no SmolLM2 GGUF: set JAX_LORA_SMOLLM2 or put it at {default}")
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A GGUF file of a random two-layer LLaMA with a byte-level vocabulary."""
    from tests.weights import builders

    vocabulary = builders.tiny_bpe("gpt-2")
    weights = builders.hf_weights(len(vocabulary["tokens"]))
    small = {k: v if v.ndim == 1 else 0.1 * v for k, v in weights.items()}
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    builders.write_gguf(path, small, tokenizer=vocabulary)
    return path


# The smoke study at a third of its cells, behind a base that hardly trained.
SMOKE = [
    f"--config={REPOSITORY}/configs/study_smoke.py",
    "--config.toy.run.epochs=1",
    "--config.ranks=(2,'full')",
    "--config.sets=('T2',)",
]


def many_cpus(count: int) -> dict[str, str]:
    """The environment in which a process takes the CPU for `count` devices."""
    flags = (
        f"--xla_force_host_platform_device_count={count}",
        # Less optimisation of the code for a core, which makes compiling the larger part cheaper.
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        HURRY,
        "--xla_cpu_experimental_ynn_fusion_type=-reduce",  # see `cli.set_xla_flags`
    )
    # A device that waits in a collective keeps a thread, a device may wait in several at once, and
    # of a pool of a thread a device (or a core) none may be left to bring in the last: XLA then
    # gives up after 40 s. NPROC is the size of its pool.
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags), "NPROC": str(16 * count)}


@pytest.fixture(scope="session")
def smoke_study(tmp_path_factory) -> Path:
    """The folder of a study that nothing interrupted, for reading; all workers share it."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    workdir, log = root / "smoke-study", root / "smoke-study.txt"
    with (root / "smoke-study.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one worker runs it, the others wait
        if not log.is_file():
            command = [sys.executable, "study.py", f"--workdir={workdir}", *SMOKE]
            done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
            assert done.returncode == 0, done.stderr
            assert "2 of 2 done, 0 failed, 0 running" in done.stdout
            log.write_text(done.stdout)
    return workdir


# ---------------------------------------------------------------- the table of promises


@pytest.fixture
def promise(request) -> Callable[[str, float, float], None]:
    """promise(text, worst, tolerance): asserts it, and gives it a row in docs/exactness.md."""

    def check(text: str, worst: float, tolerance: float) -> None:
        # A property reaches the main process with the test's report, from another worker too.
        request.node.user_properties.append(("promise", (text, tolerance, float(worst))))
        assert worst <= tolerance, f"{text}: worst {worst:.2g}, tolerance {tolerance:.2g}"

    return check


@pytest.hookimpl(tryfirst=True)  # before -m and -k choose: the ledger knows of all promises
def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    promising = [item for item in items if "promise" in item.fixturenames]
    for item in promising:
        item.add_marker("promise")
    files = set((REPOSITORY / "tests").rglob("test_*.py")) - {item.path for item in items}
    ledger = config.stash[LEDGER]
    ledger.wanted, ledger.unread = {item.nodeid for item in promising}, set(map(str, files))
    if hasattr(config, "workeroutput"):  # of pytest-xdist, whose workers alone collect
        config.workeroutput["promises"] = sorted(ledger.wanted), sorted(ledger.unread)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    wanted, unread = getattr(node, "workeroutput", {}).get("promises", ((), ()))
    ledger = node.config.stash[LEDGER]
    ledger.wanted, ledger.unread = set(wanted), set(unread)


class Measured:
    """Keeps what the reports of tests say of promises."""

    def __init__(self, ledger: Ledger):
        self.ledger = ledger

    def pytest_runtest_logreport(self, report):
        for name, value in report.user_properties if report.when == "call" else ():
            if name == "promise":
                self.ledger.record(report.nodeid, *value)


def pytest_configure(config):
    config.stash[LEDGER] = Ledger()
    config.pluginmanager.register(Measured(config.stash[LEDGER]))


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    ledger = config.stash[LEDGER]
    gap = "not every test passed" if exitstatus else ledger.gap()
    path = REPOSITORY / "docs" / "exactness.md"
    if ledger.wanted and gap is None:
        path.write_text(ledger.table(), encoding="utf-8")
        terminalreporter.line(f"{path.name}: the promises of {len(ledger.wanted)} tests")
    elif config.option.markexpr == "promise":
        terminalreporter.line(f"{path.name} stays as it is: {gap}")
