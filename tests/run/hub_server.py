"""A stand-in of the hub: the part of its HTTP API that a commit needs, which keeps what it is sent.

Large files come by one of the three routes that huggingface_hub has: Git LFS in one request
("basic"), Git LFS in parts ("multipart") or Xet ("xet"). The Xet client is a Rust library that
takes the address of its storage from the hub: it is pointed at its own storage in a local folder.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class StandIn(ThreadingHTTPServer):
    """The server.

    Attributes:
      repositories: name → path → content; of a file that came by Xet the content is its sha256.
      commits: the operations of each commit, as (key, path).
      objects: what came by LFS, by its sha256.
      parts: the bytes of the parts of one object, by number.
      requests: method and path of each.
      token, role: that is let in, and what it may do.
      route: of safetensors files, "regular" for as small files.
      chunk: bytes per part.
      refuses: part of a path that is answered with `code` and `reason`; None for none.
      quota: bytes per object that Git LFS takes.
      storage: folder of the Xet storage.
    """

    def __init__(self, storage: Path):
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.commits: list[list[tuple[str, str]]] = []
        self.objects: dict[str, bytes] = {}
        self.parts: dict[int, bytes] = {}
        self.requests: list[str] = []
        self.token, self.role = "hf_test", "write"
        self.route, self.chunk = "regular", 3_000
        self.refuses: str | None = None
        self.code, self.reason = 403, "no write access"
        self.quota, self.storage = 2**40, storage
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def refuse(self, path: str, code: int, reason: str) -> None:
        self.refuses, self.code, self.reason = path, code, reason

    def stored(self, file: Path, into: Path) -> bytes:
        """What the Xet storage holds of a local file, read back by the file's Xet hash."""
        import hf_xet

        (found,) = hf_xet.hash_files([str(file)])
        info = hf_xet.XetFileInfo(found.hash, file.stat().st_size)
        group = hf_xet.XetSession().new_file_download_group(
            endpoint=f"local://{self.storage}", token="t", token_expiry_unix_secs=2**40
        )
        with group as downloads:
            downloads.start_download_file(info, str(into))
        return into.read_bytes()


@contextmanager
def serve(storage: Path) -> Iterator[StandIn]:
    """A stand-in that answers, on a free port of this machine."""
    server = StandIn(storage)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self._body())

    def do_PUT(self) -> None:
        """To an address that the batch gave away: without a token."""
        content, path = self._body(), self.path
        self.server.requests.append(f"PUT {path}")
        if self._is_refused(path):
            self._send(self.server.code, {"error": self.server.reason})
        elif path.startswith("/part/"):
            number = int(path.removeprefix("/part/"))
            self.server.parts[number] = content
            self._send(200, {}, ETag=hashlib.md5(content).hexdigest())
        else:
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

    def _is_refused(self, path: str) -> bool:
        return self.server.refuses is not None and self.server.refuses in path

    def _answer(self, body: bytes) -> None:
        path = self.path.split("?")[0]
        self.server.requests.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        # The completion of parts goes to an address that the batch gave away.
        is_open = path.startswith("/complete/")
        if not is_open and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            return self._send(401, {"error": "Invalid user token."})
        if self._is_refused(path):
            return self._send(self.server.code, {"error": self.server.reason})
        name = "/".join(parts[2:4])
        if path == "/api/whoami-v2":
            access = {"auth": {"accessToken": {"role": self.server.role}}}
            return self._send(200, {"type": "user", "name": "me", "orgs": [], **access})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if "preupload" in parts:
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": file, "uploadMode": self._mode(file)} for file in files]
            return self._send(200, {"files": [mode | {"shouldIgnore": False} for mode in modes]})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        if is_open:
            return self._complete(parts[1], json.loads(body))
        if path == "/verify":
            wanted = json.loads(body)
            is_here = len(self.server.objects.get(wanted["oid"], b"")) == wanted["size"]
            return self._send(200 if is_here else 404, {"error": "no such object"})
        if "xet-write-token" in parts:
            token = {"accessToken": "t", "exp": int(time.time()) + 3600}
            return self._send(200, token | {"casUrl": f"local://{self.server.storage}"})
        if "tree" in parts:
            files = self.server.repositories[name]
            rows = [{"type": "file", "path": file, "size": 1, "oid": COMMIT} for file in files]
            return self._send(200, rows)
        if "commit" in parts:
            return self._commit(name, [json.loads(line) for line in body.splitlines()])
        found = {"id": name, "sha": COMMIT, "siblings": [], "private": False}
        self._send(200 if name in self.server.repositories else 404, found | {"error": "not here"})

    def _create(self, wanted: dict[str, Any]) -> None:
        name = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
        code = 409 if name in self.server.repositories else 200
        self.server.repositories.setdefault(name, {".gitattributes": b""})
        found = {"url": f"{self.server.address}/{name}", "name": name}
        self._send(code, found | {"error": "You already created this model repo"})

    def _mode(self, file: str) -> str:
        is_large = self.server.route != "regular" and file.endswith(".safetensors")
        return "lfs" if is_large else "regular"

    def _batch(self, wanted: dict[str, Any]) -> None:
        """The instructions for uploads: none for what is there, parts above the size of one."""
        server, objects = self.server, []
        assert {"basic", "multipart"} <= set(wanted["transfers"])
        for one in wanted["objects"]:
            verify = {"verify": {"href": f"{server.address}/verify"}}
            if one["size"] > server.quota:
                error = {"code": 413, "message": f"above the quota of {server.quota} bytes"}
                objects.append(one | {"error": error})
            elif one["oid"] in server.objects:
                objects.append(one)
            elif server.route == "multipart":
                count = math.ceil(one["size"] / server.chunk)
                header = {str(i): f"{server.address}/part/{i}" for i in range(count, 0, -1)}
                header["chunk_size"] = str(server.chunk)
                upload = {"href": f"{server.address}/complete/{one['oid']}", "header": header}
                objects.append(one | {"actions": {"upload": upload, **verify}})
            else:
                upload = {"href": f"{server.address}/basic"}
                objects.append(one | {"actions": {"upload": upload, **verify}})
        self._send(200, {"transfer": server.route, "objects": objects})

    def _complete(self, oid: str, wanted: dict[str, Any]) -> None:
        parts = self.server.parts
        expected = [
            {"partNumber": i, "etag": hashlib.md5(parts[i]).hexdigest()} for i in sorted(parts)
        ]
        content = b"".join(parts[i] for i in sorted(parts))
        is_whole = wanted == {"oid": oid, "parts": expected}
        is_whole &= hashlib.sha256(content).hexdigest() == oid
        if is_whole:
            self.server.objects[oid] = content
        self._send(200 if is_whole else 400, {"error": "the parts do not make the object"})

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        files, log = self.server.repositories[name], []
        for key, value in ((line["key"], line["value"]) for line in lines):
            if key == "header":
                continue
            log.append((key, value["path"]))
            if key == "deletedFile":
                del files[value["path"]]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif self.server.route == "xet":
                files[value["path"]] = value["oid"].encode()
            else:
                content = self.server.objects[value["oid"]]
                assert value["size"] == len(content)
                files[value["path"]] = content
        self.server.commits.append(log)
        url = f"{self.server.address}/{name}/commit/{COMMIT}"
        self._send(200, {"commitUrl": url, "commitOid": COMMIT, "hookOutput": "", "success": True})

    def _send(self, code: int, found: object, **headers: str) -> None:
        content = json.dumps(found).encode()
        self.send_response(code)
        if code >= 400 and isinstance(found, dict):
            self.send_header("X-Error-Message", str(found["error"]))
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
