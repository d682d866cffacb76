"""The hub code against a local stand-in of the Hugging Face hub."""

import json
from pathlib import Path
from types import SimpleNamespace

import hub_stand_in
import pytest

from gptoss_nf4.errors import UserError
from gptoss_nf4.fetch.fetch import fetch
from gptoss_nf4.fetch.hub import _require_room, download
from gptoss_nf4.source.interface import Source
from gptoss_nf4.source.model import HUB_PATTERNS, Model, base_on_hub, hub_config, hub_snapshot, open_source, origin_of
from gptoss_nf4.storage import machine
from gptoss_nf4.storage.artifacts import Artifacts

REPOSITORY = "someone/tiny-gpt-oss"


@pytest.fixture
def hub(source_copy, monkeypatch, tmp_path):
    (source_copy / "pytorch_model.bin").write_bytes(b"a pickle that nobody asked for")
    (source_copy / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    with hub_stand_in.hub() as state:
        state.add(REPOSITORY, {file.name: file.read_bytes() for file in source_copy.iterdir()})
        for key, value in hub_stand_in.environment(state, tmp_path / "hf", token=None).items():
            monkeypatch.setenv(key, value)
        yield state


@pytest.fixture
def here(hub, tmp_path, monkeypatch):
    """The stand-in for this process too."""
    hub_stand_in.use_here(hub, monkeypatch, tmp_path / "hf/hub")
    return hub


def fetched(tmp_path: Path, repository: str = REPOSITORY, revision: str | None = None) -> tuple[dict, Source]:
    """The manifest, and the source as every later stage opens it, without the network."""
    model, artifacts = Model(name="tiny", kind="hub", repository=repository, revision=revision), Artifacts(tmp_path / "a")
    return fetch(model, artifacts), open_source(model, artifacts)


def weights(hub) -> list[str]:
    return [name for name in hub.served if name.endswith(".safetensors")]


def test_a_hub_model_is_downloaded_once_and_its_commit_recorded(here, tmp_path):
    manifest, source = fetched(tmp_path)
    commit = here.repositories[REPOSITORY].commits[-1]
    assert manifest["source"] == {"kind": "hub", "repository": REPOSITORY, "commit": commit}
    assert manifest["license"] == "apache-2.0"
    assert source.layout == "split"
    assert source.checkpoint.directory == hub_snapshot(REPOSITORY, commit)
    assert "pytorch_model.bin" not in here.served, HUB_PATTERNS
    assert len(weights(here)) == 3
    fetched(tmp_path)
    assert len(weights(here)) == 3


def test_the_commit_that_was_fetched_stays_the_source(here, tmp_path):
    """A newer one, which the same name has by now, is somebody else's next version."""
    manifest, _ = fetched(tmp_path)
    first = manifest["source"]["commit"]
    here.add(REPOSITORY, {"config.json": b"{}"})
    assert here.repositories[REPOSITORY].commits[-1] != first
    assert json.loads((hub_snapshot(REPOSITORY, first) / "config.json").read_text())["model_type"] == "gpt_oss"
    with pytest.raises(UserError, match=r"missing source.*no someone/tiny-gpt-oss at 0123.*dvc repro -s -f fetch"):
        hub_snapshot(REPOSITORY, "0123" * 10)


def test_a_wrong_digest_is_found(here, tmp_path):
    here.lie_about = "model-00002-of-00003.safetensors"
    with pytest.raises(UserError, match=r"wrong digest.*model-00002-of-00003\.safetensors"):
        fetched(tmp_path)


def test_room_is_asked_for_what_is_not_there_yet(here, tmp_path, monkeypatch):
    """Of the repository's files those that are wanted; none of them once they are in the cache."""
    wanted = {n: len(d) for n, d in here.repositories[REPOSITORY].files.items() if not n.endswith(".bin")}
    free, said = SimpleNamespace(free=sum(wanted.values()) - 1), []
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: free)
    with pytest.raises(UserError, match=f"disk too small.*the download of {REPOSITORY}"):
        download(REPOSITORY, None)
    assert here.served == []
    free.free += 1
    download(REPOSITORY, None, said.append)
    assert said == [f"downloading {sum(wanted.values()) / 1e6:.1f} MB of {REPOSITORY} into {tmp_path / 'hf/hub'}"]
    free.free = 0
    download(REPOSITORY, None, said.append)
    assert len(said) == 1


def test_a_file_of_no_known_size_needs_no_room():
    info = SimpleNamespace(sha="0" * 40, siblings=[SimpleNamespace(rfilename="config.json", size=None)])
    assert _require_room(info, REPOSITORY) == 0


def test_an_absent_repository_is_one_line(here, tmp_path):
    with pytest.raises(UserError, match="no such repository"):
        fetched(tmp_path, "someone/else")


def test_a_hub_that_does_not_answer_is_one_line(here, tmp_path, monkeypatch):
    from huggingface_hub import constants, hf_api

    nobody = "http://127.0.0.1:9"  # where nobody listens
    monkeypatch.setattr(constants, "ENDPOINT", nobody)
    monkeypatch.setattr(hf_api.api, "endpoint", nobody)
    with pytest.raises(UserError, match=f"^download failed: {REPOSITORY}: got "):
        fetched(tmp_path)


def test_a_source_of_the_hub_comes_from_its_repository():
    assert origin_of("hub", None, "me/model") == {"kind": "hub", "repository": "me/model"}


def test_the_base_that_an_adapter_names_is_read_from_its_repository(here):
    config = {"base_model_name_or_path": "someone/base"}
    here.add("me/lora", {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": b""})
    here.add("me/silent", {"adapter_config.json": b"{}"})
    here.add("me/both", {"adapter_config.json": json.dumps(config).encode(), "config.json": b"{}"})
    assert base_on_hub("me/lora", None) == "someone/base"
    for repository in ("me/silent", "me/both", REPOSITORY, "me/nothing", "no such name", ""):
        assert base_on_hub(repository, None) is None, repository
    assert hub_config("me/both", None).read_bytes() == b"{}"
    assert here.revisions == {"main"}
    here.revisions.clear()
    assert base_on_hub("me/lora", "v1") == "someone/base"
    assert base_on_hub("me/both", "v1") is None
    assert here.revisions == {"v1"}
    with pytest.raises(UserError, match=r"cannot read the repository's config\.json.*config\.json of me/lora"):
        hub_config("me/lora", None)
