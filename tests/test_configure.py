"""stages/configure.py: values as a shell passes them, keys that change alone, bad values, and names of sources."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import yaml
from conftest import local
from halves import thinned
from omegaconf import OmegaConf
from project_imports import ROOT

from gptoss_nf4.errors import UserError
from gptoss_nf4.fetch.fetch import fetch
from gptoss_nf4.source.model import AdapterSource, Model, check_model_name, safe_model_name
from gptoss_nf4.storage.artifacts import Artifacts

sys.path.insert(0, str(ROOT / "stages"))

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


def script(cwd: Path, name: str, *arguments: str, ok: bool = True) -> str:
    """What stages/NAME.py prints in `cwd`. A failure has to be one line."""
    done = subprocess.run([sys.executable, ROOT / f"stages/{name}.py", *arguments], cwd=cwd, capture_output=True, text=True)
    if ok:
        assert done.returncode == 0, done.stderr
        return done.stdout
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def refused(*typed: str) -> str:
    """The one line with which `configure.py TYPED` ends, run in this process."""
    with pytest.raises(SystemExit) as ended:
        configured(*typed)
    line = str(ended.value)
    assert line.startswith("error: ")
    assert "\n" not in line
    return line


def params(cwd: Path) -> dict:
    """params.yaml as DVC reads it."""
    from dvc.utils.serialize import load_yaml

    return dict(load_yaml(cwd / "params.yaml"))


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working directory: params.yaml and artifacts/ are written below it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def link(source: Path, directory: Path) -> Path:
    """A checkpoint in `directory`: the embedded model's files, linked."""
    shutil.copytree(source, directory, copy_function=os.link)
    return directory


COMPOSED: dict[tuple, dict] = {}  # by what was chosen: most of a run is Hydra's composing, which gives the same each time


def configured(*typed: str) -> None:
    """Run `configure.py TYPED` in this process, in the working directory. The directory of conf/ is the project's."""
    import configure

    compose = configure._from_conf

    def composed(chosen: dict[str, str]) -> dict:
        key = tuple(chosen.items())
        COMPOSED[key] = COMPOSED.get(key) or compose(chosen)
        return copy.deepcopy(COMPOSED[key])

    with mock.patch.object(configure, "_from_conf", composed), mock.patch.object(sys, "argv", ["configure.py", *typed]):
        configure.main()


def written(cwd: Path, *typed: str) -> dict:
    """params.yaml after `configure.py TYPED`."""
    assert Path.cwd() == cwd
    configured(*typed)
    stored = params(cwd)
    as_hydra_reads_it = OmegaConf.to_container(OmegaConf.load(cwd / "params.yaml"), resolve=True)
    assert stored == yaml.safe_load((cwd / "params.yaml").read_text()) == as_hydra_reads_it
    return stored


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


def test_a_merge_takes_no_name_of_another_source(here, tiny):
    (here / "mine").mkdir()
    other = link(tiny, here / "source-mine")
    assert written(here, "model=local", f"model.path={other}")["model"]["name"] == "source-mine"
    merging = ("model=local", f"model.path={tiny}", "adapters.mine=mine", "requant.mode=nf4", "requant.merge=mine")
    said = refused(*merging)
    assert "name taken" in said
    assert "pass another model.name=NAME" in said
    assert written(here, *merging, "model.name=it")["model"]["name"] == "it-mine"


BAD_VALUES = [
    ("dtype=int8", "float16, bfloat16, float32"),
    ("dtype=", "float16, bfloat16, float32"),
    ("residual_scale=0.3", "a power of two"),
    ("residual_scale=true", "a power of two"),
    ("residual_scale=1e400", "a power of two"),
    ("residual_scale=1e999999999", "a power of two"),
    ("residual_scale=1/0", "a power of two"),
    ("residual_scale=nan", "a power of two"),
    ("engine=tpu", "cpu, gpu"),
    ("model=gpt_oss_7b", "gpt_oss_120b, gpt_oss_20b, hub, local"),
    ("model=../tiny", "gpt_oss_120b"),
    ("requant.mode=fast", "exact, nf4"),
    ("requant.w13_order=gate", "interleaved, concatenated"),
    ("requant.quant_type=int4", "nf4, fp4"),
    ("requant.blocksize=33", "32, 64, 128"),
    ("requant.blocksize=64.0", "32, 64, 128"),
    ("requant.device=tpu", "auto, cpu, cuda"),
    ("requant=4", "requant.KEY=VALUE"),
    ("smoke.prompts=hello", "a list"),
    ("smoke.prompts=[]", "a list"),
    ("smoke.prompts=[a", "YAML"),
    ("smoke.prompts=2024-99-99", "YAML"),
    ("smoke.max_tokens=1e400", "a whole number"),
    ("smoke.max_tokens=" + "9" * 5000, "YAML"),
    ("smoke.max_tokens=0", "a whole number"),
    ("smoke.min_top1_agreement=1.5", "a number from 0 to 1"),
    ("benchmark.batch_sizes=[1, 0]", "a whole number"),
    ("engine.args=7", "engine.args.KEY"),
    ("model.layers=[0]", "model=synthetic_20b"),
    ("model.path=/tmp", "model=local"),
    ("model.repository=me/mine", "model=hub"),
    ("model.revision=main", "model=hub"),
    ("model.kind=local", "model=NAME"),
    ("model.name=../../x", "a directory below artifacts/"),
    ("model.name=/tmp/x", "a directory below artifacts/"),
    ("model.name=", "a directory below artifacts/"),
    ("model.name=.", "a directory below artifacts/"),
    ("model.name=a/b", "a directory below artifacts/"),
    ("model.name=a\nb", "a directory below artifacts/"),
    ("model.name=gpt_oss_20b", "another name"),
    ("model.expected=/nowhere", "a file"),
    (f"model.expected={'x' * 300}", "a file"),
    ("adapters.../x=some/lora", "letters, digits"),
    ("adapters={mine}", "NAME: DIRECTORY"),
    ("adapters=/tmp", "NAME: DIRECTORY"),
    ("adapters.mine=/nowhere/at/all", "a directory"),
    ("adapters={mine: {path: /tmp, any_base: no}}", "true or false"),
    ("adapters={mine: {path: /tmp, revision: main}}", "a directory has no revisions"),
    ("dtyp=float16", "dtype"),
    ("requant.mod=exact", "mode"),
    ("dtype.x=1", "dtype"),
    ("tiny", "key=value"),
    ("=tiny", "key=value"),
]


@pytest.mark.parametrize(("typed", "expected"), thinned(BAD_VALUES, 3))
def test_a_bad_value_is_refused_at_once(here, typed, expected):
    before = written(here)
    assert expected in refused(typed)
    assert params(here) == before


@pytest.mark.parametrize("revision", ["a b", "../main", "-x", "a\nb"])
def test_a_revision_that_cannot_be_is_refused(here, revision):
    from configure import composed

    with pytest.raises(UserError, match=r"model\.revision.*a commit, a branch or a tag"):
        composed(["model=gpt_oss_20b", f"model.revision={revision}"])
    assert composed(["model=gpt_oss_20b", "model.revision=0123456"]).model.revision == "0123456"


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("model=hub model.repository=https://huggingface.co/me/mine", "owner/name"),
        ("model=hub model.repository=mine", "owner/name"),
        ("model=hub model.repository=../mine", "owner/name"),
        ("model=local model.path=~nobody-of-this-name/x", "no checkpoint"),
        ("model=synthetic_20b model.layers=2", "all layers"),
        ("model=synthetic_20b model.layers=[1,2]", "all layers"),
    ],
)
def test_a_bad_value_of_a_model_is_refused_before_it_is_looked_for(here, typed, told):
    from configure import composed

    with pytest.raises(UserError, match=told):
        composed(typed.split())


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("path: null", "path: [a]", "model.path"),
        ("path: null", "path: 5", "model.path"),
        ("adapters: {}", "adapters: {1: 5}", "adapters.1"),
        ("adapters: {}", "adapters: {a: [b]}", "adapters.a"),
    ],
)
def test_settings_of_another_type_written_by_hand_are_refused(here, old, new, named):
    written(here)
    text = (here / "params.yaml").read_text()
    (here / "params.yaml").write_text(text.replace(old, new, 1))
    assert named in refused("dtype=bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "key", "value"),
    [
        ("fetch", "model.name", 5),
        ("fetch", "model.layers", 3),
        ("fetch", "requant", None),
        ("fetch", "requant.mod", "nf4"),
        ("adapter", "adapters", None),
        ("adapter", "adapters.x", 5),
        ("adapter", "adapters.x", {"path": "y"}),
    ],
)
def test_a_stage_refuses_settings_of_another_type_written_by_hand(here, stage, key, value):
    settings = written(here)
    section, _, last = key.partition(".")
    (settings[section] if last else settings)[last or section] = value
    (here / "params.yaml").write_text(yaml.safe_dump(settings))
    assert f"bad setting: {section}" in script(here, stage, *["adapter=x"] * (stage == "adapter"), ok=False)


def test_the_engines_environment_is_text(monkeypatch):
    from common import engine_of

    monkeypatch.setattr(os, "environ", {})
    engine_of(OmegaConf.create({"dtype": "float16", "engine": {"args": {}, "env": {"A": 1, "B": None, "C": "x"}}}))
    assert os.environ == {"A": "1", "B": "", "C": "x"}


@pytest.mark.parametrize("text", ["a: [b\n", "- 1\n", "x\n", "", "model: 3\nengine: {}\n", "\x00"])
def test_broken_settings_are_one_line(here, text):
    (here / "params.yaml").write_text(text)
    assert "params.yaml" in refused("dtype=bfloat16")
    assert written(here)["model"]["name"] == "tiny"


@pytest.mark.slow
def test_a_stage_says_in_one_line_what_is_wrong_with_the_settings(here):
    shutil.copytree(ROOT / "conf", here / "conf")
    for text, typed in (
        ("a: [b\n", "layer=0"),
        (None, "engine=gpu"),
        (None, "model.path=/a b,c"),
        (None, "model.name=../x"),
    ):
        shutil.copy(ROOT / "params.yaml", here)
        if text:
            (here / "params.yaml").write_text(text)
        assert "configure.py" in script(here, "dequant", typed, ok=False) or typed == "model.name=../x"
    assert not (here / "artifacts").exists()


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


@pytest.mark.parametrize(
    ("line", "named"), [("dtyp: x", "dtyp"), ("smoke: {tokens: 3}", "smoke.tokens"), ("adapters: 3", "adapters")]
)
def test_a_key_that_no_one_reads_is_refused_where_it_was_written_by_hand(here, line, named):
    written(here)
    key = line.partition(":")[0]
    settings = {name: value for name, value in params(here).items() if name != key}
    (here / "params.yaml").write_text(yaml.safe_dump(settings) + line + "\n")
    assert named in refused("dtype=bfloat16")
