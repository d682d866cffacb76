"""The hub code against a local stand-in of the Hugging Face hub."""

import hashlib
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from project_imports import ROOT

from gptoss_nf4.source.model import HUB_PATTERNS
from gptoss_nf4.storage.writing import git_blob_sha1

REPOSITORY, COMMIT = "someone/tiny-gpt-oss", "0123456789abcdef0123456789abcdef01234567"
SCRIPT = """
import json, sys
from gptoss_nf4.errors import UserError
from gptoss_nf4.fetch.fetch import fetch
from gptoss_nf4.source.model import Model, open_source
from gptoss_nf4.storage.artifacts import Artifacts
from pathlib import Path
model = Model(name="tiny", kind="hub", repository=sys.argv[1], revision=None)
try:
    manifest = fetch(model, Artifacts(Path(sys.argv[2])))
    print(json.dumps([manifest["source"], open_source(model, Artifacts(Path(sys.argv[2]))).layout]))
except UserError as error:
    sys.exit(str(error))
"""


class Hub(BaseHTTPRequestHandler):
    """Just enough of the hub's protocol: model info, tree, and files with their digests."""

    directory: Path
    lie_about: str | None = None
    served: list[str]

    def _digests(self, path: Path) -> dict:
        data = path.read_bytes()
        if path.suffix != ".safetensors":
            return {"rfilename": path.name, "blobId": git_blob_sha1(path), "size": len(data)}
        sha256 = "0" * 64 if path.name == self.lie_about else hashlib.sha256(data).hexdigest()
        lfs = {"sha256": sha256, "size": len(data), "pointerSize": 130}
        return {"rfilename": path.name, "blobId": "f" * 40, "size": len(data), "lfs": lfs}

    def _respond(self, body: bytes, headers: dict, status: int = 200) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path.startswith(f"/api/models/{REPOSITORY}"):
            siblings = [self._digests(file) for file in sorted(self.directory.iterdir())]
            info = {
                "id": REPOSITORY,
                "modelId": REPOSITORY,
                "sha": COMMIT,
                "siblings": siblings,
                "tags": [],
                "private": False,
                "downloads": 0,
                "likes": 0,
            }
            if "/tree/" in path:
                info = [{"type": "file", "path": s["rfilename"], "size": s["size"], "oid": s["blobId"]} for s in siblings]
            self._respond(json.dumps(info).encode(), {"Content-Type": "application/json"})
        elif path.startswith(f"/{REPOSITORY}/resolve/"):
            file = self.directory / path.rsplit("/", 1)[-1]
            if not file.is_file():
                self._respond(b"", {"X-Error-Code": "EntryNotFound"}, 404)
                return
            data = file.read_bytes()
            if self.command == "GET":
                self.served.append(file.name)
            etag = hashlib.sha256(data).hexdigest()
            self._respond(data, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        else:
            self._respond(b"{}", {"X-Error-Code": "RepoNotFound"}, 404)

    do_HEAD = do_GET

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def hub(source_copy, monkeypatch, tmp_path):
    (source_copy / "pytorch_model.bin").write_bytes(b"a pickle that nobody asked for")
    handler = type("Handler", (Hub,), {"directory": source_copy, "served": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield handler
    server.shutdown()


def run_fetch(tmp_path: Path, repository: str = REPOSITORY) -> subprocess.CompletedProcess:
    """In a process of its own, since huggingface_hub reads the environment when it is imported."""
    command = [sys.executable, "-c", SCRIPT, repository, str(tmp_path / "artifacts")]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_hub_model_is_downloaded_once_and_its_commit_recorded(hub, tmp_path):
    done = run_fetch(tmp_path)
    assert done.returncode == 0, done.stderr
    origin, layout = json.loads(done.stdout)
    assert origin == {"kind": "hub", "repository": REPOSITORY, "commit": COMMIT}
    assert layout == "split"
    assert "pytorch_model.bin" not in hub.served, HUB_PATTERNS
    assert len([name for name in hub.served if name.endswith(".safetensors")]) == 3
    assert run_fetch(tmp_path).returncode == 0
    assert len([name for name in hub.served if name.endswith(".safetensors")]) == 3


def test_a_wrong_digest_is_found(hub, tmp_path):
    hub.lie_about = "model-00002-of-00003.safetensors"
    done = run_fetch(tmp_path)
    assert done.returncode == 1
    assert "wrong digest" in done.stderr
    assert "model-00002-of-00003.safetensors" in done.stderr


def test_an_absent_repository_is_one_line(hub, tmp_path):
    done = run_fetch(tmp_path, "someone/else")
    assert done.returncode == 1
    assert "no such repository" in done.stderr
    assert "Traceback" not in done.stderr
