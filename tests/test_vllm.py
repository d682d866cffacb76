"""The real vLLM on converted checkpoints, in float32, against transformers: 1e-3 in log-probability."""

import json
import multiprocessing
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import hub_stand_in
import pytest
import torch
import warm_vllm
from conftest import converted_for_interpreter, edit_shard, local, make_dense
from openai import OpenAI
from project_imports import ROOT
from whole_model import log_probabilities, whole_model

from benchmarks.dtypes import PROMPTS, served
from benchmarks.vllm_server import server
from gptoss_nf4.check.agreement import Agreement
from gptoss_nf4.convert.plan import RequantOptions
from gptoss_nf4.engine.generate import generate
from gptoss_nf4.errors import UserError
from gptoss_nf4.flow import convert
from gptoss_nf4.format.result import expected_tensors
from gptoss_nf4.format.rows import CONCATENATED
from gptoss_nf4.samples import embedded
from gptoss_nf4.source.interface import Source
from gptoss_nf4.source.layouts import open_checkpoint
from gptoss_nf4.storage.artifacts import Artifacts
from gptoss_nf4.storage.checkpoint import INDEX_FILE
from gptoss_nf4.storage.reading import read_json_object
from gptoss_nf4.storage.writing import write_json
from gptoss_nf4.vllm.settings import Settings

ENGINE = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 8, "enforce_eager": True}


@pytest.fixture(scope="module")
def converted(tiny, tmp_path_factory) -> tuple[Source, Artifacts]:
    model, artifacts = local(tiny, tmp_path_factory.mktemp("converted"))
    convert(model, artifacts, RequantOptions(), "float32")
    return open_checkpoint(tiny), artifacts


@pytest.fixture(scope="module")
def dynamic(tiny, tmp_path_factory) -> tuple[Source, Artifacts]:
    """Unsloth's dynamic quantization: o_proj dense in one layer, k_proj dense in the other; w13 concatenated."""
    root = tmp_path_factory.mktemp("dynamic")
    directory = root / "source"
    shutil.copytree(tiny, directory)
    edit_shard(directory, 0, lambda t: make_dense(t, "model.layers.0.self_attn.o_proj"))
    edit_shard(directory, 1, lambda t: make_dense(t, "model.layers.1.self_attn.k_proj"))
    model, artifacts = local(directory, root / "artifacts")
    convert(model, artifacts, RequantOptions(w13_order=CONCATENATED), "float32")
    return open_checkpoint(directory), artifacts


@pytest.fixture(scope="module")
def fused(tmp_path_factory) -> tuple[Source, Artifacts]:
    """Experts fused in 4 bit, blocks along the outputs. A rank of two has 5.5 groups of w13."""
    root = tmp_path_factory.mktemp("fused")
    embedded.write_checkpoint(root / "source", replace(embedded.TINY, intermediate=352), stacked=True)
    model, artifacts = local(root / "source", root / "artifacts")
    convert(model, artifacts, RequantOptions(), "float32")
    return open_checkpoint(root / "source"), artifacts


def agreement(source: Source, generations: list) -> Agreement:
    model, result = whole_model(source.checkpoint.directory), Agreement()
    for generation in generations:
        assert generation.finite
        result.add(generation, log_probabilities(model, generation.token_ids))
    return result


@pytest.fixture(scope="module")
def all_served(converted, dynamic, fused) -> list[list]:
    return list(served([(artifacts.checkpoint, ENGINE) for _, artifacts in (converted, dynamic, fused)], warm_vllm.run))


def test_nan_logits_are_not_finite():
    from gptoss_nf4.check.agreement import Generation

    assert not Generation("", "", [1], 0, [{}, {3: float("nan")}]).finite
    assert Generation("", "", [1], 0, [{}, {3: -1.0, 4: float("-inf")}]).finite


@pytest.mark.slow
def test_float32_agrees_with_transformers(converted, all_served):
    generations = all_served[0]
    result = agreement(converted[0], generations)
    assert result.positions > 100
    assert result.agreeing == result.positions
    assert result.worst_difference < 1e-3
    for generation in generations:  # not collapsed onto one token
        assert len(set(generation.token_ids[generation.prompt_tokens :])) > 8


@pytest.mark.slow
def test_dynamic_quantization_and_concatenated_rows_agree(dynamic, all_served):
    result = agreement(dynamic[0], all_served[1])
    assert result.agreeing == result.positions
    assert result.worst_difference < 1e-3


@pytest.mark.slow
def test_blocks_along_the_outputs_agree(fused, all_served):
    result = agreement(fused[0], all_served[2])
    assert result.positions > 100
    assert result.agreeing == result.positions
    assert result.worst_difference < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dynamic", "fused"])
def test_two_ranks_agree(layout, request, monkeypatch):
    """Tensor parallelism cuts w2's rows through a block (160 input features a rank) and splits q, k and v by heads.

    Where blocks run along the outputs, it cuts a group of w13's rows.
    """
    if (os.cpu_count() or 1) < 2:
        pytest.skip("needs two cores: vLLM binds one rank to each")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    source, artifacts = request.getfixturevalue(layout)
    (generations,) = served([(artifacts.checkpoint, ENGINE | {"tensor_parallel_size": 2})], warm_vllm.run)
    result = agreement(source, generations)
    assert result.agreeing == result.positions
    assert result.worst_difference < 1e-3


@pytest.mark.slow
def test_packed_weights_and_interpreted_kernels_agree(tmp_path):
    """The GPU's path without one: loading into the kernels' order, routing, and the kernels, within vLLM.

    tests/test_vllm_lora.py does it with experts whose blocks run along the outputs, and adapters.
    """
    artifacts = converted_for_interpreter(tmp_path / "source", tmp_path / "artifacts")
    script = [sys.executable, ROOT / "tests" / "packed_in_vllm.py", tmp_path / "source", artifacts.checkpoint]
    done = warm_vllm.run(script, cwd=ROOT, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout[done.stdout.index('{"positions"') : done.stdout.rindex("}") + 1])
    assert result["positions"] >= 8
    assert result["top1_agreement"] == 1
    assert result["worst_logprob_difference"] < 0.05
    assert result["dtypes"]["head"] == "torch.int32"
    # The kernels read float16, in units of their own.
    assert result["dtypes"]["w13_absmax"] == result["dtypes"]["w2_absmax"] == "torch.float16"


@pytest.mark.slow
def test_vllm_serve_without_flags_answers_an_openai_client(converted, tmp_path):
    _, artifacts = converted
    with server(artifacts.checkpoint, {}, tmp_path / "serve.log") as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        answer = client.completions.create(
            model=str(artifacts.checkpoint), prompt=PROMPTS[0], max_tokens=8, temperature=0, extra_body={"ignore_eos": True}
        )
    assert answer.usage.completion_tokens == 8
    assert len(set(answer.choices[0].text)) > 1


@pytest.mark.slow
def test_vllm_serve_takes_a_published_checkpoint_from_the_hub(converted, tmp_path, monkeypatch):
    """By its repository's name. vLLM downloads it from the stand-in, into a cache of its own."""
    _, artifacts = converted
    repository = "someone/my-finetune"
    with hub_stand_in.hub() as hub:
        hub.add(repository, {file.name: file.read_bytes() for file in artifacts.checkpoint.iterdir()})
        for key, value in hub_stand_in.environment(hub, tmp_path / "hf", token=None).items():
            monkeypatch.setenv(key, value)
        with server(Path(repository), {"enforce_eager": True}, tmp_path / "serve.log") as url:
            client = OpenAI(base_url=f"{url}/v1", api_key="none")
            asked = {"prompt": PROMPTS[0], "max_tokens": 8, "temperature": 0, "extra_body": {"ignore_eos": True}}
            answer = client.completions.create(model=repository, **asked)
        assert {"layer-0.safetensors", "layer-1.safetensors", "dense.safetensors"} <= set(hub.served)
    assert answer.usage.completion_tokens == 8
    assert len(set(answer.choices[0].text)) > 1


def without_a_bias(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.experts.w2.bias"]


def with_a_short_absmax(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.mlp.experts.w2.weight.absmax"
    tensors[name] = tensors[name][..., :-1].contiguous()


def with_a_router_in_another_dtype(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.router.weight"] = tensors["model.layers.0.mlp.router.weight"].half()


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        ("dense.safetensors", without_a_bias, "no model.layers.1.mlp.experts.w2.bias"),
        ("layer-1.safetensors", with_a_short_absmax, "got model.layers.1.mlp.experts.w2.weight.absmax F32 [8, 192, 4]"),
        ("dense.safetensors", with_a_router_in_another_dtype, "got model.layers.0.mlp.router.weight F16 [8, 192]"),
    ],
)
def test_vllm_refuses_tensors_that_do_not_fit_before_anything_is_loaded(converted, tmp_path, file, change, named):
    """The index still names all of them. vLLM's LLM itself ends with the line, before its engine starts."""
    from safetensors.torch import load_file, save_file

    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(converted[1].checkpoint, checkpoint)
    tensors = load_file(checkpoint / file)
    change(tensors)
    save_file(tensors, checkpoint / file, metadata={"format": "pt"})
    with pytest.raises(Exception, match=re.escape(named)):
        generate(checkpoint, PROMPTS[:1], 1, ENGINE)
    assert multiprocessing.active_children() == []


def plugin_config(checkpoint):
    from gptoss_nf4.vllm.config import GptOssNf4Config

    return GptOssNf4Config.from_config(read_json_object(checkpoint / "config.json")["quantization_config"])


def test_an_index_without_a_router_is_refused_before_loading(converted, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(converted[1].checkpoint, checkpoint)
    config = plugin_config(checkpoint)
    config.maybe_update_config(str(checkpoint))
    index = read_json_object(checkpoint / INDEX_FILE)
    del index["weight_map"]["model.layers.0.mlp.router.bias"]
    write_json(checkpoint / INDEX_FILE, index)
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.router\.bias"):
        config.maybe_update_config(str(checkpoint))


def test_a_foreign_quantization_config_is_refused(converted):
    from gptoss_nf4.vllm.config import GptOssNf4Config

    config = read_json_object(converted[1].checkpoint / "config.json")["quantization_config"]
    with pytest.raises(UserError, match="format_version"):
        GptOssNf4Config.from_config(config | {"format_version": 99})
    with pytest.raises(UserError, match="w13_order"):
        GptOssNf4Config.from_config(config | {"w13_order": "halves"})
    with pytest.raises(UserError, match="modules_to_not_convert"):
        GptOssNf4Config.from_config(config | {"modules_to_not_convert": "o_proj"})


def test_a_config_that_lists_no_dense_modules_has_none(converted, tmp_path):
    """For the plugin's layers and for the check before loading alike."""
    config = read_json_object(converted[1].checkpoint / "config.json")
    whole = expected_tensors(config, tmp_path)
    for listed in ([], None):
        config["quantization_config"]["modules_to_not_convert"] = listed
        assert expected_tensors(config, tmp_path) == whole
        assert Settings.of(config["quantization_config"]).dense_modules == frozenset()
    del config["quantization_config"]["modules_to_not_convert"]
    assert expected_tensors(config, tmp_path) == whole
    assert Settings.of(config["quantization_config"]).dense_modules == frozenset()


def test_untested_versions_get_one_warning(monkeypatch):
    from gptoss_nf4.vllm import versions

    messages = []
    monkeypatch.setattr(versions.logger, "warning", lambda text, *arguments: messages.append(text % arguments))
    assert not versions.warn_if_untested("0.32.0+cpu")
    assert messages == []
    assert versions.warn_if_untested("0.99.1")
    assert versions.warn_if_untested("0.99.1")
    assert len(messages) == 1
    assert "0.99.1" in messages[0]


def a_missing_module(monkeypatch):
    monkeypatch.setitem(sys.modules, "gptoss_nf4.vllm.config", None)


def a_registry_that_changed(monkeypatch):
    from vllm.model_executor.layers import quantization

    monkeypatch.setattr(quantization, "QUANTIZATION_METHODS", None)


@pytest.mark.parametrize("break_it", [a_missing_module, a_registry_that_changed])
def test_whatever_goes_wrong_is_one_line_and_harms_no_other_model(monkeypatch, break_it):
    from gptoss_nf4.vllm import register

    messages = []
    monkeypatch.setattr(register.logger, "error", lambda text, *arguments: messages.append(text % arguments))
    break_it(monkeypatch)
    register.register()
    assert len(messages) == 1
    assert "no place for the plugin" in messages[0]
    assert "\n" not in messages[0]


def test_only_used_experts_are_made():
    from gptoss_nf4.vllm.experts import run_used_experts

    made = []

    def weight(shape):
        return lambda expert: made.append(expert) or torch.ones(shape)

    ids = torch.tensor([[1, 4], [4, 6]])
    expert_map = torch.tensor([-1, 0, -1, -1, 1, -1, -1, -1])  # expert 6 lives on another rank
    run_used_experts(
        torch.ones(2, 8),
        torch.ones(2, 2),
        ids,
        expert_map,
        weight((6, 8)),
        torch.ones(2, 6),
        weight((8, 3)),
        torch.ones(2, 8),
    )
    assert sorted(made) == [0, 0, 1, 1]
