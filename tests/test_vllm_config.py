"""vllm/config.py without an engine: what vLLM is told, which layer gets which method, and where each tensor goes."""

from types import SimpleNamespace

import pytest
import torch
import vllm
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import (
    LinearBase,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from gptoss_nf4.errors import UserError
from gptoss_nf4.storage.checkpoint import Checkpoint
from gptoss_nf4.vllm.config import GptOssNf4Config
from gptoss_nf4.vllm.linear import Nf4LinearMethod
from gptoss_nf4.vllm.moe import Nf4MoEMethod
from gptoss_nf4.vllm.settings import Settings
from gptoss_nf4.vllm.versions import is_tested

SECTION = {"format_version": 1, "quant_type": "nf4", "blocksize": 64, "w13_order": "interleaved"}
UNTESTED = "0.98.7"  # of no other test: the warning comes once a process


def config_of(**fields) -> GptOssNf4Config:
    return GptOssNf4Config(Settings.of(SECTION | fields))


def test_what_vllm_asks_before_it_loads():
    """An RTX 3090 has 8.6, an A100 8.0, and a Turing card with 7.5 no bfloat16."""
    config = config_of()
    assert config.get_name() == "gptoss_nf4"
    assert 75 < config.get_min_capability() <= 80
    assert set(config.get_supported_act_dtypes()) == {torch.float16, torch.bfloat16, torch.float32}
    assert config.get_config_filenames() == []
    assert config.expected is None


def test_settings_are_what_config_json_says():
    """The scale, the dense modules and the directions too, which an older result has not."""
    assert Settings.of(SECTION) == Settings("nf4", 64, "interleaved", 1.0, frozenset(), {})
    w2, dense = "model.layers.0.mlp.experts.w2", "model.layers.1.self_attn.o_proj"
    other = {"format_version": 2, "quant_type": "fp4", "blocksize": 128, "w13_order": "concatenated"}
    lists = {"residual_scale": 0.25, "modules_to_not_convert": [dense], "blocks_along": {w2: "outputs"}}
    assert Settings.of(other | lists) == Settings("fp4", 128, "concatenated", 0.25, frozenset({dense}), {w2: "outputs"})


@pytest.mark.parametrize("key", SECTION)
@pytest.mark.parametrize("value", [None, 3, "other"])
def test_a_section_without_one_of_its_values_is_refused_by_its_key(key, value):
    for section in (SECTION | {key: value}, {name: given for name, given in SECTION.items() if name != key}):
        with pytest.raises(UserError, match=rf"bad quantization_config: config\.json: got {key}=.*expected one of"):
            Settings.of(section)


def method_of(kind: type, prefix: str, config: GptOssNf4Config, **attributes):
    """The method of a layer of that class, which vLLM alone could make whole."""
    layer = kind.__new__(kind)
    layer.__dict__ |= attributes
    return config.get_quant_method(layer, prefix)


@pytest.mark.parametrize(("kind", "name"), [(QKVParallelLinear, "qkv_proj"), (RowParallelLinear, "o_proj")])
def test_attention_is_4_bit_but_for_what_config_json_lists(kind, name):
    """vLLM calls the module `attn`, the checkpoint `self_attn`. A name lists one layer, not its neighbours."""
    config = config_of(modules_to_not_convert=[f"model.layers.1.self_attn.{name}"])
    for layer in (0, 11):
        prefix = f"model.layers.{layer}.attn.{name}"
        method = method_of(kind, prefix, config)
        assert isinstance(method, Nf4LinearMethod)
        assert (method.settings, method.prefix) == (config.settings, prefix)
    assert isinstance(method_of(kind, f"model.layers.1.attn.{name}", config), UnquantizedLinearMethod)


@pytest.mark.parametrize("kind", [ReplicatedLinear, LinearBase])
def test_the_router_is_never_4_bit(kind):
    assert isinstance(method_of(kind, "model.layers.0.mlp.router", config_of()), UnquantizedLinearMethod)


def test_experts_are_4_bit():
    config, moe = config_of(), SimpleNamespace(activation=MoEActivation.SWIGLUOAI, has_bias=True)
    method = method_of(RoutedExperts, "model.layers.0.mlp.experts", config, moe_config=moe)
    assert isinstance(method, Nf4MoEMethod)
    assert (method.settings, method.prefix) == (config.settings, "model.layers.0.mlp.experts")
    assert (method.moe, method.transfer) == (moe, config.transfer)


@pytest.mark.parametrize("kind", [VocabParallelEmbedding, ParallelLMHead, Attention])
def test_other_layers_are_vllms_own(kind):
    assert method_of(kind, "model.embed_tokens", config_of()) is None


PARAMETERS = {  # of a layer's tensors that are not stored under their parameter's name; None is dropped
    "self_attn.qkv_proj.weight.absmax": "self_attn.qkv_proj.absmax",
    "self_attn.o_proj.weight.absmax": "self_attn.o_proj.absmax",
    "mlp.experts.w13.weight": "mlp.experts.routed_experts.w13_codes",
    "mlp.experts.w13.weight.absmax": "mlp.experts.routed_experts.w13_absmax",
    "mlp.experts.w13.bias": "mlp.experts.routed_experts.w13_expert_bias",
    "mlp.experts.w2.weight": "mlp.experts.routed_experts.w2_codes",
    "mlp.experts.w2.weight.absmax": "mlp.experts.routed_experts.w2_absmax",
    "mlp.experts.w2.bias": "mlp.experts.routed_experts.w2_expert_bias",
}
SIDECARS = (".weight.quant_map", ".weight.quant_state.bitsandbytes__nf4")


def test_every_tensor_of_a_result_goes_to_its_parameter(converted):
    mapper, tensors = config_of().get_checkpoint_weight_mapper(), Checkpoint(converted).tensors
    expected = {name: None if name.endswith(SIDECARS) else name for name in tensors}
    expected |= {f"model.layers.{n}.{old}": f"model.layers.{n}.{new}" for n in (0, 1) for old, new in PARAMETERS.items()}
    assert {name: mapper.map_name(name) for name in tensors} == expected
    assert list(expected.values()).count(None) == 2 * 4 * 2


def test_the_installed_vllm_is_tested_in_every_build():
    base = vllm.__version__.partition("+")[0]
    for version in (vllm.__version__, base, f"{base}+cu129", f"{base}.post1"):
        assert is_tested(version)
    for version in (UNTESTED, f"1{base}", f"{base}1", base.rpartition(".")[0]):
        assert not is_tested(version)


def test_an_untested_vllm_is_told_when_a_checkpoint_is_opened(monkeypatch, plugin_log):
    monkeypatch.setattr(vllm, "__version__", UNTESTED)
    for _ in range(2):
        assert GptOssNf4Config.from_config(SECTION).settings == Settings("nf4", 64, "interleaved")
    told = [record.getMessage() for record in plugin_log.records if record.name == "vllm.gptoss_nf4"]
    assert len(told) == 1
    assert f"vLLM {UNTESTED} is untested" in told[0]
