"""A Hub on the loopback address: the endpoints that huggingface_hub calls, over repositories in memory.

It shows that the client is used rightly, not how the real Hub behaves.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".onnx", ".png", ".bin")
READ, WRITE = "hf_read", "hf_write"


class Refused(Exception):
    """An answer other than 200: status, message, and the code by which the client picks its exception."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass
class Repo:
    """One repository: commits by id, and what points to them."""

    private: bool = False
    allowed: set[str] | None = None  # the tokens that may read a gated one
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Put a commit on ``branch`` that holds ``files`` and nothing else, and return its id."""
        seen = repr(
            (len(self.commits), sorted((name, hashlib.sha256(data).hexdigest()) for name, data in files.items()))
        )
        oid = hashlib.sha1(seen.encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str:
        """Return the id of the commit that a branch, a tag or an id means."""
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid


def is_lfs(name: str) -> bool:
    return name.endswith(LFS_SUFFIXES)


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def oid_of(name: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if is_lfs(name) else git_oid(data)


class HubServer:
    """The Hub: its state, its faults, and what was asked of it.

    Attributes:
        tokens: Every token and whether it may write.
        asked: ``(endpoint, token)`` of every request, in order.
        interfere: By endpoint, called before the next request to it is handled; a status that it returns is the answer.
        cut_download: Bytes after which the next download of an LFS file breaks off.
        cut_uploads: Bytes after which every upload breaks off, until it is None again.
        flips: So many of the next downloads of an LFS file have their last byte flipped.
        ranges: The Range header of every download of an LFS file.
        lies: By endpoint, given the true answer, returns what is answered; bytes as they are.
        headers: Of every answer with a file, instead of the true ones.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.tokens = {READ: False, WRITE: True}
        self.asked: list[tuple[str, str]] = []
        self.interfere: dict[str, Callable[[], int | None]] = {}
        self.cut_download: int | None = None
        self.cut_uploads: int | None = None
        self.flips = 0
        self.ranges: list[str | None] = []
        self.lies: dict[str, Callable[[Any], Any]] = {}
        self.headers: dict[str, str] = {}
        self.lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    @property
    def url(self) -> str:
        """The address, http://127.0.0.1:PORT."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        """Stop answering and free the port; closing twice is harmless."""
        self._server.shutdown()
        for connection in self._server.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._server.server_close()
        self._thread.join()

    def add(self, repo: str, files: dict[str, bytes] | Path, private: bool = False, **settings: Any) -> Repo:
        """Put a repository there, with one commit of ``files`` or of what lies in a folder, and return it."""
        if isinstance(files, Path):
            files = {file.name: file.read_bytes() for file in files.iterdir()}
        self.repos[repo] = Repo(private, **settings)
        self.repos[repo].commit(files)
        return self.repos[repo]

    def environment(self, cache: Path, token: str | None = None) -> dict[str, str]:
        """Return the environment of a process whose Hub this is, with a cache of its own."""
        own = {
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        return kept | own | ({"HF_TOKEN": token} if token else {})


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.connections: list[socket.socket] = []

    def process_request(self, request: Any, client_address: Any) -> None:
        """Remember the connection, which the client keeps open."""
        self.connections.append(request)
        super().process_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that went away."""


ROUTES = {
    "create": ("POST", r"/api/repos/create"),
    "validate": ("POST", r"/api/validate-yaml"),
    "whoami": ("GET", r"/api/whoami-v2"),
    "info": ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?"),
    "refs": ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/refs"),
    "tree": ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)"),
    "preupload": ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)"),
    "commit": ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)"),
    "branch": ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<revision>[^/]+)"),
    "tag": ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/tag/(?P<revision>[^/]+)"),
    "batch": ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch"),
    "put": ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})"),
    "verify": ("POST", r"/lfs/verify"),
    "resolve": ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)"),
}
WRITES = ("create", "preupload", "commit", "branch", "tag", "batch")


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each small answer waits for an acknowledgement
    timeout = 20

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        path = urlsplit(self.path).path
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        found = [
            (name, match)
            for name, (needed, pattern) in ROUTES.items()
            if needed == method and (match := re.fullmatch(pattern, path))
        ]
        endpoint, match = found[0] if found else ("unknown", None)
        self.hub.asked.append((endpoint, self.token))
        try:
            body = self._body(endpoint)
            if (interfere := self.hub.interfere.pop(endpoint, None)) and (status := interfere()):
                raise Refused(status, "made to fail")
            self._check_token(endpoint)
            if match is None:
                raise Refused(404, f"no such endpoint: {path}")
            with self.hub.lock:
                given = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                answer = getattr(self, f"_{endpoint}")(body, **given)
            if endpoint in self.hub.lies:
                answer = self.hub.lies[endpoint](answer)
            if answer is not None:
                self._send(200, answer if isinstance(answer, bytes) else json.dumps(answer).encode())
        except Refused as error:
            headers = {"X-Error-Message": str(error), **({"X-Error-Code": error.code} if error.code else {})}
            self._send(error.status, json.dumps({"error": str(error)}).encode(), headers)

    def _body(self, endpoint: str) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        length = int(self.headers.get("Content-Length") or 0)
        if endpoint == "put" and self.hub.cut_uploads is not None and length > self.hub.cut_uploads:
            self.rfile.read(self.hub.cut_uploads)
            self._hang_up()
        return self.rfile.read(length)

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        raise ConnectionAbortedError

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:cut])
            if cut is not None:
                self.wfile.flush()
                self._hang_up()

    def _check_token(self, endpoint: str) -> None:
        if self.token and self.token not in self.hub.tokens:
            raise Refused(401, "Invalid credentials in Authorization header")
        if endpoint in (*WRITES, "whoami") and not self.token:
            raise Refused(401, "Invalid username or password.")
        if endpoint in WRITES and not self.hub.tokens[self.token]:
            raise Refused(403, "you must use a write token")

    def _repo(self, name: str) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self.token):
            if not self.token:
                raise Refused(401, "Invalid username or password.")
            raise Refused(404, "Repository not found", "RepoNotFound")
        return repo

    def _whoami(self, body: bytes) -> Any:
        return {"type": "user", "name": "someone", "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    def _create(self, body: bytes) -> Any:
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repos:
            self._send(409, json.dumps({"error": "You already created this model repo", "url": url}).encode())
            return None
        self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, _is_private(asked))
        return {"url": url, "name": name, "id": name}

    def _validate(self, body: bytes) -> Any:
        return {"errors": [], "warnings": []}

    def _info(self, body: bytes, repo: str, revision: str = "main") -> Any:
        held = self._repo(repo)
        oid = held.resolve(revision)
        return {
            "id": repo,
            "modelId": repo,
            "sha": oid,
            "private": held.private,
            "gated": "auto" if held.allowed is not None else False,
            "siblings": [
                {"rfilename": name, "size": len(data), "blobId": git_oid(data), **_lfs(name, data)}
                for name, data in held.commits[oid].items()
            ],
        }

    def _refs(self, body: bytes, repo: str) -> Any:
        held = self._repo(repo)

        def listed(names: dict[str, str], kind: str) -> list[dict[str, str]]:
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in names.items()]

        pulls = {name: oid for name, oid in held.branches.items() if name.startswith("refs/pr/")}
        branches = {name: oid for name, oid in held.branches.items() if name not in pulls}
        pull_requests = [{"name": name, "ref": name, "targetCommit": oid} for name, oid in pulls.items()]
        return {
            "branches": listed(branches, "heads"),
            "tags": listed(held.tags, "tags"),
            "converts": [],
            "pullRequests": pull_requests,
        }

    def _tree(self, body: bytes, repo: str, revision: str) -> Any:
        held = self._repo(repo)
        return [
            {"type": "file", "path": name, "size": len(data), "oid": git_oid(data), **_lfs(name, data)}
            for name, data in held.commits[held.resolve(revision)].items()
        ]

    def _preupload(self, body: bytes, repo: str, revision: str) -> Any:
        held = self._repo(repo)
        there = held.commits[held.resolve(revision)]
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_lfs(file["path"]) else "regular",
                    "shouldIgnore": False,
                    **({"oid": oid_of(file["path"], there[file["path"]])} if file["path"] in there else {}),
                }
                for file in json.loads(body)["files"]
            ]
        }

    def _batch(self, body: bytes, repo: str) -> Any:
        self._repo(repo)
        objects = json.loads(body)["objects"]
        for wanted in objects:
            if wanted["oid"] not in self.hub.blobs:
                wanted["actions"] = {
                    "upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}", "header": {}},
                    "verify": {"href": f"{self.hub.url}/lfs/verify", "header": {}},
                }
        return {"transfer": "basic", "objects": objects}

    def _put(self, body: bytes, oid: str) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "the content is not what its sha256 says")
        self.hub.blobs[oid] = body
        return {}

    def _verify(self, body: bytes) -> Any:
        asked = json.loads(body)
        if len(self.hub.blobs.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(404, "no such object")
        return {}

    def _commit(self, body: bytes, repo: str, revision: str) -> Any:
        held = self._repo(repo)
        base = held.resolve(revision)
        lines = [json.loads(line) for line in body.splitlines()]
        if lines[0]["value"].get("parentCommit", base) != base:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(held.commits[base])
        for line in lines[1:]:
            value, path = line["value"], line["value"]["path"]
            if line["key"] == "file":
                files[path] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise Refused(400, f"{path} was not uploaded")
                files[path] = self.hub.blobs[value["oid"]]
            else:
                files = {name: data for name, data in files.items() if name != path and not name.startswith(f"{path}/")}
        answer: dict[str, Any] = {"success": True}
        if parse_qs(urlsplit(self.path).query).get("create_pr") == ["1"]:
            revision = f"refs/pr/{1 + sum(name.startswith('refs/pr/') for name in held.branches)}"
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{revision.rpartition('/')[2]}"
        oid = held.commit(files, revision)
        return answer | {"commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"}

    def _branch(self, body: bytes, repo: str, revision: str) -> Any:
        held = self._repo(repo)
        if revision in held.branches:
            raise Refused(409, "Reference already exists")
        held.branches[revision] = held.resolve((json.loads(body or b"{}") or {}).get("startingPoint") or "main")
        return {}

    def _tag(self, body: bytes, repo: str, revision: str) -> Any:
        held, tag = self._repo(repo), json.loads(body)["tag"]
        if tag in held.tags:
            raise Refused(409, f"Tag {tag} already exists")
        held.tags[tag] = held.resolve(revision)
        return {}

    def _resolve(self, body: bytes, repo: str, revision: str, name: str) -> Any:
        held = self._repo(repo)
        if held.allowed is not None and self.token not in held.allowed:
            raise Refused(403 if self.token else 401, f"Access to model {repo} is restricted", "GatedRepo")
        oid = held.resolve(revision)
        if name not in held.commits[oid]:
            raise Refused(404, "Entry not found", "EntryNotFound")
        data = held.commits[oid][name]
        headers = {"X-Repo-Commit": oid, "ETag": f'"{oid_of(name, data)}"', "Accept-Ranges": "bytes"}
        if not is_lfs(name):
            return self._send(200, data, headers | self.hub.headers)
        headers |= {"X-Linked-Etag": f'"{oid_of(name, data)}"', "X-Linked-Size": str(len(data))} | self.hub.headers
        if self.command == "HEAD":
            return self._send(200, data, headers)
        return self._send_lfs(data, headers)

    def _send_lfs(self, data: bytes, headers: dict[str, str]) -> None:
        wanted = self.headers.get("Range")
        self.hub.ranges.append(wanted)
        if self.hub.flips:
            self.hub.flips -= 1
            data = data[:-1] + bytes([data[-1] ^ 1])
        cut, self.hub.cut_download = self.hub.cut_download, None
        if not wanted:
            return self._send(200, data, headers, cut)
        start = int(wanted.removeprefix("bytes=").partition("-")[0])
        headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return self._send(206, data[start:], headers, cut)


def _is_private(asked: dict[str, Any]) -> bool:
    return asked.get("visibility") == "private" or bool(asked.get("private"))


def _lfs(name: str, data: bytes) -> dict[str, Any]:
    if not is_lfs(name):
        return {}
    sha256 = hashlib.sha256(data).hexdigest()
    return {"lfs": {"oid": sha256, "sha256": sha256, "size": len(data), "pointerSize": 130}}
