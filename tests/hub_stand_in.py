"""A stand-in for the hub's HTTP API: what its client calls to make, fill and read a repository of models.

Enough of it to be talked to by the real `huggingface_hub`: creating a repository, the questions before an upload, git
LFS's batch protocol, commits, and files at a revision. Everything is kept in memory, and every request is noted.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """The server and what it holds.

    Attributes:
        repos: Files of each repository.
        private: Whether each was made private.
        requests: Method and path of every request.
        token: What a writer has to show.
    """

    def __init__(self, token: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.token = token

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running_hub(token: str = "hf_secret") -> Iterator[Hub]:
    """A hub for the time of a test."""
    hub = Hub(token)
    thread = threading.Thread(target=hub.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        self.server.requests.append(f"{self.command} {urlparse(self.path).path}")

    def _answer(self, status: int, body: bytes = b"", kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, status: int = 200) -> None:
        self._answer(status, json.dumps(value).encode())

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self) -> None:
        path, body = unquote(urlparse(self.path).path), self._body()
        if path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self._json({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path.startswith("/api/models/") and "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": _mode(f["path"]), "shouldIgnore": False} for f in files]
            self._json({"files": modes})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._json({"transfer": "basic", "objects": [self._slot(one) for one in json.loads(body)["objects"]]})
        elif path.startswith("/api/models/") and "/commit/" in path:
            self._commit(path.split("/api/models/")[1].split("/commit/")[0], body)
        else:
            self._json({"error": f"no such call: {path}"}, 404)

    def _create(self, asked: dict[str, Any]) -> None:
        owner = asked.get("organization") or "me"
        name = asked["name"] if "/" in asked["name"] else f"{owner}/{asked['name']}"
        taken = name in self.server.repos
        self.server.repos.setdefault(name, {})
        self.server.private.setdefault(name, bool(asked.get("private")) or asked.get("visibility") == "private")
        self._json({"url": f"{self.server.url}/{name}", "name": name}, 409 if taken else 200)

    def _slot(self, one: dict[str, Any]) -> dict[str, Any]:
        upload = {"href": f"{self.server.url}/upload/{one['oid']}", "header": {}}
        return {**one, "authenticated": True, "actions": {"upload": upload}}

    def do_PUT(self) -> None:
        data = self._body()
        oid = urlparse(self.path).path.rpartition("/")[2]
        if hashlib.sha256(data).hexdigest() != oid:
            self._json({"error": "other bytes than announced"}, 400)
            return
        self.server.large[oid] = data
        self._answer(200)

    def _commit(self, repo: str, body: bytes) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.server.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.server.repos[repo][value["path"]] = self.server.large[value["oid"]]
        url = f"{self.server.url}/{repo}/commit/{SHA}"
        self._json({"success": True, "commitOid": SHA, "commitUrl": url, "hookOutput": ""})

    def do_HEAD(self) -> None:
        self._read()

    def do_GET(self) -> None:
        self._read()

    def _read(self) -> None:
        path = unquote(urlparse(self.path).path)
        if path.startswith("/api/models/"):
            self._about(path.removeprefix("/api/models/"))
            return
        repo, _, rest = path.lstrip("/").partition("/resolve/")
        name = rest.partition("/")[2]
        files = self.server.repos.get(repo)
        if files is None:
            self._answer(404, X_Error_Code="RepoNotFound")
        elif name not in files:
            self._answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=SHA)
        else:
            etag = f'"{hashlib.sha256(files[name]).hexdigest()}"'
            self._answer(200, files[name], "application/octet-stream", ETag=etag, X_Repo_Commit=SHA)

    def _about(self, path: str) -> None:
        repo = "/".join(path.split("/")[:2])
        files = self.server.repos.get(repo)
        if files is None:
            self._answer(404, X_Error_Code="RepoNotFound")
        elif "/tree/" in path:
            under = path.partition("/tree/")[2].partition("/")[2]
            listed = [
                {"type": "file", "path": name, "size": len(data), "oid": SHA}
                for name, data in files.items()
                if name.startswith(under)
            ]
            self._json(listed)
        else:
            self._json({"id": repo, "sha": SHA, "private": False, "siblings": [{"rfilename": name} for name in files]})


def _mode(path: str) -> str:
    return "lfs" if path.endswith((".safetensors", "tokenizer.json")) else "regular"
