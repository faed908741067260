"""The hub stub speaks the hub's protocol, to plain HTTP and to the real `huggingface_hub` client.

It is the ground that CAPABILITIES C4 is tested on, so its own answers are checked first.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import pytest

from tests.hubclient import answer, client_env, outside_addresses, run_python
from tests.hubstub import HubStub

TOKEN = "hf_planted_in_a_test"
WEIGHTS = bytes(range(256)) * 40


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubStub]:
    root = tmp_path_factory.mktemp("repos")
    for name in ("open", "closed"):
        (root / name / "sub" / "deep").mkdir(parents=True)
        (root / name / "config.json").write_text("{}")
        (root / name / "weights.bin").write_bytes(WEIGHTS)
        (root / name / "sub" / "a b.txt").write_text("a space")
        (root / name / "sub" / "deep" / "c.txt").write_text("deep")
    (root / "secret.txt").write_text("outside of every repository")
    models = {"org/open": root / "open", "org/closed": root / "closed"}
    with HubStub(
        models=models, datasets={"org/rows": root / "open"}, private={"org/closed": TOKEN}
    ) as hub:
        yield hub


def ask(
    hub: HubStub, path: str, method: str = "GET", body: str | None = None, **headers: str
) -> tuple[HTTPResponse, bytes]:
    connection = HTTPConnection(hub.url.removeprefix("http://"), timeout=10)
    connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response, content


def ask_json(hub: HubStub, path: str, body: str | None = None) -> Any:
    response, content = ask(hub, path, "POST" if body else "GET", body)
    assert response.status == 200
    return json.loads(content)


def test_head_tells_size_etag_and_commit_without_a_body(hub: HubStub) -> None:
    """C4: what a client needs before it downloads; the ETag is git's own hash of the file."""
    response, content = ask(hub, "/org/open/resolve/main/weights.bin", "HEAD")
    file = hub.repos["models", "org/open"].root / "weights.bin"
    blob = subprocess.run(
        ["git", "hash-object", "--no-filters", file], capture_output=True, text=True, check=True
    )
    assert (response.status, content) == (200, b"")
    assert response.headers["Content-Length"] == str(len(WEIGHTS))
    assert response.headers["ETag"] == f'"{blob.stdout.strip()}"'
    commit = response.headers["X-Repo-Commit"]
    assert ask_json(hub, "/api/models/org/open")["sha"] == commit
    assert ask(hub, f"/org/open/resolve/{commit}/weights.bin")[1] == WEIGHTS


@pytest.mark.parametrize(
    ("wanted", "first", "last"),
    [
        ("bytes=0-0", 0, 0),
        ("bytes=10000-", 10000, 10239),
        ("bytes=10-99999", 10, 10239),
        ("bytes=-3", 10237, 10239),
    ],
)
def test_ranges(hub: HubStub, wanted: str, first: int, last: int) -> None:
    """C4: partial downloads resume; 10,240 bytes are served as RFC 9110 counts them."""
    response, content = ask(hub, "/org/open/resolve/main/weights.bin", Range=wanted)
    assert response.status == 206
    assert response.headers["Content-Range"] == f"bytes {first}-{last}/10240"
    assert content == WEIGHTS[first : last + 1]


def test_ranges_that_cannot_be_served(hub: HubStub) -> None:
    """C4: a range past the end is refused, one that cannot be read is ignored."""
    response, _ = ask(hub, "/org/open/resolve/main/weights.bin", Range="bytes=10240-")
    assert (response.status, response.headers["Content-Range"]) == (416, "bytes */10240")
    assert ask(hub, "/org/open/resolve/main/weights.bin", Range="lines=1-2")[0].status == 200


@pytest.mark.parametrize(
    ("path", "token", "status", "code"),
    [
        ("/org/open/resolve/main/absent.json", None, 404, "EntryNotFound"),
        ("/org/open/resolve/main/../secret.txt", None, 404, "EntryNotFound"),
        ("/org/open/resolve/main/%2e%2e/secret.txt", None, 404, "EntryNotFound"),
        ("/api/models/org/open/tree/main/absent", None, 404, "EntryNotFound"),
        ("/org/open/resolve/v9/config.json", None, 404, "RevisionNotFound"),
        ("/api/datasets/org/open", "any", 404, "RepoNotFound"),
        ("/api/models/org/absent", "any", 404, "RepoNotFound"),
        ("/api/models/org/absent", None, 401, "RepoNotFound"),
        ("/org/closed/resolve/main/config.json", None, 401, "RepoNotFound"),
        ("/org/closed/resolve/main/config.json", "wrong", 404, "RepoNotFound"),
        ("/org/closed/resolve/main/config.json", TOKEN, 200, None),
        ("//org/open/resolve/main/config.json", None, 404, None),
    ],
)
def test_refusals(
    hub: HubStub, path: str, token: str | None, status: int, code: str | None
) -> None:
    """C4: every refusal carries the hub's code; the log shows that a token came, never which."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    response, _ = ask(hub, path, **headers)
    assert (response.status, response.headers["X-Error-Code"]) == (status, code)
    last = hub.requests[-1]
    assert (last.method, last.path, last.status, last.authorized) == (
        "GET",
        path,
        status,
        bool(token),
    )
    assert TOKEN not in repr(hub.requests)


def test_listings(hub: HubStub) -> None:
    """C4: tree and paths-info list files and folders; a path that is absent is left out."""
    flat = ask_json(hub, "/api/models/org/open/tree/main?recursive=false")
    assert [(e["type"], e["path"]) for e in flat] == [
        ("file", "config.json"),
        ("directory", "sub"),
        ("file", "weights.bin"),
    ]
    deep = ask_json(hub, "/api/models/org/open/tree/main/sub?recursive=true")
    assert [e["path"] for e in deep] == ["sub/a b.txt", "sub/deep", "sub/deep/c.txt"]
    some = ask_json(
        hub, "/api/models/org/open/paths-info/main", "paths=weights.bin&paths=sub&paths=absent"
    )
    assert [(e["type"], e["path"], e["size"]) for e in some] == [
        ("file", "weights.bin", 10240),
        ("directory", "sub", 0),
    ]


def test_token_for_an_unknown_repository_is_a_mistake(tmp_path: Path) -> None:
    """C4: a misspelt `private` would make a test pass without any protection."""
    with pytest.raises(ValueError, match="org/x"):
        HubStub(models={"org/y": tmp_path}, private={"org/x": TOKEN})


CLIENT = """
import json, os
from huggingface_hub import HfApi, HfFileSystem, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

def error(call):
    try:
        call()
    except HfHubHTTPError as problem:
        return type(problem).__name__
    return "none"

api = HfApi()
with HfFileSystem().open("org/open/weights.bin", block_size=1000) as file:
    file.seek(5000)
    middle = list(file.read(10))
snapshot = snapshot_download("org/rows", repo_type="dataset")
print(json.dumps({
    "info": [s.rfilename for s in api.model_info("org/open").siblings],
    "tree": [e.path for e in api.list_repo_tree("org/open", recursive=True)],
    "paths": [e.path for e in api.get_paths_info("org/open", ["sub", "nothing"])],
    "middle": middle,
    "spaced": open(hf_hub_download("org/open", "sub/a b.txt")).read(),
    "snapshot": sorted(os.listdir(snapshot)),
    "no file": error(lambda: hf_hub_download("org/open", "absent.json")),
    "no revision": error(lambda: hf_hub_download("org/open", "config.json", revision="v9")),
    "no repository": error(lambda: api.model_info("org/absent")),
    "no token": error(lambda: hf_hub_download("org/closed", "config.json", token=False)),
    "token": error(lambda: hf_hub_download("org/closed", "config.json")),
}))
"""


def test_the_real_client_is_served(hub: HubStub, tmp_path: Path) -> None:
    """C4: `huggingface_hub` reads, lists and fails at the stub as it does at the hub."""
    got = answer(run_python(CLIENT, client_env(tmp_path, hub.url, HF_TOKEN=TOKEN)))
    files = ["config.json", "sub/a b.txt", "sub/deep/c.txt", "weights.bin"]
    assert got == {
        "info": files,
        "tree": sorted([*files, "sub", "sub/deep"]),
        "paths": ["sub"],
        "middle": list(WEIGHTS[5000:5010]),
        "spaced": "a space",
        "snapshot": ["config.json", "sub", "weights.bin"],
        "no file": "RemoteEntryNotFoundError",
        "no revision": "RevisionNotFoundError",
        "no repository": "RepositoryNotFoundError",
        "no token": "RepositoryNotFoundError",
        "token": "none",
    }
    assert outside_addresses(tmp_path) == set()
    assert hub.fetched("org/rows") == set(files)


def test_the_guard_sees_and_refuses_other_hosts(hub: HubStub, tmp_path: Path) -> None:
    """C4: `outside_addresses` is empty only because nothing went out, not because it is blind."""
    code = (
        "import socket\n"
        "try:\n    socket.create_connection(('192.0.2.1', 443), timeout=5)\n"
        "except OSError as error:\n    print(error)\n"
    )
    done = run_python(code, client_env(tmp_path, hub.url))
    assert "refused by the test's guard" in done.stdout
    assert outside_addresses(tmp_path) == {"192.0.2.1"}
