"""vLLM's gpt-oss, with the residual stream of converted checkpoints scaled. Any other gpt-oss stays as it is."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.models import gpt_oss

from gptoss_nf4.check.fitting import fitting
from gptoss_nf4.errors import UserError
from gptoss_nf4.format.residual import writes_to_stream
from gptoss_nf4.vllm.config import GptOssNf4Config
from gptoss_nf4.vllm.head import HeadMethod
from gptoss_nf4.vllm.router import use_kernel
from gptoss_nf4.vllm.transfer import GROUP_BYTES, Transfer

if TYPE_CHECKING:
    from vllm.lora.model_manager import LoRAModelManager

EXPERTS = ".mlp.experts."
# Formats whose tensors keep their values after the next one was asked for: views of mapped files, or memory of their own.
STABLE_FORMATS = ("auto", "hf", "safetensors")


def refuse_unscaled_access(vllm_config: VllmConfig) -> None:
    """UserError for a feature that reads or writes the residual stream and does not know its scale."""
    speculative = vllm_config.speculative_config
    found = {
        "prompt embeddings": vllm_config.model_config.enable_prompt_embeds,
        "EAGLE speculation": speculative is not None and speculative.use_eagle(),
    }
    for what, asked_for in found.items():
        if asked_for:
            raise UserError(
                "unsupported with a residual_scale",
                where=vllm_config.model_config.model,
                got=what,
                expected="a run without it",
                next_step="convert with dtype=bfloat16, or with residual_scale=1",
            )


class GptOssForCausalLM(gpt_oss.GptOssForCausalLM):  # vLLM looks things up by this name
    """Applies the `residual_scale` that config.json records: see `gptoss_nf4.format.residual`.

    vLLM's class has eps 1e-5 built into its norms, whatever config.json says, so eps is set on the norms themselves.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        config = vllm_config.quant_config
        scale = config.settings.residual_scale if isinstance(config, GptOssNf4Config) else 1.0
        if scale != 1:
            refuse_unscaled_access(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.residual_scale = scale
        if isinstance(config, GptOssNf4Config):
            use_kernel(self)
            self.lm_head.quant_method = HeadMethod(vllm_config)
        for module in self.modules():
            if isinstance(module, RMSNorm):
                module.variance_epsilon *= self.residual_scale**2

    @property
    def lora_manager(self) -> "LoRAModelManager | None":
        """vLLM sets this once it has wrapped the layers for LoRA. Setting it attaches what adapters need."""
        return self.__dict__.get("_lora_manager")

    @lora_manager.setter
    def lora_manager(self, manager: "LoRAModelManager | None") -> None:
        self.__dict__["_lora_manager"] = manager
        if manager is not None and isinstance(self.vllm_config.quant_config, GptOssNf4Config):
            from gptoss_nf4.vllm.lora.attach import attach

            attach(manager, self.vllm_config, self.residual_scale)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        config = self.vllm_config.quant_config
        if not isinstance(config, GptOssNf4Config):
            return super().load_weights(weights)
        if config.expected is not None:
            weights = fitting(weights, config.expected, self.vllm_config.model_config.model)
        gpus = (parameter.device for parameter in self.parameters() if parameter.device.type != "cpu")
        with config.transfer.opened(next(gpus, torch.device("cpu"))):
            return super().load_weights(self._arriving(weights, config.transfer))

    def _arriving(
        self, weights: Iterable[tuple[str, torch.Tensor]], transfer: Transfer
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """`weights`, scaled. Large ones are on the GPU already; the experts' loaders take a part only, and bring it."""
        may_change = self.vllm_config.load_config.load_format not in STABLE_FORMATS
        for name, tensor in weights:
            brought = tensor
            if tensor.nbytes >= GROUP_BYTES and EXPERTS not in name:
                brought = transfer.on_device(tensor)
            if self.residual_scale != 1 and writes_to_stream(name, tensor.is_floating_point()):
                # In place, if the copy is ours: an embedding is large.
                brought = torch.mul(brought, self.residual_scale, out=None if brought is tensor else brought)
            yield name, brought
            if may_change:
                transfer.settle()
