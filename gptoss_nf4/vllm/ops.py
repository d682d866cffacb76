"""The kernels as two operators that torch.compile and CUDA graphs take as they are.

How a product is split depends on the number of tokens, which is known only when it runs: inside an operator the
compiler does not look.
"""

import torch
from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size

from gptoss_nf4.vllm.kernels import launch
from gptoss_nf4.vllm.kernels.arguments import Packed, Routing
from gptoss_nf4.vllm.kernels.plan import gpu_of, plan_experts
from gptoss_nf4.vllm.kernels.sort import fits as sorts
from gptoss_nf4.vllm.kernels.sort import sort_slots


@torch.library.custom_op("gptoss_nf4::packed_linear", mutates_args=())
def packed_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    blocksize: int,
    quant_type: str,
) -> torch.Tensor:
    """A linear layer on packed weights.

    Args:
        x: [rows, in] float16 or bfloat16.
        codes, absmax, blocksize, quant_type: the weight in the order of `kernels.tiles`, one expert.
        bias: [1, padded rows of the weight] in x's dtype, or None.
        out_features: rows of the weight without padding.

    Returns:
        [rows, out_features] in x's dtype.
    """
    return launch.linear(x, Packed(codes, absmax, bias, blocksize, quant_type), out_features)


@packed_linear.register_fake
def _(
    x: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, bias: torch.Tensor | None, out_features: int, *_: object
) -> torch.Tensor:
    return x.new_empty(x.shape[0], out_features)


@torch.library.custom_op("gptoss_nf4::packed_experts", mutates_args=())
def packed_experts(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    experts: int,
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
    """The weighted sum of each token's experts.

    Args:
        x: [tokens, hidden] float16 or bfloat16.
        topk_weights, topk_ids: [tokens, k], global expert numbers.
        expert_map: int32 [experts] from global to local number, -1 for another rank's; None where all are here.
        experts: their global number.
        w13_*, w2_*: this rank's experts in the order of `kernels.tiles`.

    Returns:
        [tokens, hidden] in x's dtype; choices of other ranks' experts add nothing.
    """
    tokens, top_k = topk_ids.shape
    if tokens == 0:
        return torch.empty_like(x)
    plan = plan_experts(tokens, top_k, experts, gpu_of(x.device))
    if tokens == 1:  # each slot its own block: nothing to sort
        local = topk_ids.flatten() if expert_map is None else expert_map[topk_ids.flatten().long()]
        routing = Routing(None, local, None)
    else:
        sort = sort_slots if sorts(tokens * top_k, experts) else moe_align_block_size
        routing = Routing(*sort(topk_ids, plan.rows, experts, expert_map))
    w13 = Packed(w13_codes, w13_absmax, w13_bias, w13_blocksize, quant_type)
    w2 = Packed(w2_codes, w2_absmax, w2_bias, w2_blocksize, quant_type)
    return launch.experts(x, topk_weights, routing, w13, w2, plan)


@packed_experts.register_fake
def _(x: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
