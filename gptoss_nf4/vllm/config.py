"""The quantization config that vLLM builds from config.json, and which method it gives each layer.

Every vLLM process imports this module, for every model. So it imports little, and the methods only when a layer asks.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from gptoss_nf4.errors import UserError, first_line
from gptoss_nf4.format.result import QUANT_METHOD, Expected
from gptoss_nf4.vllm.settings import Settings
from gptoss_nf4.vllm.transfer import Transfer

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.model_executor.models.utils import WeightsMapper

# Checkpoint name -> parameter name; None drops the tensor. The names `.w13_weight`, `.w2_weight`, `.w13_bias` and
# `.w2_bias` are taken: vLLM's gpt_oss.py would slice and transpose such tensors. It drops other names in `mlp.experts.`
# without a word. Names below `routed_experts.` reach the parameter's own loader. bitsandbytes' codebook and state are
# dropped: the kernels have the codebook built in, and config.json says what the state says.
PARAMETER_NAMES = {
    re.compile(r"\.weight\.(quant_map|quant_state\..*)$"): None,
    re.compile(r"\.mlp\.experts\.(w13|w2)\.weight\.absmax$"): r".mlp.experts.routed_experts.\1_absmax",
    re.compile(r"\.mlp\.experts\.(w13|w2)\.weight$"): r".mlp.experts.routed_experts.\1_codes",
    re.compile(r"\.mlp\.experts\.(w13|w2)\.bias$"): r".mlp.experts.routed_experts.\1_expert_bias",
    re.compile(r"\.weight\.absmax$"): ".absmax",
}


class GptOssNf4Config(QuantizationConfig):
    """The `quantization_config` of a converted checkpoint, in the form that vLLM asks for.

    `transfer` brings the weights to the GPU: the model opens it, and the layers' loaders use it.
    """

    def __init__(self, settings: Settings):
        super().__init__()
        self.settings = settings
        self.transfer = Transfer()
        # What has to come while loading, where no file was checked before: from the Hub, or from a cloud store.
        self.expected: dict[str, Expected] | None = None

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80  # Ampere: the oldest with bfloat16 and an attention backend for gpt-oss's sinks

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # config.json has everything

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "GptOssNf4Config":
        import vllm

        from gptoss_nf4.vllm.versions import warn_if_untested

        warn_if_untested(vllm.__version__)
        return cls(Settings.of(config))

    def maybe_update_config(
        self, model_name: str, hf_config: "PretrainedConfig | None" = None, revision: str | None = None
    ) -> None:
        """UserError for a checkpoint with a tensor that is missing or does not fit, before anything is allocated.

        vLLM's own check skips quantized models, so a bias or router that is missing would stay uninitialised memory.
        What comes from elsewhere than a local directory is checked once more while it is loaded: see `expected`.
        """
        from gptoss_nf4.check.fitting import require_fitting
        from gptoss_nf4.format.result import expected_tensors
        from gptoss_nf4.storage.checkpoint import INDEX_FILE, Checkpoint
        from gptoss_nf4.vllm.places import directory_of

        directory = directory_of(model_name, revision)
        if directory is not None:
            require_fitting(Checkpoint(directory))
        if hf_config is not None and not (Path(model_name) / INDEX_FILE).is_file():
            self.expected = expected_tensors(hf_config.to_dict(), Path(model_name))

    def get_checkpoint_weight_mapper(self) -> "WeightsMapper":
        from vllm.model_executor.models.utils import WeightsMapper

        return WeightsMapper(orig_to_new_regex=PARAMETER_NAMES)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of `layer`. UserError where an untested vLLM lacks something that the methods are made of."""
        import vllm

        from gptoss_nf4.vllm.versions import TESTED_VERSIONS, is_tested

        try:
            return _quant_method(self, layer, prefix)
        except (ImportError, AttributeError, TypeError) as error:  # a name, or an abstract method, that is new or gone
            if is_tested(vllm.__version__):
                raise
            raise UserError(
                "no place for the plugin",
                where=f"vLLM {vllm.__version__}",
                got=f"{type(error).__name__}: {first_line(error)}",
                expected=f"a version that the plugin was tested with: {', '.join(TESTED_VERSIONS)}",
                next_step="install one of them, or a newer gptoss-nf4",
            ) from error


def _quant_method(config: GptOssNf4Config, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

    from gptoss_nf4.vllm.linear import Nf4LinearMethod
    from gptoss_nf4.vllm.moe import Nf4MoEMethod

    settings = config.settings
    if isinstance(layer, RoutedExperts):
        return Nf4MoEMethod(settings, layer.moe_config, prefix, config.transfer)
    if isinstance(layer, LinearBase):
        name = prefix.replace(".attn.", ".self_attn.")
        if name in settings.dense_modules or not name.endswith((".qkv_proj", ".o_proj")):
            return UnquantizedLinearMethod()  # the router is a LinearBase too
        return Nf4LinearMethod(settings, prefix)
    return None
