"""convert.py --push, against a stand-in of the hub's HTTP API that keeps what is committed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest
from huggingface_hub import constants

from jax_lora.files import write_json
from jax_lora.run import hub
from jax_lora.weights import base, peft
from tests.run.hub_server import StandIn, serve
from tests.scripts import run
from tests.weights.test_convert import adapter

# The hub's client sends files in a way of its own HTTP library that has a new name.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def standin(monkeypatch, tmp_path) -> Iterator[StandIn]:
    with serve(tmp_path / "storage") as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", server.token)
        yield server


@pytest.fixture
def route(standin, request, monkeypatch) -> str:
    """The route of large files: a user without hf_xet has the two of Git LFS alone."""
    standin.route = request.param
    if standin.route == "xet":
        hf_xet = pytest.importorskip("hf_xet")
        if not hasattr(hf_xet, "XetSession"):
            pytest.skip("an hf_xet that has no sessions")
    # Where hf_xet is installed, the client takes it without a question.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", standin.route != "xet")
    return standin.route


@pytest.fixture
def trained(tmp_path, tiny_model):
    """The folder of a run, as train.py and eval.py leave it; no step was made."""
    from jax_lora import RunConfig

    run = tmp_path / "r3"
    adapter(run / "adapter")
    config = RunConfig().replace(
        model=str(tiny_model),
        **{"data.path": "org/instructions", "lora.rank": 3, "optim.learning_rate": 1e-3},
    )
    digest = base.digest(tiny_model)
    saved = {"config": config.to_dict(), "data_fingerprint": "d" * 64, "base_digest": digest}
    write_json(run / "config.json", saved | {"steps": 60})
    counts = {"trainable": 1500, "frozen": 98500, "trainable_percent": 1.5, "modules": []}
    write_json(run / "parameters.json", counts)
    (run / "eval" / "test").mkdir(parents=True)
    scores = {
        "metrics": {"exact_match": 61.8034, "rougeL": 70.0},
        "tasks": {"one": {"examples": 12}, "two": {"examples": 8}},
    }
    write_json(run / "eval" / "test" / "scores.json", scores)
    return run


def files(folder):
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("route", ["regular", "basic", "multipart", "xet"], indirect=True)
@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_a_folder_is_sent_whole_with_its_card(standin, trained, tiny_model, tmp_path, route, kind):
    flags = [str(trained), str(tmp_path / "out"), "--fold-scale"]
    if kind == "merged":
        flags = [str(tiny_model), str(tmp_path / "out"), f"--merge={trained}"]
    done = run("convert.py", *flags, "--push=me/tuned")
    assert done.returncode == 0, done.stderr
    assert f"sent to {standin.address}/me/tuned\nwrote {tmp_path / 'out'}\n" in done.stdout
    written = files(tmp_path / "out")
    weights = {"adapter": "adapter_model.safetensors", "merged": "model.safetensors"}[kind]
    expected = {".gitattributes": b""} | written
    if route == "xet":  # the commit names it, the bytes are in the other storage
        expected[weights] = hashlib.sha256(written[weights]).hexdigest().encode()
        stored = standin.stored(tmp_path / "out" / weights, tmp_path / "back")
        assert stored == written[weights]
    assert standin.repositories == {"me/tuned": expected} and len(standin.commits) == 1
    assert list(standin.objects.values()) == [written[weights]] * (route in ("basic", "multipart"))
    assert len(standin.parts) > 1 if route == "multipart" else not standin.parts
    sent = standin.repositories["me/tuned"]
    weights = {"adapter": "adapter_model.safetensors", "merged": "model.safetensors"}[kind]
    assert {weights, "README.md", "jax_lora.json"} <= sent.keys()
    card = sent["README.md"].decode()
    for text in (
        f"library_name: {'peft' if kind == 'adapter' else 'transformers'}\n",
        "datasets: [org/instructions]\n",
        f"(digest `{base.digest(tiny_model)[:12]}`)",
        f"org/instructions (digest `{'d' * 12}`), template `alpaca`.",
        "1,500 of 100,000, 1.500%.",
        "60 steps.",
        "| lora.rank | `3` |",
        "| optim.learning_rate | `0.001` |",
        "`python eval.py --workdir=r3 --sets=test` (20 examples, percent):",
        "| exact_match | 61.80 |",
    ):
        assert text in card
    assert str(tmp_path) not in card and str(tiny_model.parent) not in card


def test_the_licence_is_that_of_the_bases_card(trained, tmp_path):
    from jax_lora.run.model_card import card

    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\nx")
    written = trained / "adapter"
    assert "\nlicense: apache-2.0\n" in card(written, "me/x", str(tmp_path / "base"), None)
    assert "license" not in card(written, "me/x", str(tmp_path / "none"), None)
    assert "base_model: org/base\n" in card(written, "me/x", "org/base", None)


@pytest.mark.parametrize("name", ["tuned", "a/b/c", "a b/c"])
def test_a_wrong_name_is_one_line_before_any_work(standin, trained, tmp_path, name):
    done = run("convert.py", str(trained), str(tmp_path / "out"), f"--push={name}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: --push: found {name!r}, expected ORG/NAME")
    assert not (tmp_path / "out").exists()


def test_a_wrong_token_is_one_line_before_any_work(standin, trained, tmp_path):
    standin.token = "hf_other"
    done = run("convert.py", str(trained), str(tmp_path / "out"), "--push=me/tuned")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: --push: found no access to the hub, expected the token")
    assert f"401 Unauthorized (GET {standin.address}/api/whoami-v2)" in done.stderr
    assert not (tmp_path / "out").exists() and not standin.repositories


def test_a_token_that_may_only_read_is_one_line_before_any_work(standin, trained, tmp_path):
    standin.role = "read"
    done = run("convert.py", str(trained), str(tmp_path / "out"), "--push=me/tuned")
    assert done.returncode == 2
    assert done.stderr == (
        "error: --push: found a token that may only read, expected one that may write\n"
    )
    assert not (tmp_path / "out").exists() and not standin.repositories


# Where it fails, and with what; the routes of large files fail in places of their own.
REFUSED = [
    ("basic", "/api/repos/create", 401, "you are not in this organization"),
    ("basic", "/api/repos/create", 403, "you may not create a model here"),
    ("basic", "/tree/", 404, "no such repository"),
    ("basic", "/preupload/", 404, "no such repository"),
    ("basic", "/objects/batch", 403, "no space left"),
    ("basic", "/basic", 403, "the address has expired"),
    ("basic", "/verify", 404, "no such object"),
    ("multipart", "/part/2", 403, "the address has expired"),
    ("multipart", "/complete/", 400, "a part is missing"),
    ("xet", "/xet-write-token/", 403, None),  # the Rust client says it in its own words
    *(
        (route, "/commit/", code, "you may not write here")
        for route in ("regular", "basic", "multipart", "xet")
        for code in (401, 403, 404)
    ),
]


@pytest.mark.parametrize(("route", "path", "code", "reason"), REFUSED, indirect=["route"])
def test_a_failure_halfway_leaves_no_commit_and_says_how_to_go_on(
    standin, trained, tmp_path, route, path, code, reason
):
    standin.refuse(path, code, reason or "no")
    done = run("convert.py", str(trained), str(tmp_path / "out"), "--push=me/tuned")
    assert done.returncode == 1 and "sent to" not in done.stdout
    *_, last = done.stderr.splitlines()  # after the progress bars of the hub's client
    assert last.startswith("error: --push: me/tuned: ") and done.stderr.count("\nerror: ") <= 1
    assert last.endswith(f"send it with `hf upload me/tuned {tmp_path / 'out'}`")
    assert reason is None or f"{code} {reason} (" in last
    assert str(code) in last
    assert not standin.commits and peft.load(tmp_path / "out").rank == 3


def test_an_object_that_the_batch_refuses_is_named(standin, trained, tmp_path, monkeypatch):
    standin.route, standin.quota = "basic", 100
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    done = run("convert.py", str(trained), str(tmp_path / "out"), "--push=me/tuned")
    assert done.returncode == 1 and not standin.commits
    assert "the quota of 100 bytes" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("route", ["basic", "multipart"], indirect=True)
def test_what_a_failed_upload_sent_is_not_sent_again(standin, trained, tmp_path, route):
    standin.refuse("/commit/", 403, "not yet")
    run("convert.py", str(trained), str(tmp_path / "out"), "--push=me/tuned")
    standin.refuses = None
    standin.requests.clear()
    hub.push(str(tmp_path / "out"), "me/tuned", lambda text: None)
    assert not [one for one in standin.requests if one.startswith("PUT")]
    assert standin.repositories["me/tuned"] == {".gitattributes": b""} | files(tmp_path / "out")


def test_a_repository_that_exists_becomes_the_folder_and_keeps_other_files(
    standin, trained, tmp_path
):
    """A model whose adapter was merged must not be read with an adapter of an earlier push."""
    stale = ("model.safetensors", "model-00001-of-00002.safetensors", "config.json")
    stale += ("model.safetensors.index.json", "tokenizer.json", "chat_template.jinja")
    others = ("LICENSE", "figures/loss.png", "old/model.safetensors", "q4.gguf", ".gitattributes")
    old = dict.fromkeys((*stale, *others, "README.md"), b"old")
    standin.repositories["me/tuned"] = dict(old)
    done = run("convert.py", str(trained), str(tmp_path / "out"), "--push=me/tuned")
    assert done.returncode == 0, done.stderr
    expected = dict.fromkeys(others, b"old") | files(tmp_path / "out")
    assert standin.repositories["me/tuned"] == expected and len(standin.commits) == 1


def test_a_folder_of_many_files_is_one_commit(standin, tmp_path):
    """Else a failure may leave some shards of a model without the others."""
    for i in range(300):
        (tmp_path / "out" / "sub").mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / "sub" / f"{i}.txt").write_text(str(i))
    hub.push(str(tmp_path / "out"), "me/many", lambda text: None)
    assert standin.repositories["me/many"] == {".gitattributes": b""} | files(tmp_path / "out")
    assert len(standin.commits) == 1


def test_nothing_is_sent_without_being_asked():
    hub.check(None)
    hub.push("nowhere", None, print)
