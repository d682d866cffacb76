"""Where vLLM's checkpoint lies: a directory, or what the Hub's cache holds of a repository. Nothing asks a network."""

import json
import socket
from pathlib import Path

import pytest
from huggingface_hub import constants

from gptoss_nf4.storage.checkpoint import INDEX_FILE
from gptoss_nf4.vllm.places import directory_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put(directory: Path, *files: str) -> Path:
    """A checkpoint's index, which names a.safetensors and b.safetensors, and `files` beside it."""
    directory.mkdir(parents=True)
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    for file in files:
        (directory / file).touch()
    return directory


@pytest.fixture
def cached(tmp_path, monkeypatch) -> Path:
    """The place of the snapshot of me/mine, which is in the cache under its default branch."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    repository = tmp_path / "hub/models--me--mine"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT)
    return repository / "snapshots" / COMMIT


def test_a_directory_counts_by_its_index_alone(cached, tmp_path):
    assert directory_of(str(put(tmp_path / "here")), None) == tmp_path / "here"
    put(tmp_path / "me/mine")
    put(cached, "a.safetensors", "b.safetensors")
    assert directory_of("me/mine", None) == Path("me/mine"), "as vLLM, which prefers what is here"
    (tmp_path / "empty").mkdir()
    for other in ("empty", "/nowhere", "s3://bucket/mine", "some/where/else"):
        assert directory_of(other, None) is None


def test_a_repository_counts_when_all_its_weights_are_cached(cached, monkeypatch):
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: asked.append(host) or [])
    assert directory_of("me/mine", None) is None
    put(cached, "a.safetensors")
    assert directory_of("me/mine", None) is None
    (cached / "b.safetensors").touch()
    assert directory_of("me/mine", None) == cached
    assert directory_of("me/mine", "main") == directory_of("me/mine", COMMIT) == cached
    assert directory_of("me/mine", "other") is None
    assert directory_of("me/other", None) is None
    (cached / INDEX_FILE).unlink()
    assert directory_of("me/mine", None) is None
    assert asked == []
