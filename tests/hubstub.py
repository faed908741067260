"""A loopback stand-in for the Hugging Face hub that the real clients talk to.

`HubStub` serves model and data set repositories from local directories: the API calls that
`huggingface_hub` 2.4, `datasets` 5.2 and `transformers` 5.23 were seen to make (repository info,
tree, paths-info, resolve with ranges), with the hub's own headers and error codes. It keeps a log
of all requests, in which an authorization header appears as a yes or no and never with its value.

    with HubStub(models={"org/tiny": model_dir}, datasets={"org/pairs": data_dir}) as hub:
        subprocess.run(command, env=client_env(hub.url, tmp_path))
        assert hub.fetched("org/tiny")
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote

API = re.compile(
    r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(/.*)?)?"
)
RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
DATE = "2026-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class Request:
    """One request as the stub saw it; `authorized` says only that a token came, never which."""

    method: str
    path: str
    status: int
    authorized: bool


@dataclass(frozen=True)
class Repo:
    """A repository's files as they were when the stub started: path -> (size, git blob id)."""

    kind: str
    name: str
    root: Path
    token: str | None = None
    files: dict[str, tuple[int, str]] = field(default_factory=dict)

    @classmethod
    def scan(cls, kind: str, name: str, root: Path, token: str | None) -> Repo:
        if not root.is_dir():
            raise NotADirectoryError(f"HubStub: {kind} {name!r}: {root} is not a directory")
        repo = cls(kind, name, root, token)
        for path in sorted(p for p in root.rglob("*") if p.is_file()):
            body = path.read_bytes()
            oid = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
            repo.files[path.relative_to(root).as_posix()] = (len(body), oid)
        return repo

    @property
    def commit(self) -> str:
        return hashlib.sha1(json.dumps([self.name, self.files]).encode()).hexdigest()

    def knows(self, revision: str) -> bool:
        return revision in ("main", "refs/heads/main", self.commit)

    def folders(self) -> set[str]:
        return {p.as_posix() for name in self.files for p in Path(name).parents} - {"."}

    def entry(self, path: str) -> dict[str, Any]:
        if path in self.files:
            size, oid = self.files[path]
            return {"type": "file", "path": path, "size": size, "oid": oid}
        return {"type": "directory", "path": path, "size": 0, "oid": _sha1(self.name + path)}

    def info(self) -> dict[str, Any]:
        return {
            "_id": self.commit[:24],
            "id": self.name,
            "modelId": self.name,
            "author": self.name.split("/")[0],
            "sha": self.commit,
            "private": self.token is not None,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "createdAt": DATE,
            "lastModified": DATE,
            "siblings": [{"rfilename": name} for name in self.files],
        }


class HubStub:
    """Serves the given directories as hub repositories on a free port of 127.0.0.1.

    `models` and `datasets` map `"org/name"` to a directory. `private` maps a repository's name to
    the token that it needs; without it the answer is the one for a repository that is not there.
    `signed` maps a target with its query (`/bucket/x.jsonl?X-Amz-Signature=...`) to a file's bytes,
    as an object store serves a signed link: any other query there is refused with 403.
    """

    def __init__(
        self,
        models: Mapping[str, Path | str] | None = None,
        datasets: Mapping[str, Path | str] | None = None,
        private: Mapping[str, str] | None = None,
        signed: Mapping[str, bytes] | None = None,
    ) -> None:
        self.signed = dict(signed or {})
        tokens = dict(private or {})
        self.repos = {
            (kind, name): Repo.scan(kind, name, Path(root), tokens.get(name))
            for kind, repos in (("models", models), ("datasets", datasets))
            for name, root in (repos or {}).items()
        }
        unknown = tokens.keys() - {name for _, name in self.repos}
        if unknown:
            raise ValueError(
                f"HubStub: private {sorted(unknown)}: not among the repositories given"
            )
        self._log: list[Request] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_for(self))
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )

    @property
    def url(self) -> str:
        """The endpoint, without a trailing slash."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def requests(self) -> list[Request]:
        """All requests so far, in the order in which they were answered."""
        with self._lock:
            return list(self._log)

    def fetched(self, name: str) -> set[str]:
        """Paths of the repository's files that were downloaded (GET, answered 200 or 206)."""
        found = (RESOLVE.fullmatch(r.path) for r in self.requests if _is_download(r))
        return {unquote(m[4]) for m in found if m and m[2] == name}

    def record(self, request: Request) -> None:
        with self._lock:
            self._log.append(request)

    def __enter__(self) -> HubStub:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)


@dataclass(frozen=True)
class _Answer:
    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Target:
    """What a request line asks for; `rest` is a path inside the repository."""

    kind: str
    name: str
    action: str
    revision: str
    rest: str
    recursive: bool = False

    @classmethod
    def parse(cls, target: str) -> _Target | None:
        # Matched before unquoting: a revision such as refs%2Fconvert%2Fparquet is one segment.
        path, _, query = target.partition("?")
        if match := RESOLVE.fullmatch(path):
            kind = "datasets" if match[1] else "models"
            return cls(kind, match[2], "resolve", unquote(match[3]), unquote(match[4]))
        if match := API.fullmatch(path):
            recursive = parse_qs(query).get("recursive", [""])[0].lower() == "true"
            rest = unquote(match[5] or "").strip("/")
            revision = unquote(match[4] or "main")
            return cls(match[1], match[2], match[3] or "revision", revision, rest, recursive)
        return None


def _handler_for(hub: HubStub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Headers and body are two writes: with Nagle's algorithm each answer may wait 40 ms.
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            self._reply()

        def do_HEAD(self) -> None:
            self._reply()

        def do_POST(self) -> None:
            self._reply()

        def log_message(self, format: str, *args: object) -> None:
            return  # `requests` is the log; stderr belongs to the test

        def _reply(self) -> None:
            # Not self.path: http.server turns a leading `//` into `/`, which hides the very
            # defect that a trailing slash in HF_ENDPOINT causes.
            target = self.requestline.split()[1]
            form = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            answer = _answer(hub, target, form, self.headers)
            authorized = "Authorization" in self.headers
            hub.record(Request(self.command, target, answer.status, authorized))
            self.send_response(answer.status)
            for key, value in answer.headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)

    return Handler


def _answer(hub: HubStub, target: str, form: bytes, headers: Message) -> _Answer:
    if target in hub.signed:
        return _Answer(200, hub.signed[target], {"Content-Type": "application/octet-stream"})
    if target.partition("?")[0] in {link.partition("?")[0] for link in hub.signed}:
        return _error(403, None, "SignatureDoesNotMatch")
    asked = _Target.parse(target)
    if asked is None:
        return _error(404, None, "Sorry, we can't find the page you are looking for.")
    repo = hub.repos.get((asked.kind, asked.name))
    token = headers.get("Authorization", "")
    if repo is None or (repo.token and token != f"Bearer {repo.token}"):
        if token:
            return _error(404, "RepoNotFound", "Repository not found")
        # Who is not logged in learns nothing about what exists: 401, as the hub has it since 2022.
        # Over https the client takes a bare 401 for a missing repository; over http it needs codes.
        return _error(401, "RepoNotFound", "Invalid username or password.")
    if not repo.knows(asked.revision):
        return _error(404, "RevisionNotFound", f"Invalid rev id: {asked.revision}")
    if asked.action == "resolve":
        return _resolve(repo, asked.rest, headers.get("Range"))
    if asked.action == "tree":
        return _tree(repo, asked.rest, asked.recursive)
    if asked.action == "paths-info":
        known = repo.files.keys() | repo.folders()
        return _json([repo.entry(path) for path in _wanted(form) if path in known])
    return _json(repo.info())


def _resolve(repo: Repo, path: str, wanted: str | None) -> _Answer:
    if path not in repo.files:  # names, not the file system: `..` leads nowhere
        return _error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": repo.commit})
    body, oid = (repo.root / path).read_bytes(), repo.files[path][1]
    shown = {"ETag": f'"{oid}"', "X-Repo-Commit": repo.commit, "Accept-Ranges": "bytes"}
    shown["Content-Type"] = "application/octet-stream"
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted or "")
    if not match or not (match[1] or match[2]):
        return _Answer(200, body, shown)  # RFC 9110: a range that is not understood is ignored
    if match[1]:
        start, end = int(match[1]), min(int(match[2] or len(body)), len(body) - 1)
    else:
        start, end = max(len(body) - int(match[2]), 0), len(body) - 1
    if start > end:
        return _error(416, None, "Range Not Satisfiable", {"Content-Range": f"bytes */{len(body)}"})
    shown["Content-Range"] = f"bytes {start}-{end}/{len(body)}"
    return _Answer(206, body[start : end + 1], shown)


def _tree(repo: Repo, folder: str, recursive: bool) -> _Answer:
    if folder and folder not in repo.folders():
        return _error(404, "EntryNotFound", f"{folder} does not exist on main")
    inside = [
        name
        for name in sorted(repo.files.keys() | repo.folders())
        if (not folder or name.startswith(f"{folder}/"))
        and (recursive or Path(name).parent == Path(folder))
    ]
    return _json([repo.entry(name) for name in inside])


def _wanted(form: bytes) -> list[str]:
    """The `paths` of a paths-info request, sent as a form or as JSON."""
    if form.startswith(b"{"):
        return list(json.loads(form)["paths"])
    return parse_qs(form.decode())["paths"]


def _json(value: Any) -> _Answer:
    return _Answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})


def _error(
    status: int, code: str | None, message: str, headers: Mapping[str, str] | None = None
) -> _Answer:
    shown = {"Content-Type": "application/json", "X-Error-Message": message, **(headers or {})}
    if code:
        shown["X-Error-Code"] = code
    return _Answer(status, json.dumps({"error": message}).encode(), shown)


def _is_download(request: Request) -> bool:
    return request.method == "GET" and request.status in (200, 206)


def _sha1(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()
