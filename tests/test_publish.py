"""Publishing: the model card, and huggingface_hub's own client against a stand-in of the hub."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import hub_stand_in
import pytest
from hub_stand_in import TOKEN
from huggingface_hub import HfApi, ModelCard, metadata_load
from project_imports import ROOT

from gptoss_nf4.convert.normalize import normalize
from gptoss_nf4.convert.plan import RequantOptions
from gptoss_nf4.errors import UserError
from gptoss_nf4.fetch.licence import MAX_CARD_BYTES, licence
from gptoss_nf4.flow import convert
from gptoss_nf4.publish import upload
from gptoss_nf4.publish.card import base_model, card, write_card
from gptoss_nf4.publish.upload import require_proved_checkpoint, uploaded_files
from gptoss_nf4.source.model import Model, open_source
from gptoss_nf4.storage.artifacts import Artifacts
from gptoss_nf4.storage.digests import verify, write_digests
from gptoss_nf4.storage.reading import read_json_object
from gptoss_nf4.storage.writing import write_json

REPOSITORY = "someone/my-finetune"


@pytest.fixture(scope="module")
def published_model(tiny, tmp_path_factory) -> Path:
    """A project directory with a model converted from a directory that names its licence, and its metrics. Do not write."""
    root = tmp_path_factory.mktemp("project")
    source = shutil.copytree(tiny, root / "my-finetune")
    (source / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: openai/gpt-oss-20b\n---\n# mine\n")
    model, artifacts = Model(name="mine", kind="local", path=str(source)), Artifacts(root / "artifacts/mine")
    options = RequantOptions()
    found = convert(model, artifacts, options, "float16")
    dtypes = normalize(open_source(model, artifacts), artifacts, options, "float16")
    write_json(root / "metrics/exactness.json", {"model": "mine", "mode": "exact", "dtype": "float16"} | found)
    write_json(root / "metrics/dtypes.json", {"model": "mine"} | dtypes)
    write_digests(artifacts.checkpoint, artifacts.digest_list)
    return root


@pytest.fixture
def project(published_model, tmp_path) -> Path:
    """A copy of it, in which stages run."""
    return Path(shutil.copytree(published_model, tmp_path / "project"))


def run(project: Path, script: str, *overrides: str, environment: dict | None = None) -> subprocess.CompletedProcess:
    import os

    command = [sys.executable, ROOT / "stages" / script, *overrides]
    return subprocess.run(
        command, cwd=project, capture_output=True, text=True, timeout=120, env=os.environ | (environment or {})
    )


def artifacts_of(project: Path) -> Artifacts:
    return Artifacts(project / "artifacts/mine")


# The card


def test_a_card_tells_what_was_found(published_model):
    artifacts = artifacts_of(published_model)
    text = card(artifacts, published_model / "metrics", REPOSITORY)
    fields = ModelCard(text).data.to_dict()
    assert fields["license"] == "apache-2.0"
    assert (fields["base_model"], fields["base_model_relation"]) == ("openai/gpt-oss-20b", "quantized")
    assert "float16" in fields["tags"]
    assert (fields["pipeline_tag"], fields["library_name"]) == ("text-generation", "vllm")
    found = read_json_object(published_model / "metrics/exactness.json")
    assert f"| values compared | {found['compared']:,} |" in text
    assert "| different | 0 |" in text
    assert f"vllm serve {REPOSITORY}" in text
    assert artifacts.digest_list.read_text() in text
    assert str(published_model) not in text, "a path of this machine is nobody else's business"


def test_a_card_of_a_merged_adapter_says_that_weights_changed(published_model, tmp_path):
    root = Path(shutil.copytree(published_model, tmp_path / "project"))
    artifacts = artifacts_of(root)
    config = read_json_object(artifacts.checkpoint / "config.json")
    config["quantization_config"] |= {"requant_mode": "nf4", "merged_adapter": {"name": "helpful", "sha256": "ab" * 32}}
    write_json(artifacts.checkpoint / "config.json", config)
    figures = {"kind": "w13", "relative_delta": 0.05, "relative_rms_error": 0.08, "delta_kept": 0.39}
    exactness = read_json_object(root / "metrics/exactness.json") | {"merge": {"kinds": [figures]}}
    write_json(root / "metrics/exactness.json", exactness)
    text = card(artifacts, root / "metrics")
    assert "no weight was changed" not in " ".join(text.split())
    assert f"| merged adapter | helpful, SHA-256 `{'ab' * 32}` |" in text
    assert "| w13 | 5.00% | 8.00% | 39% |" in text


def test_the_base_is_the_repository_that_was_converted_or_what_the_source_says():
    said = {"base_model": "openai/gpt-oss-20b"}
    assert base_model(said | {"source": {"kind": "hub", "repository": "me/mine"}}) == "me/mine"
    assert base_model(said | {"source": {"kind": "local", "path": "/data"}}) == "openai/gpt-oss-20b"
    assert base_model({"source": {"kind": "local", "path": "/data"}}) is None


@pytest.mark.parametrize(("name", "stage"), [("exactness", "prove"), ("dtypes", "normalize")])
def test_a_card_without_a_stages_metrics_names_the_stage(project, name, stage):
    (project / f"metrics/{name}.json").unlink()
    with pytest.raises(UserError, match=rf"stage {stage}.*dvc repro {stage}"):
        card(artifacts_of(project), project / "metrics", REPOSITORY)


def test_a_card_of_what_was_not_proved_names_the_stage(project):
    artifacts = artifacts_of(project)
    artifacts.digest_list.unlink()
    with pytest.raises(UserError, match=r"stage prove.*dvc repro prove"):
        card(artifacts, project / "metrics", REPOSITORY)


def test_a_card_in_the_checkpoint_changes_neither_digests_nor_the_proof_of_them(project):
    artifacts = artifacts_of(project)
    count = verify(artifacts.checkpoint, artifacts.digest_list, "")
    write_card(artifacts, project / "metrics")
    metadata_load(artifacts.checkpoint_card)
    assert verify(artifacts.checkpoint, artifacts.digest_list, "") == count
    before = artifacts.digest_list.read_text()
    write_digests(artifacts.checkpoint, artifacts.digest_list)
    assert artifacts.digest_list.read_text() == before
    artifacts.checkpoint_card.write_text("improved by its owner")
    assert verify(artifacts.checkpoint, artifacts.digest_list, "") == count


def test_a_list_that_names_a_card_has_it_checked(published_model):
    """`sha256sum *` in a source lists its card."""
    import hashlib

    source, recorded = published_model / "my-finetune", published_model.parent / "expected.sha256"
    lines = [f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}\n" for f in sorted(source.iterdir())]
    recorded.write_text("".join(lines))
    assert verify(source, recorded, "") == len(lines)
    recorded.write_text("".join(lines).replace("  README.md", "  readme.md"))
    with pytest.raises(UserError, match=r"readme\.md: got no such file"):
        verify(source, recorded, "")


@pytest.mark.parametrize(
    ("text", "license_"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\nlicense: [mit, gpl]\n---\n", None),
        ("---\nlicense: 'mit\n---\n", None),
        ("---\n- license\n---\n", None),
        ("---\nlicense: !!int ''\n---\n", None),
        ("---\nlicense: !!bool mit\nbase_model: !!timestamp x\n---\n", "mit"),
        (
            "---\na0: &a0 {k: v}\n"
            + "".join(f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
            + "---\n",
            None,
        ),
        ("---\nlicense: |\n  mit\n  | different | 0 |\n---\n", None),
        ("---\nlicense: !!python/object/apply:os.system ['true']\n---\n", None),
        ("# no front matter\n", None),
        ("---\n" + "[" * 1000 + "\n---\n", None),
        ("---\nlicense: mit\n---\n" + " " * MAX_CARD_BYTES, None),
        (b"---\nlicense: m\xff\n---\n", None),
    ],
)
def test_a_licence_is_taken_in_the_hubs_form_only(tmp_path, text, license_):
    (tmp_path / "README.md").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert licence(tmp_path)["license"] == license_


@pytest.mark.parametrize(("bases", "base"), [(["openai/gpt-oss-20b"], "openai/gpt-oss-20b"), (["a/b", "c/d"], None)])
def test_a_base_may_be_a_list_of_one(tmp_path, bases, base):
    """Of several, as a merge of models has them, none is the base."""
    (tmp_path / "README.md").write_text("---\nbase_model:\n" + "".join(f"- {each}\n" for each in bases) + "---\n")
    assert licence(tmp_path)["base_model"] == base


def test_a_source_without_a_card_has_no_licence(tmp_path):
    assert licence(tmp_path) == {"license": None, "base_model": None}


# What is refused


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda a, m: a.digest_list.unlink(), "stage prove.*dvc repro prove"),
        (lambda a, m: (m / "exactness.json").unlink(), "stage prove.*dvc repro prove"),
        (lambda a, m: _edit(m / "exactness.json", different=3), "not proved.*3 different values"),
        (lambda a, m: _edit(m / "exactness.json", model="tiny"), "metrics of another model.*tiny"),
        (lambda a, m: _flip_a_bit(a.checkpoint / "layer-1.safetensors"), r"checkpoint changed.*layer-1\.safetensors"),
        (lambda a, m: (a.checkpoint / "notes.txt").write_text("mine"), r"checkpoint changed.*notes\.txt"),
    ],
)
def test_what_was_not_proved_is_not_published(project, spoil, told):
    artifacts = artifacts_of(project)
    require_proved_checkpoint(artifacts, project / "metrics")
    spoil(artifacts, project / "metrics")
    with pytest.raises(UserError, match=told):
        require_proved_checkpoint(artifacts, project / "metrics")
    with hub_stand_in.hub() as hub:
        with pytest.raises(UserError, match=told):
            publish(project, hub)
        assert hub.repositories == {}


def _edit(file: Path, **fields: object) -> None:
    write_json(file, read_json_object(file) | fields)


def _flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.unlink()
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["my-finetune", "", "a/b/c", "../x", "http://example.com/x"])
def test_a_repository_has_an_owner_and_a_name(project, name):
    with hub_stand_in.hub() as hub, pytest.raises(UserError, match="bad setting: repository"):
        publish(project, hub, name)


# Uploading


def publish(
    project: Path, hub: hub_stand_in.State, repository: str = REPOSITORY, token: str | None = TOKEN, **asked: bool
) -> str:
    """What stage publish does, with the stand-in for the hub. Where `private` is not asked for, it is the default."""
    with pytest.MonkeyPatch.context() as patch:
        hub_stand_in.use_here(hub, patch)
        patch.setattr("huggingface_hub.HfApi", partial(HfApi, token=token or False))
        return upload.publish(artifacts_of(project), project / "metrics", repository, **asked)


def test_what_is_published_is_what_was_proved(project):
    with hub_stand_in.hub() as hub:
        address = publish(project, hub)
        repository = hub.repositories[REPOSITORY]
        assert repository.private
        artifacts = artifacts_of(project)
        expected = {name: path.read_bytes() for name, path in uploaded_files(artifacts).items()}
        assert {n: d for n, d in repository.files.items() if n != ".gitattributes"} == expected
        assert f"vllm serve {REPOSITORY}".encode() in repository.files["README.md"]
        assert address == f"{hub.url}/{REPOSITORY}/commit/{repository.commits[-1]}"
        # Nothing is sent twice.
        received = list(hub.received)
        assert len(received) == 3
        publish(project, hub)
        assert hub.received == received


@pytest.mark.slow
def test_the_stage_publishes_and_says_in_one_line_what_it_cannot(published_model, project):
    source = published_model / "my-finetune"
    configured = run(project, "configure.py", "model=local", f"model.path={source}", "model.name=mine")
    assert configured.returncode == 0, configured.stderr
    with hub_stand_in.hub() as hub:
        environment = hub_stand_in.environment(hub, project / "hf")
        done = run(project, "publish.py", f"repository={REPOSITORY}", "private=false", environment=environment)
        assert done.returncode == 0, done.stderr
        repository = hub.repositories[REPOSITORY]
        assert not repository.private
        assert f"{hub.url}/{REPOSITORY}/commit/{repository.commits[-1]}" in done.stdout
        for setting, told in (("private=maybe", "bad setting: private"), ("repository=me/a--b", "upload failed: me/a--b")):
            done = run(project, "publish.py", f"repository={REPOSITORY}", setting, environment=environment)
            assert done.returncode == 1
            assert done.stderr.startswith(f"error: {told}")
            assert len(done.stderr.splitlines()) == 1


def test_an_upload_goes_on_where_it_stopped(project):
    with hub_stand_in.hub() as hub:
        hub.uploads_left = 1
        with pytest.raises(UserError, match="upload failed"):
            publish(project, hub)
        assert hub.repositories[REPOSITORY].files.keys() == {".gitattributes"}, "half a checkpoint"
        first = list(hub.received)
        hub.uploads_left = None
        publish(project, hub)
        assert hub.received[: len(first)] == first
        assert len(hub.received) == len(set(hub.received)) == 3


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_somebody_elses_weights_stay(project, name):
    with hub_stand_in.hub() as hub:
        hub.add(REPOSITORY, {name: b"theirs", "README.md": b"theirs"})
        with pytest.raises(UserError, match=rf"somebody else's weights.*{name}"):
            publish(project, hub)
        assert hub.repositories[REPOSITORY].files == {name: b"theirs", "README.md": b"theirs"}


def test_what_an_engine_would_read_besides_is_deleted(project):
    """A template that an older version left would win over the one in tokenizer_config.json."""
    with hub_stand_in.hub() as hub:
        left = {"layer-9.safetensors": b"old", "chat_template.jinja": b"old", "picture.png": b"kept", ".gitattributes": b""}
        left |= {"lora/adapter_model.safetensors": b"theirs", "pytorch_model.bin": b"old"}
        hub.add(REPOSITORY, left)
        with pytest.raises(UserError, match="somebody else's weights"):
            publish(project, hub)
        assert hub.repositories[REPOSITORY].files.keys() == left.keys()
        hub.add(REPOSITORY, left | {"checkpoint.sha256": b""})  # as publish.py leaves it
        publish(project, hub)
        files = hub.repositories[REPOSITORY].files
        assert "layer-9.safetensors" not in files
        assert "chat_template.jinja" not in files
        assert "pytorch_model.bin" not in files
        assert {"picture.png", "lora/adapter_model.safetensors"} <= files.keys()
        assert not hub.repositories[REPOSITORY].private, "an existing repository stays as it is"


def test_a_file_that_arrived_otherwise_is_told(project):
    with hub_stand_in.hub() as hub:
        hub.lie_about = "layer-0.safetensors"
        with pytest.raises(UserError, match=r"upload is not the checkpoint.*layer-0\.safetensors"):
            publish(project, hub)


def test_a_public_repository_is_asked_for(project):
    with hub_stand_in.hub() as hub:
        publish(project, hub, private=False)
        assert not hub.repositories[REPOSITORY].private


@pytest.mark.parametrize("name", ["me/a--b", "me/a..b", "me/x.git"])
def test_a_name_that_the_hub_refuses_is_one_line(project, name):
    with hub_stand_in.hub() as hub, pytest.raises(UserError, match=f"upload failed: {re.escape(name)}"):
        publish(project, hub, name)


def test_the_fine_tune_itself_is_not_replaced(project):
    artifacts = artifacts_of(project)
    before = artifacts.manifest.read_bytes()
    _edit(artifacts.manifest, source=read_json_object(artifacts.manifest)["source"] | {"repository": REPOSITORY.upper()})
    try:
        with hub_stand_in.hub() as hub:
            with pytest.raises(UserError, match="that is the source"):
                publish(project, hub)
            assert REPOSITORY not in hub.repositories
    finally:
        artifacts.manifest.write_bytes(before)


@pytest.mark.parametrize("token", [None, "hf_of_another"])
def test_without_a_token_nothing_is_uploaded(project, token):
    with hub_stand_in.hub() as hub, pytest.raises(UserError, match=r"upload failed.*hf auth login"):
        publish(project, hub, token=token)
    assert hub.repositories == {}


def test_a_hub_that_does_not_answer_is_one_line(project):
    with hub_stand_in.hub() as hub:
        pass
    with pytest.raises(UserError, match="upload failed"):
        publish(project, replace(hub, url="http://127.0.0.1:9"))
    assert json.loads((project / "metrics/exactness.json").read_text())["different"] == 0


def test_the_hubs_digests_are_compared_with_what_was_proved_and_large_files_read_once(tmp_path, monkeypatch):
    """A weight file that changes after it was checked, and arrives so, is found. The others are our own files."""
    from gptoss_nf4.storage import repository
    from gptoss_nf4.storage.writing import git_blob_sha1, sha256_of

    files = {name: tmp_path / name for name in ("layer-0.safetensors", "config.json", "README.md")}
    for path in files.values():
        path.write_text(path.name)
    proved = {name: sha256_of(files[name]) for name in ("layer-0.safetensors", "config.json")}

    def siblings() -> list[SimpleNamespace]:
        large, *small = files.values()
        lfs = SimpleNamespace(sha256=sha256_of(large))
        found = [SimpleNamespace(rfilename=large.name, lfs=lfs, blob_id=None)]
        return found + [SimpleNamespace(rfilename=each.name, lfs=None, blob_id=git_blob_sha1(each)) for each in small]

    def check(there: list[SimpleNamespace]) -> None:
        api = SimpleNamespace(model_info=lambda *_, **__: SimpleNamespace(siblings=there))
        upload._require_same(api, "me/mine", "abc", files, proved)

    good = siblings()
    read: list[str] = []
    monkeypatch.setattr(repository, "sha256_of", lambda path, *_: read.append(path.name))
    check(good)
    assert read == []
    files["layer-0.safetensors"].write_text("changed, and sent so")
    with pytest.raises(UserError, match=r"upload is not the checkpoint: me/mine at abc: layer-0\.safetensors"):
        check(siblings())
    for gone in range(3):
        with pytest.raises(UserError, match="no such file"):
            check([*good[:gone], *good[gone + 1 :]])
    good[1].blob_id = "0" * 40
    with pytest.raises(UserError, match=r"config\.json"):
        check(good)
