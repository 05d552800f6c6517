"""A Hub on the loopback: the few endpoints that ``push_to_hub`` and ``from_pretrained`` use, with a tree per revision.

Large files come by git LFS's basic transfer, as to the Hub of a client with HF_HUB_DISABLE_XET=1.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "a token that may write"
ID = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class Hub:
    """What the server has: repositories, their commits, large files by their SHA-256, and the requests that came."""

    url: str = ""
    commits: dict[str, list[dict[str, bytes]]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    large: dict[str, bytes] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def sha(self, repo: str) -> str:
        """The newest commit's name: 40 hex digits."""
        return f"{len(self.commits[repo]):040x}"


@contextmanager
def running() -> Iterator[Hub]:
    """Serve until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def do_POST(self) -> None:
        content, hub = self._body(), self.hub
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid credentials"})
        if self.path == "/api/repos/create":
            asked = json.loads(content)
            repo = f"{asked['organization']}/{asked['name']}"
            hub.commits.setdefault(repo, [])
            hub.private.setdefault(repo, asked.get("visibility") == "private" or asked.get("private", False))
            return self._answer(200, {"url": f"{hub.url}/{repo}"})
        if self.path == "/api/validate-yaml":
            assert json.loads(content)["content"].startswith("---\n")
            return self._answer(200, {"errors": [], "warnings": []})
        if found := re.fullmatch(rf"/api/models/{ID}/preupload/main", self.path):
            names = [file["path"] for file in json.loads(content)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            files = [{"path": name, "uploadMode": modes[name], "shouldIgnore": False} for name in names]
            return self._answer(200, {"files": files})
        if found := re.fullmatch(rf"/{ID}\.git/info/lfs/objects/batch", self.path):
            objects = [
                {**one, "actions": {"upload": {"href": f"{hub.url}/large/{one['oid']}"}}}
                for one in json.loads(content)["objects"]
            ]
            return self._answer(200, {"transfer": "basic", "objects": objects})
        if found := re.fullmatch(rf"/api/models/{ID}/commit/main", self.path):
            return self._answer(200, self._commit(found["repo"], content))
        return self._answer(404, {"error": self.path})

    def _commit(self, repo: str, content: bytes) -> dict[str, Any]:
        hub = self.hub
        tree = dict(hub.commits[repo][-1]) if hub.commits[repo] else {}
        for line in map(json.loads, content.splitlines()):
            kind, value = line["key"], line["value"]
            if kind == "header":
                hub.messages.append(value["summary"])
            elif kind == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            else:
                assert kind == "lfsFile"
                tree[value["path"]] = hub.large[value["oid"]]
        hub.commits[repo].append(tree)
        return {"commitUrl": f"{hub.url}/{repo}/commit/{hub.sha(repo)}", "commitOid": hub.sha(repo), "success": True}

    def do_PUT(self) -> None:
        content = self._body()
        name = self.path.removeprefix("/large/")
        assert hashlib.sha256(content).hexdigest() == name
        self.hub.large[name] = content
        self._answer(200, {})

    def do_HEAD(self) -> None:
        self._file()

    def do_GET(self) -> None:
        if found := re.fullmatch(rf"/api/models/{ID}(/revision/main)?", self.path):
            repo = found["repo"]
            return self._answer(200, {"id": repo, "modelId": repo, "sha": self.hub.sha(repo), "siblings": []})
        self._file()

    def _file(self) -> None:
        found = re.fullmatch(rf"/{ID}/resolve/(?P<revision>\w+)/(?P<path>.+)", self.path)
        self.hub.requests.append(f"{self.command} {self.path}")
        if found is None or found["repo"] not in self.hub.commits:
            return self._answer(404, {"error": "no"}, {"X-Error-Code": "RepoNotFound"})
        commits = self.hub.commits[found["repo"]]
        names = {"main": len(commits), **{f"{number:040x}": number for number in range(1, len(commits) + 1)}}
        if not (number := names.get(found["revision"], 0)):
            return self._answer(404, {"error": "no"}, {"X-Error-Code": "RevisionNotFound"})
        content = commits[number - 1].get(found["path"])
        if content is None:
            return self._answer(404, {"error": "no"}, {"X-Error-Code": "EntryNotFound"})
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self._answer(200, content, {"X-Repo-Commit": f"{number:040x}", "ETag": etag})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status: int, content: dict[str, Any] | bytes, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
