"""A stand-in of the Hugging Face hub on this machine: just enough of its protocol for downloading and for uploading.

It keeps repositories in memory. Files that git would hold are committed as they are; those named *.safetensors go through
LFS: a batch request says which are missing, each is uploaded by its digest, then the commit names them.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

POLL_SECONDS = 0.01  # a server that is told to end looks as often; by default each test would wait half a second

TOKEN = "hf_of_someone"


@dataclass
class Repository:
    """Files by name. `commits` are ids, the newest last."""

    files: dict[str, bytes] = field(default_factory=dict)
    private: bool = False
    commits: list[str] = field(default_factory=list)


@dataclass
class State:
    """Everything the hub has, and what a test may turn: a digest that is wrong, uploads that break off."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    """LFS objects by SHA-256, committed or not."""
    served: list[str] = field(default_factory=list)
    revisions: set[str] = field(default_factory=set)
    """Of which files were asked for."""
    received: list[str] = field(default_factory=list)
    """SHA-256 of every LFS object that was uploaded."""
    lie_about: str | None = None
    """The file of which a wrong digest is told."""
    uploads_left: int | None = None
    """After so many uploads the next ones are refused; None for no limit."""
    url: str = ""

    def add(self, name: str, files: dict[str, bytes]) -> None:
        self.repositories[name] = Repository(dict(files), commits=[commit_id(name, files)])


def commit_id(name: str, files: dict[str, bytes]) -> str:
    content = [(file, hashlib.sha256(data).hexdigest()) for file, data in sorted(files.items())]
    return hashlib.sha1(json.dumps([name, content]).encode()).hexdigest()


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    state: State

    def do_GET(self) -> None:
        path = unquote(self.path.split("?")[0])
        for name, repository in self.state.repositories.items():
            if repository.private and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                continue
            if path.startswith(f"/api/models/{name}"):
                return self._info(name, repository, path)
            if path.startswith(f"/{name}/resolve/"):
                revision, _, file = path.removeprefix(f"/{name}/resolve/").partition("/")
                self.state.revisions.add(revision)
                return self._file(repository, file)
        return self._respond(b"{}", {"X-Error-Code": "RepoNotFound"}, 404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path, body = unquote(self.path.split("?")[0]), self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/validate-yaml":
            return self._json({"warnings": [], "errors": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._json({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.endswith("/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        name, _, action = path.removeprefix("/api/models/").rpartition("/")[0].rpartition("/")
        if action == "preupload":
            return self._preupload(json.loads(body))
        if action == "commit":
            return self._commit(name, [json.loads(line) for line in body.splitlines()])
        return self._json({}, 404)

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.state.uploads_left is not None:
            self.state.uploads_left -= 1
            if self.state.uploads_left < 0:
                return self._json({"error": "the line is cut"}, 403)
        digest = self.path.rpartition("/")[2]
        assert hashlib.sha256(data).hexdigest() == digest
        self.state.objects[digest] = data
        self.state.received.append(digest)
        return self._respond(b"", {})

    def _info(self, name: str, repository: Repository, path: str) -> None:
        siblings = [self._sibling(file, data) for file, data in sorted(repository.files.items())]
        if "/tree/" in path:
            tree = [{"type": "file", "path": s["rfilename"], "size": s["size"], "oid": s["blobId"]} for s in siblings]
            return self._json(tree)
        if "blobs=true" not in self.path.lower():  # sizes and digests are told to those who ask for them
            siblings = [{"rfilename": each["rfilename"]} for each in siblings]
        about = {"tags": [], "private": repository.private, "downloads": 0, "likes": 0}
        return self._json({"id": name, "modelId": name, "sha": repository.commits[-1], "siblings": siblings, **about})

    def _sibling(self, name: str, data: bytes) -> dict:
        about = {"rfilename": name, "blobId": blob_id(data), "size": len(data)}
        if not name.endswith(".safetensors"):
            return about
        sha256 = "0" * 64 if name == self.state.lie_about else hashlib.sha256(data).hexdigest()
        return about | {"lfs": {"sha256": sha256, "size": len(data), "pointerSize": 130}}

    def _file(self, repository: Repository, name: str) -> None:
        if name not in repository.files:
            return self._respond(b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repository.commits[-1]}, 404)
        data = repository.files[name]
        if self.command == "GET":
            self.state.served.append(name)
        etag = hashlib.sha256(data).hexdigest()
        return self._respond(data, {"ETag": f'"{etag}"', "X-Repo-Commit": repository.commits[-1]})

    def _create(self, asked: dict) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.state.url}/{name}"}
        if name in self.state.repositories:
            return self._json({"error": "You already created this model repo"} | url, 409)
        private = asked.get("private") or asked.get("visibility") == "private"
        self.state.repositories[name] = Repository(private=private, files={".gitattributes": b""}, commits=["0" * 40])
        return self._json(url)

    def _preupload(self, asked: dict) -> None:
        modes = {True: "lfs", False: "regular"}
        files = [
            {"path": f["path"], "uploadMode": modes[f["path"].endswith(".safetensors")], "shouldIgnore": False}
            for f in asked["files"]
        ]
        return self._json({"files": files})

    def _batch(self, asked: dict) -> None:
        objects = []
        for each in asked["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.state.url}/lfs/{each['oid']}", "header": {}}}}
            objects.append(each | ({} if each["oid"] in self.state.objects else upload))
        return self._json({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, lines: list[dict]) -> None:
        repository = self.state.repositories[name]
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                repository.files[value["path"]] = self.state.objects[value["oid"]]
            elif key == "deletedFile":
                del repository.files[value["path"]]
        repository.commits.append(commit_id(name, repository.files))
        oid = repository.commits[-1]
        return self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.state.url}/{name}/commit/{oid}"})

    def _json(self, value: object, status: int = 200) -> None:
        self._respond(json.dumps(value).encode(), {"Content-Type": "application/json"}, status)

    def _respond(self, body: bytes, headers: dict, status: int = 200) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


@contextmanager
def hub() -> Iterator[State]:
    """A hub on a free port; `url` is its address."""
    state = State()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OneHub", (Handler,), {"state": state}))
    state.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(POLL_SECONDS,), daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()


def environment(state: State, home: Path, token: str | None = TOKEN) -> dict[str, str]:
    """The variables by which huggingface_hub finds the stand-in, with a cache of its own in `home`.

    It reads them when it is imported, so they are for a process that is still to start.
    """
    found = {"HF_ENDPOINT": state.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    return found | ({"HF_TOKEN": token} if token else {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"})


def use_here(state: State, patch: pytest.MonkeyPatch, cache: Path | None = None) -> None:
    """Let this process take `state` for the hub: it read the environment when it imported huggingface_hub.

    cache: in place of the user's cache of downloads.
    """
    from huggingface_hub import constants, hf_api

    patch.setattr(constants, "ENDPOINT", state.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", state.url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    patch.setattr(hf_api.api, "endpoint", state.url)
    if cache is not None:
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
