"""The hub code against a local stand-in of the Hugging Face hub."""

import json
import subprocess
import sys
from pathlib import Path

import hub_stand_in
import pytest
from project_imports import ROOT

from gptoss_nf4.source.model import HUB_PATTERNS

REPOSITORY = "someone/tiny-gpt-oss"
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
    print(json.dumps([manifest["source"], manifest["license"], open_source(model, Artifacts(Path(sys.argv[2]))).layout]))
except UserError as error:
    sys.exit(str(error))
"""


@pytest.fixture
def hub(source_copy, monkeypatch, tmp_path):
    (source_copy / "pytorch_model.bin").write_bytes(b"a pickle that nobody asked for")
    (source_copy / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    with hub_stand_in.hub() as state:
        state.add(REPOSITORY, {file.name: file.read_bytes() for file in source_copy.iterdir()})
        for key, value in hub_stand_in.environment(state, tmp_path / "hf", token=None).items():
            monkeypatch.setenv(key, value)
        yield state


def run_fetch(tmp_path: Path, repository: str = REPOSITORY) -> subprocess.CompletedProcess:
    """In a process of its own, since huggingface_hub reads the environment when it is imported."""
    command = [sys.executable, "-c", SCRIPT, repository, str(tmp_path / "artifacts")]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_hub_model_is_downloaded_once_and_its_commit_recorded(hub, tmp_path):
    done = run_fetch(tmp_path)
    assert done.returncode == 0, done.stderr
    origin, licence, layout = json.loads(done.stdout)
    assert origin == {"kind": "hub", "repository": REPOSITORY, "commit": hub.repositories[REPOSITORY].commits[-1]}
    assert licence == "apache-2.0"
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


def test_a_hub_that_does_not_answer_is_one_line(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    done = run_fetch(tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"download failed: {REPOSITORY}: got ")
    assert "Traceback" not in done.stderr
