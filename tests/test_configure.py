"""stages/configure.py: values as a shell passes them, keys that change alone, merges that stay."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from configuring import link, params, refused, script, written
from halves import thinned
from project_imports import ROOT

from gptoss_nf4.errors import UserError
from gptoss_nf4.source.model import check_model_name

# Names of directories that have a meaning to a shell, to Hydra's grammar, to YAML or to OmegaConf.
NAMES = [
    "my fine-tune",
    "a=b",
    "a,b",
    "[1,2]",
    "{a: b}",
    "(x)",
    "it's",
    '"quoted"',
    "'both\" kinds",
    "~",
    "~nobody",
    "$HOME",
    "$b}",
    "a\\b",
    "a\\'b",
    "#1",
    "a: b",
    "- a",
    "null",
    "1e5",
    "007",
    "on",
    "*?",
    "%20",
    "a&b|c;d",
    "!tag",
    "&anchor",
    "@x",
    " spaces ",
    "tab\there",
    "new\nline",
    "модель",
    "微调",
    "نموذج",
    "می‌خواهم",
    "e\u0301",
    "😀",
]


@pytest.mark.parametrize("name", thinned(NAMES, 3))
def test_a_path_is_taken_as_the_shell_passes_it(here, tiny, name):
    directory = link(tiny, here / "data" / name)
    model = written(here, "model=local", f"model.path={Path('data') / name}")["model"]
    assert model["path"] == model["defined_by"] == str(directory)
    check_model_name(model["name"], "model.name")
    adapters = written(here, f"adapters.mine={directory}")["adapters"]
    assert adapters["mine"]["path"] == str(directory)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["it's a=b, [c] {d}", 'модель "x" $y'])
def test_the_scripts_themselves_take_such_a_path(here, tiny, name):
    directory = link(tiny, here / name)
    assert "2 layers" in script(here, "configure", "model=local", f"model.path={directory}")
    shutil.copytree(ROOT / "conf", here / "conf")
    assert "293 tensors" in script(here, "fetch")
    (manifest,) = here.glob("artifacts/*/manifest.json")
    assert json.loads(manifest.read_text())["source"]["path"] == str(directory)


def test_home_is_expanded(here, tiny, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    directory = link(tiny, here / "tuned")
    assert written(here, "model=local", "model.path=~/tuned")["model"]["path"] == str(directory)
    assert written(here, "adapters={mine: ~/tuned}")["adapters"]["mine"]["path"] == str(directory)


def test_quotes_around_a_path_are_hydras_unless_something_is_called_so(here, tiny):
    for name in ("a, b", "'c'"):
        link(tiny, here / name)
    assert written(here, "model=local", "model.path='a, b'")["model"]["path"] == str(here / "a, b")
    assert written(here, "model=local", "model.path='c'")["model"]["path"] == str(here / "'c'")
    assert written(here, "adapters.mine='c'", "adapters.other='a, b'")["adapters"]["mine"]["path"] == str(here / "'c'")


@pytest.mark.parametrize("path", ["/nowhere", "~nobody/x", "x" * 5000, "a/" * 3000, "loop"])
def test_a_path_that_leads_nowhere_is_one_line(here, path):
    (here / "loop").symlink_to("loop")
    for typed in (["model=local", f"model.path={path}"], [f"adapters.mine={path}"]):
        from configure import composed

        with pytest.raises(UserError, match=r"no such directory|not there|too long") as caught:
            composed(typed)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["${oc.env:HOME}", "a${b", "\x85"])
def test_a_path_that_params_yaml_cannot_hold_is_refused(here, tiny, name):
    directory = link(tiny, here / name)
    said = refused("model=local", f"model.path={directory}")
    assert "make a link with a plainer name" in said
    assert not (here / "params.yaml").exists()


def test_adapters_are_typed_with_and_without_quotes(here):
    for name in ("my lora", "it's, [x]", "c=d", "e, f: g"):
        (here / name).mkdir()
    typed = "{mine: my lora, b:it's, [x], c: c=d, d: 'e, f: g', e: some/lora, f: {path: my lora, any_base: true}}"
    adapters = written(here, "model=gpt_oss_20b", f"adapters={typed}")["adapters"]
    assert {name: entry["path"] and Path(entry["path"]).name for name, entry in adapters.items()} == {
        "mine": "my lora",
        "b": "it's, [x]",
        "c": "c=d",
        "d": "e, f: g",
        "e": None,
        "f": "my lora",
    }
    assert (adapters["e"]["repository"], adapters["f"]["any_base"]) == ("some/lora", True)
    assert set(written(here, "adapters.g=e, f: g")["adapters"]) == {*adapters, "g"}
    assert set(written(here, "adapters.g=", "adapters.f=null")["adapters"]) == {*adapters} - {"f"}
    assert written(here, "adapters.e.any_base=true")["adapters"]["e"]["any_base"] is True
    assert written(here, "adapters={}")["adapters"] == {}


def test_a_key_alone_changes_that_key(here, tiny):
    before = written(here, "model=local", f"model.path={tiny}", "requant.w13_order=concatenated", "engine=gpu")
    assert written(here, "dtype=bfloat16") == before | {"dtype": "bfloat16"}
    after = written(here, "engine=cpu", "+engine.args.seed=3", "engine.env.A=1", "smoke.prompts=[a b, c]")
    assert after["model"] == before["model"]
    assert (after["engine"]["name"], after["engine"]["args"]["seed"], after["engine"]["env"]["A"]) == ("cpu", 3, "1")
    assert (after["dtype"], after["requant"], after["smoke"]["prompts"]) == ("bfloat16", before["requant"], ["a b", "c"])
    (here / "params.yaml").write_text((here / "params.yaml").read_text().replace("max_tokens: 24", "max_tokens: 9"))
    assert written(here, "residual_scale=1/64")["smoke"]["max_tokens"] == 9, "what was changed by hand stays"
    assert written(here, "model=tiny")["dtype"] == "float16", "a model starts from the defaults"
    written(here, "dtype=bfloat16")
    assert written(here) == yaml.safe_load((ROOT / "params.yaml").read_text())


def test_settings_that_a_newer_version_has_are_added(here):
    written(here, "dtype=bfloat16", "model=tiny")
    old = {key: value for key, value in params(here).items() if key not in ("smoke", "adapters")}
    del old["requant"]["device"]
    (here / "params.yaml").write_text(yaml.safe_dump(old))
    assert written(here, "engine=gpu")["requant"]["device"] == "auto"
    assert {"smoke", "adapters"} <= params(here).keys()


def test_another_path_alone_is_another_source(here, tiny):
    first, second = link(tiny, here / "first"), link(tiny, here / "second")
    assert written(here, "model=local", f"model.path={first}", "dtype=float32")["model"]["name"] == "first"
    after = written(here, f"model.path={second}")
    assert (after["model"]["name"], after["dtype"]) == ("second", "float32")


@pytest.mark.parametrize("beside", [[], ["config.json"], ["config.json", "optimizer.safetensors", "training_args.bin"]])
def test_an_adapter_alone_keeps_what_was_set(here, tiny, beside):
    """Some trainers write the base's config.json beside an adapter."""
    (here / "lora").mkdir()
    for name in (*beside, "adapter_model.safetensors"):
        shutil.copy(tiny / "config.json", here / "lora" / name)
    config = {"base_model_name_or_path": str(link(tiny, here / "it's a=b"))}
    (here / "lora/adapter_config.json").write_text(json.dumps(config))
    written(here, "model=local", f"model.path={tiny}", "dtype=float32")
    after = written(here, "model.path=lora")
    assert (after["model"]["path"], after["dtype"]) == (config["base_model_name_or_path"], "float32")
    assert after["adapters"]["lora"]["path"] == str(here / "lora")


def test_a_merge_stays_until_it_is_taken_away(here, tiny):
    """Its name is the base's with the adapter's behind it, whatever is typed later and however often."""
    for name in ("mine", "other"):
        (here / name).mkdir()
        (here / name / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tiny)}))
    base = written(here, "model=local", f"model.path={tiny}", "adapters={mine: mine, other: other}", "requant.mode=nf4")
    assert (base["model"]["name"], base["requant"]["merge"], base["merge_input"]) == ("source", None, "stages/common.py")
    merging = written(here, "requant.merge=mine")
    assert merging["model"] == base["model"] | {"name": "source-mine"}
    assert merging["merge_input"] == "artifacts/source-mine/adapters/mine.json"
    assert written(here, "dtype=bfloat16") == merging | {"dtype": "bfloat16"}
    assert written(here, "dtype=float16") == written(here, "requant.merge=mine") == merging
    assert written(here, "requant.merge=other")["model"]["name"] == "source-other"
    assert written(here, "model.name=given")["model"]["name"] == "given-other"
    for nothing in ("", "null"):
        assert written(here, "model.name=source", "requant.merge=mine") == merging
        assert written(here, f"requant.merge={nothing}") == base
    assert written(here, "model.path=mine", "requant.merge=mine")["model"]["name"] == "source-mine"
    for typed, named in (
        (
            "adapters.mine=",
            r"no such adapter: requant\.merge: got 'mine', expected one of adapters, \['other'\].*requant\.merge= ",
        ),
        ("requant.mode=exact", r"requant\.merge: got mine with requant\.mode=exact.*requant\.merge= "),
        ("requant.merge=../x", r"requant\.merge: got '\.\./x', expected a name"),
        ("model.name=" + "x" * 198, r"model\.name: got 'x+-mine', expected a name"),
        ("merge_input=README.md", r"merge_input: got 'README\.md', expected requant\.merge=NAME"),
    ):
        assert re.search(named, refused(typed))
        assert params(here)["model"]["name"] == "source-mine"
