"""A Hub in memory on 127.0.0.1: the endpoints that the real `huggingface_hub` client calls, and faults on demand."""

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
from urllib.parse import parse_qs, unquote, urlparse


TOKEN = "hf_" + "writeable" * 4
READ_ONLY_TOKEN = "hf_" + "readonlyok" * 4


@dataclass
class Entry:
    """One file: its bytes, and whether it is kept as a large file."""

    content: bytes
    large: bool

    @property
    def blob(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.blob


@dataclass
class LoopbackHub:
    """State of the server: repositories as lists of commits, each a mapping from path to [`Entry`].

    `fault` is `(step, kind, times)`: the requests of that step fail that often, by status (`503`), by closing the
    connection before (`"drop"`) or after (`"drop after"`) the request was carried out.
    """

    repositories: dict[str, dict[str, list[tuple[str, dict[str, Entry]]]]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    fault: tuple[str, int | str, int] | None = None
    metadata_error: str | None = None
    requests: list[str] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)
    url: str = ""

    def head(self, repo_id: str, revision: str = "main") -> tuple[str, dict[str, Entry]]:
        branches = self.repositories[repo_id]
        if revision in branches:
            return branches[revision][-1]
        return next(commit for commits in branches.values() for commit in commits if commit[0] == revision)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        return {path: entry.content for path, entry in self.head(repo_id, revision)[1].items()}

    def edit(self, repo_id: str, path: str, content: bytes, revision: str = "main") -> None:
        """A commit by somebody else."""
        self.commit(repo_id, revision, {**self.head(repo_id, revision)[1], path: Entry(content, False)})

    def commit(self, repo_id: str, revision: str, tree: dict[str, Entry]) -> str:
        with self.lock:
            commits = self.repositories[repo_id][revision]
            listing = "".join(f"{path}{entry.etag}" for path, entry in sorted(tree.items()))
            oid = hashlib.sha1(f"{len(commits)}{listing}".encode()).hexdigest()
            commits.append((oid, tree))
            return oid


_ROUTES = [
    ("create", "POST", r"/api/repos/create"),
    ("validate", "POST", r"/api/validate-yaml"),
    ("whoami", "GET", r"/api/whoami-v2"),
    ("info", "GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<rev>[^/]+))?"),
    ("branch", "POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<rev>[^/]+)"),
    ("preupload", "POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<rev>[^/]+)"),
    ("commit", "POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<rev>[^/]+)"),
    ("tree", "GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<rev>[^/]+)"),
    ("paths", "POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/paths-info/(?P<rev>[^/]+)"),
    ("lfs", "POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch"),
    ("upload", "PUT", r"/upload/(?P<oid>[0-9a-f]{64})"),
    ("verify", "POST", r"/verify"),
    ("resolve", "HEAD|GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)"),
]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        url = urlparse(self.path)
        matches = ((step, re.fullmatch(p, url.path)) for step, m, p in _ROUTES if self.command in m.split("|"))
        step, found = next((pair for pair in matches if pair[1]), (None, None))
        if step is None:
            return self._send(404, {"error": f"no route {self.command} {url.path}"})
        self.hub.requests.append(step)
        kind = self._fault(step)
        if kind == "drop":
            return self._close()
        if isinstance(kind, int):
            return self._send(kind, {"error": "out of order"})
        if step not in ("upload", "validate", "resolve") and not self._may(step):
            return None
        arguments = {key: unquote(value) for key, value in found.groupdict().items() if value is not None}
        if "repo" in arguments and arguments["repo"] not in self.hub.repositories:
            return self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        self._silent = kind == "drop after"
        getattr(self, f"_{step}")(body, parse_qs(url.query), **arguments)
        return self._close() if self._silent else None

    do_GET = do_POST = do_PUT = do_HEAD = _answer

    def _fault(self, step: str) -> int | str | None:
        with self.hub.lock:
            if self.hub.fault is None or self.hub.fault[0] != step or self.hub.fault[2] < 1:
                return None
            _, kind, times = self.hub.fault
            self.hub.fault = (step, kind, times - 1)
            return kind

    def _close(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _may(self, step: str) -> bool:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in (TOKEN, READ_ONLY_TOKEN):
            self._send(401, {"error": "Invalid username or password."})
            return False
        if token == READ_ONLY_TOKEN and step in ("create", "branch", "preupload", "lfs", "commit"):
            self._send(403, {"error": "You don't have the rights to write here."})
            return False
        return True

    def _send(self, status: int, content: object = None, headers: dict[str, str] | None = None) -> None:
        if getattr(self, "_silent", False):
            return
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _create(self, body: bytes, _: dict) -> None:
        asked = json.loads(body)
        repo_id = f"{asked['organization'] or 'user'}/{asked['name']}"
        made = repo_id not in self.hub.repositories
        if made:
            self.hub.repositories[repo_id] = {"main": []}
            self.hub.commit(repo_id, "main", {".gitattributes": Entry(b"*.safetensors filter=lfs\n", False)})
        self._send(200 if made else 409, {"url": f"{self.hub.url}/{repo_id}", "name": repo_id})

    def _validate(self, body: bytes, _: dict) -> None:
        import yaml

        text = json.loads(body)["content"]
        try:
            metadata = yaml.safe_load(text.split("---")[1])
            assert isinstance(metadata, dict) and self.hub.metadata_error is None, self.hub.metadata_error
        except Exception as error:
            return self._send(400, {"errors": [{"message": str(error)}], "warnings": []})
        return self._send(200, {"errors": [], "warnings": []})

    def _whoami(self, _: bytes, __: dict) -> None:
        self._send(200, {"name": "user", "type": "user", "orgs": []})

    def _info(self, _: bytes, __: dict, repo: str, rev: str = "main") -> None:
        try:
            oid, tree = self.hub.head(repo, rev)
        except StopIteration:
            return self._send(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
        siblings = [{"rfilename": path} for path in tree]
        return self._send(200, {"id": repo, "sha": oid, "siblings": siblings, "tags": [], "private": False})

    def _branch(self, _: bytes, __: dict, repo: str, rev: str) -> None:
        branches = self.hub.repositories[repo]
        known = rev in branches
        branches.setdefault(rev, list(branches["main"]))
        self._send(409 if known else 200, {})

    def _preupload(self, body: bytes, _: dict, repo: str, rev: str) -> None:
        tree = self.hub.head(repo, rev)[1]
        answer = []
        for file in json.loads(body)["files"]:
            large = file["path"].endswith((".safetensors", ".png")) or file["size"] > 10 * 2**20
            entry = tree.get(file["path"])
            mode = "lfs" if large else "regular"
            oid = entry.etag if entry else None
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send(200, {"files": answer})

    def _lfs(self, body: bytes, _: dict, repo: str) -> None:
        objects = []
        for asked in json.loads(body)["objects"]:
            item = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.objects:
                item["actions"] = {
                    "upload": {"href": f"{self.hub.url}/upload/{asked['oid']}?X-Amz-Signature=signed", "header": {}},
                    "verify": {"href": f"{self.hub.url}/verify", "header": {}},
                }
            objects.append(item)
        self._send(200, {"transfer": "basic", "objects": objects})

    def _upload(self, body: bytes, _: dict, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._send(400, {"error": "hash differs"})
        self.hub.objects[oid] = body
        return self._send(200, {})

    def _verify(self, body: bytes, _: dict) -> None:
        asked = json.loads(body)
        known = len(self.hub.objects.get(asked["oid"], b"")) == asked["size"]
        self._send(200 if known else 404, {})

    def _commit(self, body: bytes, _: dict, repo: str, rev: str) -> None:
        oid, tree = self.hub.head(repo, rev)
        tree = dict(tree)
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header" and value.get("parentCommit") not in (None, oid):
                return self._send(412, {"error": "A commit has happened since."})
            if item["key"] == "file":
                tree[value["path"]] = Entry(base64.b64decode(value["content"]), False)
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self._send(400, {"error": f"{value['path']} was not uploaded"})
                tree[value["path"]] = Entry(self.hub.objects[value["oid"]], True)
            elif item["key"] == "deletedFile":
                del tree[value["path"]]
        oid = self.hub.commit(repo, rev, tree)
        return self._send(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "commitOid": oid, "success": True})

    def _described(self, path: str, entry: Entry) -> dict:
        described = {"type": "file", "path": path, "size": len(entry.content), "oid": entry.blob}
        if entry.large:
            described["lfs"] = {"oid": entry.sha256, "size": len(entry.content), "pointerSize": 134}
        return described

    def _tree(self, _: bytes, __: dict, repo: str, rev: str) -> None:
        self._send(200, [self._described(path, entry) for path, entry in self.hub.head(repo, rev)[1].items()])

    def _paths(self, body: bytes, _: dict, repo: str, rev: str) -> None:
        tree = self.hub.head(repo, rev)[1]
        kind = self.headers.get("Content-Type", "")
        asked = json.loads(body)["paths"] if "json" in kind else parse_qs(body.decode())["paths"]
        self._send(200, [self._described(path, tree[path]) for path in asked if path in tree])

    def _resolve(self, _: bytes, __: dict, repo: str, rev: str, path: str) -> None:
        try:
            oid, tree = self.hub.head(repo, rev)
        except StopIteration:
            return self._send(404, {}, {"X-Error-Code": "RevisionNotFound"})
        common = {"X-Repo-Commit": oid}
        if path not in tree:
            return self._send(404, {"error": "Entry not found"}, {**common, "X-Error-Code": "EntryNotFound"})
        entry = tree[path]
        return self._send(200, entry.content, {**common, "ETag": f'"{entry.etag}"', "Accept-Ranges": "none"})


@contextmanager
def serve() -> Iterator[LoopbackHub]:
    """Runs a Hub on a free port of 127.0.0.1 for as long as the block lasts."""
    hub = LoopbackHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
