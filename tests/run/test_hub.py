"""convert.py --push, against a stand-in of the hub's HTTP API that keeps what is committed."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from huggingface_hub import constants

from jax_lora.files import write_json
from jax_lora.run import hub
from jax_lora.weights import base, peft
from tests.scripts import run
from tests.weights.test_convert import adapter

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class StandIn(ThreadingHTTPServer):
    """The part of the hub that a commit needs: small files in it, large ones by Git LFS.

    Attributes:
      repositories: name → path → content.
      objects: what came by LFS, by its sha256; weights come so where `large` says so.
      token: that is let in.
      refuses: part of the paths that are answered with 403.
    """

    def __init__(self):
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.token, self.refuses, self.large = "hf_test", "nothing", False
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self._body())

    def do_PUT(self) -> None:  # to an address that the batch gave away, without a token
        content = self._body()
        self.server.objects[hashlib.sha256(content).hexdigest()] = content
        self._send(200, {})

    def _body(self) -> bytes:
        size = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while length := int(self.rfile.readline(), 16):
                body += self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(size)

    def _answer(self, body: bytes) -> None:
        path, code, found = self.path.split("?")[0], 200, {}
        parts = path.strip("/").split("/")
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            code, found = 401, {"error": "Invalid user token."}
        elif self.server.refuses in path:
            code, found = 403, {"error": "Forbidden: no write access."}
        elif path == "/api/whoami-v2":
            found = {"type": "user", "name": "me", "orgs": []}
        elif path == "/api/repos/create":
            wanted = json.loads(body)
            name = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
            self.server.repositories.setdefault(name, {})
            found = {"url": f"{self.server.address}/{name}", "name": name}
        elif path == "/api/validate-yaml":
            found = {"errors": [], "warnings": []}
        elif "preupload" in parts:
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = [self._mode(file) for file in files]
            found = {
                "files": [
                    {"path": file, "uploadMode": mode, "shouldIgnore": False}
                    for file, mode in zip(files, modes, strict=True)
                ]
            }
        elif path.endswith(".git/info/lfs/objects/batch"):
            upload = {"upload": {"href": f"{self.server.address}/lfs"}}
            objects = [one | {"actions": upload} for one in json.loads(body)["objects"]]
            found = {"transfer": "basic", "objects": objects}
        elif "commit" in parts:
            name = "/".join(parts[2:4])
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.repositories[name][line["value"]["path"]] = content
                if line["key"] == "lfsFile":
                    content = self.server.objects[line["value"]["oid"]]
                    assert line["value"]["size"] == len(content)
                    self.server.repositories[name][line["value"]["path"]] = content
            url = f"{self.server.address}/{name}/commit/{COMMIT}"
            found = {"commitUrl": url, "commitOid": COMMIT, "hookOutput": "", "success": True}
        elif parts[:2] == ["api", "models"]:
            found = {"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": [], "private": False}
        self._send(code, found)

    def _mode(self, file: str) -> str:
        return "lfs" if self.server.large and file.endswith(".safetensors") else "regular"

    def _send(self, code: int, found: dict[str, Any]) -> None:
        content = json.dumps(found).encode()
        self.send_response(code)
        if code >= 400:
            self.send_header("X-Error-Message", str(found["error"]))
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def standin(monkeypatch) -> Iterator[StandIn]:
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", server.token)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


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


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the hub's client's own
@pytest.mark.parametrize(
    ("kind", "large"), [("adapter", False), ("merged", False), ("adapter", True), ("merged", True)]
)
def test_a_folder_is_sent_whole_with_its_card(
    standin, trained, tiny_model, tmp_path, monkeypatch, kind, large
):
    standin.large = large
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # which has no stand-in
    flags = [str(trained), str(tmp_path / "out"), "--fold-scale"]
    if kind == "merged":
        flags = [str(tiny_model), str(tmp_path / "out"), f"--merge={trained}"]
    done = run("convert.py", *flags, "--push=me/tuned")
    assert done.returncode == 0, done.stderr
    assert f"sent to {standin.address}/me/tuned\nwrote {tmp_path / 'out'}\n" in done.stdout
    assert standin.repositories == {"me/tuned": files(tmp_path / "out")}
    sent = standin.repositories["me/tuned"]
    weights = {"adapter": "adapter_model.safetensors", "merged": "model.safetensors"}[kind]
    assert list(standin.objects.values()) == [sent[weights]] * large
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
    assert not (tmp_path / "out").exists() and not standin.repositories


def test_a_refused_commit_leaves_the_folder_and_says_how_to_send_it(standin, trained, tmp_path):
    standin.refuses = "/commit/"
    done = run("convert.py", str(trained), str(tmp_path / "out"), "--push=me/tuned")
    assert done.returncode == 1
    assert f"send it with `hf upload me/tuned {tmp_path / 'out'}`" in done.stderr
    assert peft.load(tmp_path / "out").rank == 3


def test_nothing_is_sent_without_being_asked():
    hub.check(None)
    hub.push("nowhere", None, print)
