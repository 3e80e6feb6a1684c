"""The rules of the house that a machine can check: imports, docstrings, sizes, shapes, pins."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from jax_lora.generation import greedy
from jax_lora.model.config import LlamaConfig
from jax_lora.model.transformer import Llama, positions

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "jax_lora"
FILES = sorted(PACKAGE.rglob("*.py"))

# What each floor may import of its siblings; TOP stands on all of them.
ARROWS = {
    "model": set(),
    "data": set(),
    "sharding": {"model.arch"},  # the table of layers
    "distributed": set(),
    "weights": {"model", "sharding"},
    "generation": {"model", "sharding"},
    "training": {"model", "data", "sharding", "distributed"},
    "evaluation": {"generation", "data"},
    "planning": {"model", "data", "sharding", "training", "generation"},
}
ARROWS["run"] = {*ARROWS}
ARROWS["study"] = {*ARROWS}
# Any file may import these.
GROUND = {"config", "errors", "files", "locks", "patterns", "signals", "text"}
ARROWS |= dict.fromkeys(GROUND, set())
TOP = {"__init__", "cli", "notebook"}
SCRIPTS = ("train", "eval", "study", "plan", "convert")


def imports(tree: ast.Module, package: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """The dotted names that a module of `package` imports anywhere, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*above, *filter(None, [node.module])))
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


def forbidden(source: str, path: str) -> list[str]:
    """The imports and calls of one file, named by its path in the package, that break a rule."""
    tree = ast.parse(source)
    parts = Path(path).with_suffix("").parts
    floor, found = parts[0], []
    for name, line in imports(tree, ("jax_lora", *parts[:-1])):
        root, *inner = name.split(".")
        if root in ("absl", "ml_collections"):
            found.append(f"{path}:{line} imports {root}, which is for the scripts")
        if root == "flax" and path != "model/transformer.py":
            found.append(f"{path}:{line} imports flax, which is for model/transformer.py")
        if root == "jax_lora" and floor not in TOP:
            target = inner[0] if inner else "__init__"
            reached = {target, ".".join(inner[:2])}
            ground = path == "evaluation/metrics.py"  # as `config` is
            if not reached & GROUND and (ground or not reached & ({floor} | ARROWS[floor])):
                found.append(f"{path}:{line} imports jax_lora.{target}: no such arrow")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
            found.append(f"{path}:{node.lineno} prints")
    return found


def test_every_file_has_a_floor():
    floors = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in FILES}
    assert floors <= {*ARROWS, *TOP}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_file_keeps_the_rules(path):
    source = path.read_text("utf-8")
    assert forbidden(source, path.relative_to(PACKAGE).as_posix()) == []
    undocumented = [
        f"{node.name}, line {node.lineno}"
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert undocumented == []


@pytest.mark.parametrize(
    ("path", "source", "rule"),
    [
        ("data/toy.py", "from jax_lora.model.transformer import Llama", "jax_lora.model: no such"),
        ("data/toy.py", "from jax_lora import model", "jax_lora.model: no such arrow"),
        (
            "data/toy.py",
            "def f():\n    from ..model import transformer",
            ":2 imports jax_lora.model",
        ),
        ("weights/hf.py", "import jax_lora.cli", "jax_lora.cli: no such arrow"),
        ("training/step.py", "import jax_lora", "jax_lora.__init__: no such arrow"),
        ("evaluation/metrics.py", "from jax_lora.evaluation import behaviour", "no such arrow"),
        ("evaluation/metrics.py", "from jax_lora.errors import ConfigError", None),
        ("sharding.py", "from .model import lora", "jax_lora.model: no such arrow"),
        ("model/lora.py", "import flax.linen as nn", "imports flax"),
        ("cli.py", "from absl import app", "imports absl"),
        ("__init__.py", "print('hello')", "prints"),
        ("model/lora.py", "from . import transformer", None),
        ("study/grid.py", "from ..planning.counts import count", None),
        ("evaluation/behaviour.py", "from jax_lora.evaluation.metrics import normalize", None),
        ("__init__.py", "from jax_lora.study import grid", None),
        ("model/transformer.py", "from flax import linen", None),
    ],
)
def test_the_rules_see_what_they_should(path, source, rule):
    found = forbidden(source, path)
    assert len(found) == (rule is not None)
    assert rule is None or rule in found[0]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_flags_and_one_call_of_the_library(script):
    assert len((REPOSITORY / f"{script}.py").read_text("utf-8").splitlines()) <= 80


def sources(*folders: str) -> dict[str, ast.Module]:
    """The syntax trees of the tracked Python files below some folders; all files by default."""
    patterns = [f"{folder}/*.py" for folder in folders] or ["*.py"]
    command = ["git", "ls-files", "--", *patterns]
    listed = subprocess.check_output(command, cwd=REPOSITORY, text=True).splitlines()
    return {path: ast.parse((REPOSITORY / path).read_text("utf-8")) for path in listed}


def test_nothing_imports_a_script():
    for path, tree in sources().items():
        tests_of_it = path == "tests/weights/test_convert.py"  # calls main() in its own process
        names = {name.split(".")[0] for name, _ in imports(tree, ())}
        assert tests_of_it or not names & {*SCRIPTS}, path


def test_every_package_that_is_imported_is_declared():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    declared = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    distributions = metadata.packages_distributions()
    for path, tree in sources("jax_lora").items():
        for name, line in imports(tree, tuple(Path(path).parts[:-1])):
            root = name.split(".")[0]
            if root in sys.stdlib_module_names or root == "jax_lora":
                continue
            found = {canonicalize_name(each) for each in distributions.get(root, [root])}
            assert found & declared, f"{path}:{line} imports {root}"


# ---------------------------------------------------------------- bounds that fall and never rise

LONGEST_FUNCTION = 80
LONG_FUNCTIONS = 0  # of the package
ANY = 60  # occurrences in the package
# Private words, by design.md's table; those that are plain English in most places are left out.
WORDS = {
    *("across", "alone", "apart", "begin", "contract", "contracted", "gone", "hit", "instead"),
    *("kept", "mine", "odds", "own", "Pace", "place", "Place", "said", "settle"),
    *("sliceable", "thinned", "Turn", "whole"),
}
NAMES = 0  # definitions of these words in the package, its scripts and the benchmarks


def test_functions_can_be_read_without_scrolling():
    long = [
        f"{path}: {node.name}, {length} lines"
        for path, tree in sources("jax_lora").items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1) > LONGEST_FUNCTION
    ]
    assert len(long) <= LONG_FUNCTIONS, long


def test_types_say_what_they_are():
    found = {
        path: len(re.findall(r"\bAny\b", (REPOSITORY / path).read_text("utf-8")))
        for path in sources("jax_lora")
    }
    assert sum(found.values()) <= ANY, found


def defined(tree: ast.Module) -> Iterator[str]:
    """The names that a file gives to variables, arguments, functions and classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg


def test_names_are_the_fields_words():
    files = sources("jax_lora", "benchmarks", "configs") | {
        f"{name}.py": ast.parse((REPOSITORY / f"{name}.py").read_text("utf-8")) for name in SCRIPTS
    }
    found = [f"{path}: {name}" for path, tree in files.items() for name in {*defined(tree)} & WORDS]
    assert len(found) <= NAMES, found


def test_the_bounds_see_what_they_should():
    tree = ast.parse("def settle(place):\n    own = [kept for kept in place]\nclass Turn: pass")
    assert {*defined(tree)} & WORDS == {"settle", "place", "own", "kept", "Turn"}


def test_the_map_of_the_code_names_what_exists():
    """docs/code.md: the name of each row is in its file."""
    text = (REPOSITORY / "docs/code.md").read_text("utf-8")
    rows = re.findall(r"^\|.*\| `([\w/.]+)` \| `(\w+)` \|$", text, re.M)  # | what | file | name |
    rows += [(path, name) for name, path in re.findall(r"`(\w+)` (?:in|of) `([\w/]+\.py)`", text)]
    assert len(rows) >= 20
    for path, name in rows:
        folder = REPOSITORY if path.startswith("tests/") else PACKAGE
        assert re.search(rf"^ *(def|class) {name}\b|^{name}\b", (folder / path).read_text(), re.M)


def test_annotations_of_shapes_execute():
    """In a function, in a method of a Flax module and under jit; conftest.py sees to it."""
    model = Llama(LlamaConfig(61, 32, 48, 1, 4, 2, 8))
    ids, row = jnp.zeros((2, 8), jnp.int32), jnp.zeros(8, jnp.int32)
    rows = greedy.empty_rows(model, 2, 8, 4)
    for wrong in (
        lambda: positions(ids, ids[:1]),  # segments of another shape than the tokens
        lambda: jax.eval_shape(model.init, jax.random.key(0), row),
        lambda: greedy.gather_rows(model, rows, ids, 4),
    ):
        with pytest.raises(TypeCheckError, match="Type-check error whilst checking the parameters"):
            wrong()


def test_scoring_imports_no_jax():
    program = (
        "import sys; from jax_lora.evaluation.metrics import aggregate\n"
        "row = dict(prediction='a', references=['a'], task='t', category='c')\n"
        "assert aggregate([row])['rougeL'] == 100.0\n"
        "heavy = {'jax', 'jaxlib', 'flax', 'torch', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_every_dependency_has_one_pin_within_its_bounds(version):
    pins: dict[str, str] = {}
    for line in (REPOSITORY / "constraints.txt").read_text("utf-8").splitlines():
        if line.startswith("#"):
            continue
        pin = Requirement(line)
        if pin.marker is None or pin.marker.evaluate({"python_version": version}):
            (exact,) = pin.specifier
            assert exact.operator == "==" and pin.url is None, line
            assert canonicalize_name(pin.name) not in pins, line
            pins[canonicalize_name(pin.name)] = exact.version
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    for line in [*project["dependencies"], *extras["test"], *extras["parity"]]:
        wanted = Requirement(line)
        assert wanted.specifier.contains(pins[canonicalize_name(wanted.name)]), line
