"""Names of models and adapters: they stay within artifacts/, and two sources never share one."""

import json
from pathlib import Path

import pytest
from configuring import link, refused, written
from conftest import local

from gptoss_nf4.errors import UserError
from gptoss_nf4.fetch.fetch import fetch
from gptoss_nf4.source.model import AdapterSource, Model, safe_model_name
from gptoss_nf4.storage.artifacts import Artifacts


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "../x", "a b", "a\x00", "x" * 300, "-a", ".hidden"])
def test_no_model_and_no_adapter_has_a_name_that_leads_out_of_the_artifacts(name):
    with pytest.raises(UserError, match=r"model\.name"):
        Model(name, "embedded")
    with pytest.raises(UserError, match="adapters"):
        AdapterSource(name)
    assert (Path("artifacts") / safe_model_name(name)).resolve().parent == Path("artifacts").resolve()
    Model(safe_model_name(name), "embedded")


def test_two_sources_never_share_a_name(here, tiny, capsys):
    first, second = (link(tiny, here / run / "merged") for run in ("run1", "run2"))
    assert written(here, "model=local", f"model.path={first}")["model"]["name"] == "merged"
    assert written(here, "model=local", f"model.path={second}")["model"]["name"] == "run2-merged"
    assert "is called run2-merged here, since merged is" in capsys.readouterr().out
    said = refused("model=local", f"model.path={second}", "model.name=merged")
    assert "name taken" in said
    assert str(first) in said
    assert written(here, "model=local", f"model.path={second}", "model.name=mine")["model"]["name"] == "mine"
    # The first one, by whatever path.
    (here / "link").symlink_to(here / "run1")
    for path in ("run1/merged", "run1/../run1/merged/", "link/merged", str(first)):
        assert written(here, "model=local", f"model.path={path}")["model"]["name"] == "merged"
    # Neither a Hub repository nor a model of conf/ gets it, and none of theirs gets a directory.
    from naming import free_name

    assert free_name("me/merged", {"kind": "hub", "repository": "me/merged"}, set()) == "me-merged"
    embedded = link(tiny, here / "tiny")
    assert written(here, "model=local", f"model.path={embedded}")["model"]["name"] == f"{here.name}-tiny"


def test_fetch_overwrites_no_artifacts_of_another_source(tiny, tmp_path):
    """As after a change of params.yaml by hand."""
    first, second = link(tiny, tmp_path / "run1" / "merged"), link(tiny, tmp_path / "run2" / "merged")
    model, artifacts = local(first, tmp_path / "artifacts")
    fetch(model, artifacts)
    before = {path: path.read_bytes() for path in artifacts.root.rglob("*") if path.is_file()}
    artifacts.manifest.unlink()  # DVC removes the outputs of a stage before it runs
    with pytest.raises(UserError, match=r"name taken.*run2/merged.*run1/merged.*model\.name"):
        fetch(*local(second, tmp_path / "artifacts"))
    with pytest.raises(UserError, match="name taken"):
        fetch(Model("test", "embedded"), artifacts)
    assert {path for path in artifacts.root.rglob("*") if path.is_file()} == before.keys() - {artifacts.manifest}
    fetch(model, artifacts)
    assert {path: path.read_bytes() for path in artifacts.root.rglob("*") if path.is_file()} == before


def test_artifacts_of_an_older_version_keep_their_source(here, tiny):
    first, second = link(tiny, here / "run1" / "merged"), link(tiny, here / "run2" / "merged")
    artifacts = Artifacts.of("merged")
    fetch(Model("merged", "local", path=str(first)), artifacts)
    artifacts.origin.unlink()  # it had no such file
    assert written(here, "model=local", f"model.path={second}")["model"]["name"] == "run2-merged"
    assert written(here, "model=local", f"model.path={first}")["model"]["name"] == "merged"


def test_two_adapters_never_share_a_name(here, tiny):
    for run in ("run1", "run2"):
        (here / run / "lora").mkdir(parents=True)
        (here / run / "lora/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tiny)}))
    written(here, "model=local", "model.path=run1/lora")
    description = here / "artifacts/source/adapters/lora.json"
    description.parent.mkdir(parents=True)
    description.write_text(json.dumps({"source": {"kind": "local", "path": str(here / "run1/lora")}}))
    assert list(written(here, "model=local", "model.path=run1/lora")["adapters"]) == ["lora"]
    assert list(written(here, "model=local", "model.path=run2/lora")["adapters"]) == ["run2-lora"]
    said = refused("adapters.lora=run2/lora")
    assert "name taken: adapters.lora" in said
    assert list(written(here, "adapters={lora: run1/lora}")["adapters"]) == ["lora"]


def test_a_merge_takes_no_name_of_another_source(here, tiny):
    (here / "mine").mkdir()
    other = link(tiny, here / "source-mine")
    assert written(here, "model=local", f"model.path={other}")["model"]["name"] == "source-mine"
    merging = ("model=local", f"model.path={tiny}", "adapters.mine=mine", "requant.mode=nf4", "requant.merge=mine")
    said = refused(*merging)
    assert "name taken" in said
    assert "pass another model.name=NAME" in said
    assert written(here, *merging, "model.name=it")["model"]["name"] == "it-mine"
