"""To whom artifacts belong: one source, by whatever path or spelling it is reached."""

import pytest

from gptoss_nf4.errors import UserError
from gptoss_nf4.fetch.fetch import fetch
from gptoss_nf4.fetch.owner import claim, owner_of, place_of, require_own, same_source
from gptoss_nf4.source.model import Model
from gptoss_nf4.storage.artifacts import Artifacts
from gptoss_nf4.storage.writing import write_json

HUB = {"kind": "hub", "repository": "me/mine"}


def test_a_repository_is_one_source_however_it_is_spelled():
    assert same_source(HUB, HUB | {"repository": "Me/Mine"})
    assert not same_source(HUB, HUB | {"repository": "me/other"})
    assert not same_source(HUB, {"kind": "hub"})
    assert not same_source(HUB, {"kind": "local", "path": "me/mine"})
    assert same_source({"kind": "embedded"}, {"kind": "embedded"})
    assert not same_source({"kind": "embedded"}, {"kind": "synthetic"})


def test_a_directory_is_one_source_by_every_path(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "one")

    def at(name: str) -> dict:
        return {"kind": "local", "path": str(tmp_path / name)}

    assert same_source(at("one"), at("two/../one"))
    assert same_source(at("one"), at("link"))
    assert not same_source(at("one"), at("two"))
    assert same_source(at("gone"), at("gone"))
    assert not same_source(at("gone"), at("one"))


def test_the_first_source_keeps_the_name(tmp_path):
    artifacts = Artifacts(tmp_path)
    assert owner_of(artifacts) is None
    claim(artifacts, HUB)
    claim(artifacts, HUB | {"repository": "ME/mine"})
    assert owner_of(artifacts) == HUB
    told = f"name taken: {tmp_path}: got me/other as its source, expected me/mine, .*another adapters.x=NAME"
    with pytest.raises(UserError, match=told):
        require_own(artifacts, {"kind": "hub", "repository": "me/other"}, "adapters.x")
    with pytest.raises(UserError, match=r"got the embedded model as its source.*another model\.name=NAME"):
        claim(artifacts, {"kind": "embedded"})
    assert owner_of(artifacts) == HUB


def test_a_sample_is_not_written_over_what_another_source_left(tmp_path):
    artifacts = Artifacts(tmp_path)
    claim(artifacts, HUB)
    with pytest.raises(UserError, match="name taken"):
        fetch(Model(name="x", kind="embedded"), artifacts)
    assert [path.name for path in tmp_path.iterdir()] == ["origin.json"]


def test_artifacts_of_an_older_version_belong_to_what_their_manifest_says(tmp_path):
    artifacts = Artifacts(tmp_path)
    write_json(artifacts.manifest, {"source": HUB | {"commit": "abc"}})
    assert owner_of(artifacts) == HUB | {"commit": "abc"}


def test_a_source_is_named_by_its_place():
    assert place_of({"kind": "local", "path": "/data/x"}) == "/data/x"
    assert place_of(HUB) == "me/mine"
    assert place_of({"kind": "synthetic"}) == "the synthetic model"
