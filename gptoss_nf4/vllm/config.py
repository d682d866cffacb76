"""The quantization config that vLLM builds from config.json, and where it sends each layer."""

import re
from pathlib import Path
from typing import Any

import torch
import vllm
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.models.utils import WeightsMapper

from gptoss_nf4.check.fitting import require_fitting
from gptoss_nf4.errors import UserError
from gptoss_nf4.format.quant_state import BLOCKSIZES, QUANT_TYPES
from gptoss_nf4.format.residual import scale_of
from gptoss_nf4.format.result import FORMAT_VERSION, QUANT_METHOD
from gptoss_nf4.format.rows import W13_ORDERS
from gptoss_nf4.storage.checkpoint import INDEX_FILE, Checkpoint
from gptoss_nf4.vllm.linear import Nf4LinearMethod
from gptoss_nf4.vllm.moe import Nf4MoEMethod
from gptoss_nf4.vllm.register import warn_if_untested

# Checkpoint name -> parameter name. `.w13_weight`, `.w2_weight`, `.w13_bias` and `.w2_bias` are claimed by vLLM's
# gpt_oss.py, which would slice and transpose them, and it drops `mlp.experts.` names that it does not know, all
# without a word; below `routed_experts.` other names reach the parameter's own loader. bitsandbytes' codebook and
# JSON are not parameters: the kernels have the first built in, and config.json says what the second does.
PARAMETER_NAMES = {
    re.compile(r"\.weight\.(quant_map|quant_state\..*)$"): None,
    re.compile(r"\.mlp\.experts\.(w13|w2)\.weight\.absmax$"): r".mlp.experts.routed_experts.\1_absmax",
    re.compile(r"\.mlp\.experts\.(w13|w2)\.weight$"): r".mlp.experts.routed_experts.\1_codes",
    re.compile(r"\.mlp\.experts\.(w13|w2)\.bias$"): r".mlp.experts.routed_experts.\1_expert_bias",
    re.compile(r"\.weight\.absmax$"): ".absmax",
}


class GptOssNf4Config(QuantizationConfig):
    """`quantization_config` of a converted checkpoint; its fields are written by `gptoss_nf4.convert.assemble`."""

    def __init__(
        self,
        quant_type: str,
        blocksize: int,
        w13_order: str,
        modules_to_not_convert: list[str],
        residual_scale: float = 1.0,
    ):
        super().__init__()
        self.quant_type = quant_type
        self.blocksize = blocksize
        self.w13_order = w13_order
        self.residual_scale = residual_scale
        self.modules_to_not_convert = frozenset(modules_to_not_convert)

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80  # Ampere: the oldest with bfloat16 and an attention backend for gpt-oss's sinks

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # everything stands in config.json

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "GptOssNf4Config":
        warn_if_untested(vllm.__version__)
        allowed = {
            "format_version": (FORMAT_VERSION,),
            "quant_type": QUANT_TYPES,
            "blocksize": BLOCKSIZES,
            "w13_order": W13_ORDERS,
        }
        for key, values in allowed.items():
            if config.get(key) not in values:
                raise UserError(
                    "bad quantization_config",
                    where="config.json",
                    got=f"{key}={config.get(key)!r}",
                    expected=f"one of {values}",
                    next_step="convert the checkpoint with this version of gptoss-nf4",
                )
        return cls(
            config["quant_type"],
            config["blocksize"],
            config["w13_order"],
            config.get("modules_to_not_convert", []),
            scale_of(config, "config.json"),
        )

    def maybe_update_config(self, model_name: str, hf_config=None, revision: str | None = None) -> None:
        """Refuse a local checkpoint that lacks a tensor, or has one that does not fit, before anything is allocated.

        vLLM's own check skips quantized models: a missing bias or router would stay uninitialised memory.
        """
        if (Path(model_name) / INDEX_FILE).is_file():
            require_fitting(Checkpoint(Path(model_name)))

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        return WeightsMapper(orig_to_new_regex=PARAMETER_NAMES)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, RoutedExperts):
            return Nf4MoEMethod(self, layer.moe_config, prefix)
        if isinstance(layer, LinearBase):
            name = prefix.replace(".attn.", ".self_attn.")
            if name in self.modules_to_not_convert or not name.endswith((".qkv_proj", ".o_proj")):
                return UnquantizedLinearMethod()  # the router is a LinearBase too
            return Nf4LinearMethod(self, prefix)
        return None
