"""gpt-oss's experts in plain torch: the CPU path. Pure functions that know nothing of vLLM's classes.

Which experts a batch uses is known only when it runs, so torch.compile, which vLLM applies on the CPU too, must not
look inside: `torch.ops.gptoss_nf4.used_experts` is one opaque operator to it.
"""

from collections.abc import Callable

import torch
from torch.nn.functional import linear

from gptoss_nf4.vllm.activation import clamped_swiglu
from gptoss_nf4.vllm.dequantize import dequantize


def run_used_experts(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    w13: Callable[[int], torch.Tensor],
    w13_bias: torch.Tensor,
    w2: Callable[[int], torch.Tensor],
    w2_bias: torch.Tensor,
) -> torch.Tensor:
    """The weighted sum of each token's experts, making the dense weights of an expert only if some token uses it.

    Args:
        x: [tokens, hidden].
        topk_weights, topk_ids: [tokens, k], global expert numbers.
        expert_map: int [experts] from global to local number, -1 for another rank's; None where all are here.
        w13, w2: local expert number -> dense weight [2n, hidden], rows interleaved, and [hidden, n].
        w13_bias, w2_bias: [local experts, 2n] and [local experts, hidden].

    Returns:
        [tokens, hidden] in x's dtype, summed in float32.
    """
    local = topk_ids.long() if expert_map is None else expert_map[topk_ids.long()].long()
    result = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in local.unique().tolist():
        if expert < 0:
            continue
        tokens, slot = (local == expert).nonzero(as_tuple=True)
        hidden = clamped_swiglu(linear(x[tokens], w13(expert), w13_bias[expert]))
        output = linear(hidden, w2(expert), w2_bias[expert])
        result.index_add_(0, tokens, output.float() * topk_weights[tokens, slot, None].float())
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
) -> torch.Tensor:
    """`run_used_experts` on 4-bit weights: codes uint8 [E, rows, in / 2], absmax float32 [E, rows, in / blocksize]."""
    return run_used_experts(
        x,
        topk_weights,
        topk_ids,
        expert_map,
        lambda expert: dequantize(w13_codes[expert], w13_absmax[expert], w13_blocksize, quant_type, x.dtype),
        w13_bias,
        lambda expert: dequantize(w2_codes[expert], w2_absmax[expert], w2_blocksize, quant_type, x.dtype),
        w2_bias,
    )


@used_experts.register_fake
def _(x: torch.Tensor, *args) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
