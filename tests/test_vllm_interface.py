"""What the plugin takes for granted of vLLM, looked up in the vLLM that is installed: names, signatures and attributes.

Another version is looked at from its unpacked wheel, whose compiled parts are not needed:

    unzip vllm-*.whl -d /tmp/vllm && PYTHONPATH=/tmp/vllm pytest tests/test_vllm_interface.py
"""

import ast
import importlib
import inspect
import textwrap
from functools import cache

import pytest
import torch
import vllm
from project_imports import ROOT

from gptoss_nf4.errors import UserError
from gptoss_nf4.format.quant_state import BLOCKSIZES
from gptoss_nf4.format.rows import INTERLEAVED
from gptoss_nf4.vllm import config as config_module
from gptoss_nf4.vllm.config import GptOssNf4Config
from gptoss_nf4.vllm.linear import Nf4LinearMethod
from gptoss_nf4.vllm.lora.experts import Nf4LoRAExperts
from gptoss_nf4.vllm.model import STABLE_FORMATS, GptOssForCausalLM
from gptoss_nf4.vllm.moe import Nf4MoEMethod
from gptoss_nf4.vllm.settings import Settings
from gptoss_nf4.vllm.versions import TESTED_VERSIONS

FUSED_MOE = "vllm.model_executor.layers.fused_moe"
OURS = (GptOssNf4Config, Nf4LinearMethod, Nf4MoEMethod, Nf4LoRAExperts, GptOssForCausalLM)

# Attributes that the plugin reads or sets on vLLM's objects, by the class that has them.
ATTRIBUTES = {
    "vllm.config.VllmConfig": "device_config load_config lora_config model_config quant_config speculative_config",
    "vllm.config.LoadConfig": "load_format",
    "vllm.config.LoRAConfig": "max_lora_rank",
    "vllm.config.ModelConfig": "enable_prompt_embeds hf_config model",
    "vllm.config.SpeculativeConfig": "use_eagle",
    f"{FUSED_MOE}.activation.MoEActivation": "SWIGLUOAI",
    f"{FUSED_MOE}.config.FusedMoEConfig": "activation has_bias is_lora_enabled moe_parallel_config",
    f"{FUSED_MOE}.config.FusedMoEParallelConfig": "tp_rank tp_size",
    f"{FUSED_MOE}.experts.lora_experts_mixin.LoRAExpertsMixin": "_lora_context",
    f"{FUSED_MOE}.fused_moe_method_base.FusedMoEMethodBase": "moe moe_kernel",
    f"{FUSED_MOE}.experts.lora_context.MoELoRAContext": (
        "punica_wrapper w13_lora_a_stacked w13_lora_b_stacked w2_lora_a_stacked w2_lora_b_stacked"
    ),
    f"{FUSED_MOE}.routed_experts.RoutedExperts": "expert_map global_num_experts moe_config",
    "vllm.lora.layers.base_linear.BaseLinearLayerWithLoRA": (
        "_apply_lora_to_output _enable_aux_cuda_stream apply base_layer lora_a_stacked lora_b_stacked punica_wrapper"
    ),
    "vllm.lora.model_manager.LoRAModelManager": "device lora_config model modules punica_wrapper_mapping",
    "vllm.lora.punica_wrapper.punica_base.PunicaWrapperBase": "_token_lora_indices device indices_len token_lora_indices",
    "vllm.lora.punica_wrapper.punica_gpu.PunicaWrapperGPU": "token_mapping_meta",
    "vllm.lora.ops.triton_ops.lora_kernel_metadata.LoRAKernelMeta": "no_lora_flag_cpu",
    "vllm.lora.worker_manager.WorkerLoRAManager": "_lora_model_cls",
    "vllm.model_executor.layers.layernorm.RMSNorm": "variance_epsilon",
    "vllm.model_executor.models.gpt_oss.GptOssForCausalLM": "hf_to_vllm_mapper vllm_config",
}

CALLED_BY_PLACE = ("workspace_shapes",)  # methods of ours that vLLM calls so alone
ALSO_PASSED = {"create_weights": ("weight_loader",)}  # among the **extra_weight_attrs of theirs

# Calls of vLLM by the plugin: how many arguments by place, and the names of the others.
CALLS = {
    f"{FUSED_MOE}.config.biased_moe_quant_config": (2, ""),
    f"{FUSED_MOE}.fused_moe.fused_experts": (5, "activation expert_map global_num_experts quant_config"),
    f"{FUSED_MOE}.modular_kernel.FusedMoEKernel": (2, ""),
    f"{FUSED_MOE}.moe_align_block_size.moe_align_block_size": (4, ""),
    f"{FUSED_MOE}.prepare_finalize.no_dp_ep.MoEPrepareAndFinalizeNoDPEPModular": (0, ""),
    "vllm.config.get_current_vllm_config_or_none": (0, ""),
    "vllm.lora.lora_model.LoRAModel": (3, ""),
    "vllm.lora.lora_weights.LoRALayerWeights": (1, "lora_a lora_alpha lora_b rank scaling"),
    "vllm.model_executor.layers.quantization.register_quantization_config": (1, ""),
    "vllm.model_executor.models.gpt_oss.GptOssForCausalLM": (0, "prefix vllm_config"),
    "vllm.model_executor.models.registry.ModelRegistry.register_model": (2, ""),
    "vllm.model_executor.models.utils.WeightsMapper": (0, "orig_to_new_regex"),
}


def imported() -> list[tuple[str, str | None]]:
    """Modules of vLLM that the plugin's files import, within functions too, and names from them (None: the module)."""
    found = set()
    for file in sorted((ROOT / "gptoss_nf4" / "vllm").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {(alias.name, None) for alias in node.names if alias.name.split(".")[0] == "vllm"}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                found |= {(node.module, alias.name) for alias in node.names}
    return sorted(found, key=str)


def look_up(path: str) -> object:
    """`package.module.name` or `package.module.name.attribute`."""
    parts = path.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError as error:
            if error.name is not None and path.startswith(error.name):
                continue
            raise
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise LookupError(path)


@cache
def attributes(kind: type) -> frozenset[str]:
    """Names that an object of `kind` has: of its classes, their annotations, and those that a method sets on `self`."""
    found = set(dir(kind))
    for base in kind.__mro__:
        found |= set(vars(base).get("__annotations__", {}))
        if base.__module__.split(".")[0] != "vllm":
            continue
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(base)))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found |= {node.attr} if isinstance(node.value, ast.Name) and node.value.id == "self" else set()
    return frozenset(found)


def test_the_lists_are_not_empty():
    assert len(imported()) > 25
    assert ("vllm.model_executor.layers.fused_moe.fused_moe", "fused_experts") in imported()


@pytest.mark.parametrize(("module", "name"), imported())
def test_imported_names_exist(module, name):
    found = importlib.import_module(module)
    if name is not None and not hasattr(found, name):
        importlib.import_module(f"{module}.{name}")  # a module below


@pytest.mark.parametrize("path", ATTRIBUTES)
def test_attributes_exist(path):
    missing = set(ATTRIBUTES[path].split()) - attributes(look_up(path))
    assert not missing


def test_a_missing_attribute_is_found():
    assert "no_such_thing" not in attributes(look_up("vllm.config.VllmConfig"))
    assert "moe" in attributes(look_up(f"{FUSED_MOE}.fused_moe_method_base.FusedMoEMethodBase"))  # set in __init__ only


@pytest.mark.parametrize("path", CALLS)
def test_calls_fit(path):
    count, names = CALLS[path]
    inspect.signature(look_up(path)).bind(*range(count), **dict.fromkeys(names.split()))


@pytest.mark.parametrize("kind", OURS)
def test_our_classes_have_all_that_vllm_leaves_open(kind):
    assert not getattr(kind, "__abstractmethods__", None)


def overridden() -> list[tuple[type, str]]:
    """Methods of our classes that a class of vLLM has too."""
    return [
        (kind, name)
        for kind in OURS
        for name, function in vars(kind).items()
        if name != "__init__" and inspect.isroutine(getattr(kind, name)) and theirs(kind, name) is not None
    ]


def theirs(kind: type, name: str) -> object:
    """What `kind` would inherit as `name`, from a class of vLLM."""
    for base in kind.__mro__[1:]:
        if name in vars(base) and base.__module__.split(".")[0] == "vllm":
            return vars(base)[name]
    return None


@pytest.mark.parametrize(("kind", "name"), overridden())
def test_our_methods_take_what_theirs_take(kind, name):
    """By the names of theirs, or by place. vLLM calls on objects, so one of the two may be static and the other not."""
    parameters, by_place = list(ALSO_PASSED.get(name, ())), []
    ours = without_self(vars(kind)[name])
    for parameter in without_self(theirs(kind, name)).parameters.values():
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            parameters.append(parameter.name)
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.POSITIONAL_ONLY):
            by_place.append(parameter.name)
    if name in CALLED_BY_PLACE:
        ours.bind(*by_place)
    else:
        ours.bind(**dict.fromkeys(parameters))


def without_self(function: object) -> inspect.Signature:
    """The signature of what stands in a class, as its objects' callers see it."""
    signature = inspect.signature(getattr(function, "__func__", function))
    if isinstance(function, staticmethod):
        return signature
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def test_every_override_of_note_is_looked_at():
    names = {f"{kind.__name__}.{name}" for kind, name in overridden()}
    assert {
        "GptOssNf4Config.maybe_update_config",
        "GptOssNf4Config.get_checkpoint_weight_mapper",
        "Nf4LinearMethod.create_weights",
        "Nf4MoEMethod.apply",
        "Nf4LoRAExperts.apply",
        "GptOssForCausalLM.load_weights",
    } <= names


def test_names_of_the_experts_parameters_reach_their_loaders():
    """`config.PARAMETER_NAMES` leads below `routed_experts.`, and vLLM leaves such names alone."""
    from vllm.model_executor.model_loader.weight_utils import maybe_remap_moe_expert_param_name

    for name in ("w13_codes", "w13_absmax", "w13_expert_bias", "w2_codes", "w2_absmax", "w2_expert_bias"):
        whole = f"layers.0.mlp.experts.routed_experts.{name}"
        assert maybe_remap_moe_expert_param_name(whole, {whole: torch.empty(0)}) == whole


def test_the_default_format_of_loading_is_one_that_we_read_on_with():
    from vllm.config import LoadConfig

    assert LoadConfig().load_format in STABLE_FORMATS


def settings() -> Settings:
    return Settings(quant_type="nf4", blocksize=BLOCKSIZES[-1], w13_order=INTERLEAVED)


@pytest.mark.parametrize(
    "error", [ImportError("no module\nthere"), AttributeError("gone"), TypeError("abstract method new")]
)
def test_what_an_untested_vllm_breaks_is_one_line(monkeypatch, error):
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(config_module, "_quant_method", fail)
    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    with pytest.raises(UserError) as raised:
        GptOssNf4Config(settings()).get_quant_method(torch.nn.Identity(), "model.layers.0.attn.qkv_proj")
    line = str(raised.value)
    assert "\n" not in line
    assert "vLLM 0.99.0" in line
    assert str(error).splitlines()[0] in line
    assert all(version in line for version in TESTED_VERSIONS)
    assert raised.value.__cause__ is error  # for the log


def test_in_a_tested_vllm_a_fault_is_ours_and_keeps_its_traceback(monkeypatch):
    def fail(*arguments: object) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr(config_module, "_quant_method", fail)
    monkeypatch.setattr(vllm, "__version__", TESTED_VERSIONS[0])
    with pytest.raises(TypeError, match="a bug"):
        GptOssNf4Config(settings()).get_quant_method(torch.nn.Identity(), "")
