"""The head (lm_head) in vLLM: dense in the checkpoint, in 12 bits a weight on the GPU, with the same bits."""

import logging
import os

import torch
from vllm import envs
from vllm.config import VllmConfig
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from gptoss_nf4.errors import UserError, first_line
from gptoss_nf4.vllm.kernels import head_launch
from gptoss_nf4.vllm.kernels.twelve_bits import TwelveBits, pack
from gptoss_nf4.vllm.loading import runs_on_kernels
from gptoss_nf4.vllm.proving.ladder import require_usable

logger = logging.getLogger("vllm.gptoss_nf4")

VARIABLE = "GPTOSS_NF4_HEAD"  # of the environment: one of FORMS, to compare them or to report a fault
PACKED, DENSE = FORMS = ("packed", "dense")  # the first by default: faster for few rows (NOTES.md)


class HeadMethod(UnquantizedEmbeddingMethod):
    """vLLM's own method until the weight is loaded. Then the weight is packed, where that is possible and helps.

    gpt-oss's head in vLLM asks no quantization config for a method, so `model` puts this one there.
    """

    supports_pre_processed_weights = False

    def __init__(self, vllm_config: VllmConfig):
        self.reason = reason_for_dense(vllm_config)
        self.packed: TwelveBits | None = None

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        self.reason = "the embedding is the same tensor"
        return super().tie_weights(layer, embed_tokens)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        super().process_weights_after_loading(layer)
        self.packed = None
        packed = self.reason or packed_or_reason(layer.weight.data)
        if isinstance(packed, str):
            logger.info("gptoss_nf4: lm_head stays dense: %s", packed)
            return
        sizes = packed.nbytes / 1e9, layer.weight.nbytes / 1e9
        logger.info("gptoss_nf4: lm_head is kept in 12 bits a weight, exactly: %.2f GB instead of %.2f", *sizes)
        self.packed = packed
        del layer.weight

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., in] -> [..., out] in x's dtype."""
        if self.packed is None:
            return super().apply(layer, x, bias)
        out = head_launch.linear(x.reshape(-1, x.shape[-1]), self.packed, bias)
        return out.view(*x.shape[:-1], self.packed.rows)


def reason_for_dense(vllm_config: VllmConfig) -> str | None:
    """Why the head has to stay dense whatever its weight is, in a few words. UserError for a wrong `VARIABLE`."""
    form = os.environ.get(VARIABLE) or PACKED
    if form not in FORMS:
        raise UserError(
            "bad environment variable",
            where=VARIABLE,
            got=repr(form),
            expected=f"one of {FORMS}",
            next_step="set it to one of them, or unset it",
        )
    model = vllm_config.model_config
    if form == DENSE:
        return f"{VARIABLE}={DENSE}"
    if not runs_on_kernels(model.dtype):
        return "the kernels run on a GPU, in float16 and bfloat16"
    if model.head_dtype != model.dtype:
        return f"logits are computed in {model.head_dtype}"
    if envs.VLLM_BATCH_INVARIANT:
        return "VLLM_BATCH_INVARIANT asks for vLLM's own product"
    if vllm_config.speculative_config is not None and vllm_config.speculative_config.use_eagle():
        return "vLLM compares it with the draft model's"
    return None


def packed_or_reason(weight: torch.Tensor) -> TwelveBits | str:
    """The weight [rows, in] packed, and proven to be so by this GPU; or why it stays as it is, in a few words."""
    try:
        packed = pack(weight)
        if isinstance(packed, str):
            return packed
        flaw = head_launch.flaw(packed, weight)
    except Exception as error:  # too little memory, or kernels that do not run: the dense weight serves as well
        require_usable(weight.device, error, f"{VARIABLE}={DENSE}")
        return f"its kernels do not run here ({type(error).__name__}: {first_line(error)})"
    return flaw or packed
