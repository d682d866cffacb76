"""Settings that cannot be, typed or written into params.yaml by hand: one line each, from configure.py and from stages."""

import os
import shutil

import pytest
import yaml
from configuring import params, refused, script, written
from halves import thinned
from omegaconf import OmegaConf
from project_imports import ROOT

from gptoss_nf4.errors import UserError

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


@pytest.mark.parametrize(
    ("line", "named"), [("dtyp: x", "dtyp"), ("smoke: {tokens: 3}", "smoke.tokens"), ("adapters: 3", "adapters")]
)
def test_a_key_that_no_one_reads_is_refused_where_it_was_written_by_hand(here, line, named):
    written(here)
    key = line.partition(":")[0]
    settings = {name: value for name, value in params(here).items() if name != key}
    (here / "params.yaml").write_text(yaml.safe_dump(settings) + line + "\n")
    assert named in refused("dtype=bfloat16")
