"""gpt-oss's experts in plain torch: the CPU path. Pure functions that know nothing of vLLM's classes.

Which experts a batch uses is known only when it runs, so torch.compile, which vLLM applies on the CPU too, must not
look inside: `torch.ops.gptoss_nf4.used_experts` is one opaque operator to it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from gptoss_nf4.format.blocks import INPUTS
from gptoss_nf4.vllm.activation import clamped_swiglu
from gptoss_nf4.vllm.dequantize import dequantize


@dataclass(frozen=True)
class ExpertsLoRA:
    """LoRA factors of the local experts of several adapters, and which adapter each token asks for.

    `adapters` int [tokens]: place of the token's adapter in the stacks, -1 for none. `w13_a` [adapters, E, r, hidden],
    `w13_b` [adapters, E, 2n, r] with rows interleaved, `w2_a` [adapters, E, r, n], `w2_b` [adapters, E, hidden, r]. What
    w2's factors add is multiplied by `w2_scale`.
    """

    adapters: torch.Tensor
    w13_a: torch.Tensor
    w13_b: torch.Tensor
    w2_a: torch.Tensor
    w2_b: torch.Tensor
    w2_scale: float

    def w13(self, x: torch.Tensor, expert: int, tokens: torch.Tensor) -> torch.Tensor:
        """What the adapters of `tokens` add to w13 @ x of one expert: x [n, hidden] -> [n, 2n]."""
        return self._delta(x, expert, tokens, self.w13_a, self.w13_b)

    def w2(self, x: torch.Tensor, expert: int, tokens: torch.Tensor) -> torch.Tensor:
        """What they add to w2 @ x: [n, hidden], in float32."""
        return self._delta(x, expert, tokens, self.w2_a, self.w2_b).float() * self.w2_scale

    def _delta(self, x: torch.Tensor, expert: int, tokens: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        delta = x.new_zeros(len(x), b.shape[2])
        asked_for = self.adapters[tokens]
        for adapter in asked_for.unique().tolist():
            if adapter >= 0:
                rows = asked_for == adapter
                low_rank = linear(x[rows], a[adapter, expert].to(x.dtype))
                delta[rows] = linear(low_rank, b[adapter, expert].to(x.dtype))
        return delta


def run_used_experts(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    w13: Callable[[int], torch.Tensor],
    w13_bias: torch.Tensor,
    w2: Callable[[int], torch.Tensor],
    w2_bias: torch.Tensor,
    lora: ExpertsLoRA | None = None,
) -> torch.Tensor:
    """The weighted sum of each token's experts, making the dense weights of an expert only if some token uses it.

    Args:
        x: [tokens, hidden].
        topk_weights, topk_ids: [tokens, k], global expert numbers; a choice of -1 adds exactly 0.
        expert_map: int [experts] from global to local number, -1 for another rank's; None where all are here.
        w13, w2: local expert number -> dense weight [2n, hidden], rows interleaved, and [hidden, n].
        w13_bias, w2_bias: [local experts, 2n] and [local experts, hidden].
        lora: what adapters add, if the engine serves any.

    Returns:
        [tokens, hidden] in x's dtype, summed in float32.
    """
    local = topk_ids.long()
    if expert_map is not None:
        local = torch.where(local < 0, local, expert_map[local].long())
    result = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in local.unique().tolist():
        if expert < 0:
            continue
        tokens, slot = (local == expert).nonzero(as_tuple=True)
        gate_up = linear(x[tokens], w13(expert), w13_bias[expert])
        if lora is not None:
            gate_up += lora.w13(x[tokens], expert, tokens)
        hidden = clamped_swiglu(gate_up)
        output = linear(hidden, w2(expert), w2_bias[expert]).float()
        if lora is not None:
            output += lora.w2(hidden, expert, tokens)
        result.index_add_(0, tokens, output * topk_weights[tokens, slot, None].float())
    return result.to(x.dtype)


@torch.library.custom_op("gptoss_nf4::used_experts", mutates_args=())
def used_experts(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    w13_codes: torch.Tensor,
    w13_absmax: torch.Tensor,
    w13_bias: torch.Tensor,
    w13_blocksize: int,
    w2_codes: torch.Tensor,
    w2_absmax: torch.Tensor,
    w2_bias: torch.Tensor,
    w2_blocksize: int,
    quant_type: str,
    adapters: torch.Tensor | None = None,
    w13_lora_a: torch.Tensor | None = None,
    w13_lora_b: torch.Tensor | None = None,
    w2_lora_a: torch.Tensor | None = None,
    w2_lora_b: torch.Tensor | None = None,
    w2_lora_scale: float = 1.0,
    w13_blocks_along: str = INPUTS,
    w2_blocks_along: str = INPUTS,
) -> torch.Tensor:
    """`run_used_experts` on 4-bit weights: codes uint8 [E, rows, in / 2], absmax float32 as `dequantize` takes it.

    `adapters` and the five after it are the fields of `ExpertsLoRA`, all or none.
    """
    lora = None
    if adapters is not None:
        lora = ExpertsLoRA(adapters, w13_lora_a, w13_lora_b, w2_lora_a, w2_lora_b, w2_lora_scale)

    def w13(expert: int) -> torch.Tensor:
        return dequantize(w13_codes[expert], w13_absmax[expert], w13_blocksize, quant_type, x.dtype, w13_blocks_along)

    def w2(expert: int) -> torch.Tensor:
        return dequantize(w2_codes[expert], w2_absmax[expert], w2_blocksize, quant_type, x.dtype, w2_blocks_along)

    return run_used_experts(x, topk_weights, topk_ids, expert_map, w13, w13_bias, w2, w2_bias, lora)


@used_experts.register_fake
def _(x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
