"""Starting the kernels: `linear` and `experts` on packed weights.

No function here waits for the GPU or looks at a tensor's values, so all may be captured in a CUDA graph.
"""

from collections.abc import Callable

import torch
import triton

from gptoss_nf4.vllm.kernels import dense
from gptoss_nf4.vllm.kernels.arguments import Packed, Routing, kernel_weight
from gptoss_nf4.vllm.kernels.combine import sum_slots
from gptoss_nf4.vllm.kernels.expand import expand
from gptoss_nf4.vllm.kernels.lora import Factors, Lora, launch_options
from gptoss_nf4.vllm.kernels.plan import Large, Plan, Small, gpu_of, plan_experts, plan_linear
from gptoss_nf4.vllm.kernels.shrink import shrink
from gptoss_nf4.vllm.kernels.sort import fits, local_experts, sort_slots
from gptoss_nf4.vllm.kernels.tiles import ROWS, operand_order


def linear(
    x: torch.Tensor,
    weight: Packed,
    out_features: int,
    plan: Small | None = None,
    factors: Factors | None = None,
) -> torch.Tensor:
    """A linear layer.

    Args:
        x: [rows, in] float16 or bfloat16.
        weight: of one expert; its bias is added if it has one.
        out_features: rows of the weight without padding.
        plan: in place of what `plan_linear` chooses.
        factors: of adapters, if they add something.

    Returns:
        [rows, out_features] in x's dtype.
    """
    rows, inputs = x.shape
    plan = plan or plan_linear(rows)
    if plan is None:
        bias = None if weight.bias is None else weight.bias[0, :out_features]
        out = torch.nn.functional.linear(x, dequantize(weight, out_features, x.dtype), bias)
        if factors is not None:
            add_adapters(out, x, factors)
        return out
    x = x.contiguous()
    out = torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    if rows == 0:
        return out
    argument, gpu = kernel_weight(weight, x.dtype), gpu_of(x.device)
    # With more rows the product takes the memory from `shrink`, and waits for it the longer (NOTES.md).
    early = gpu.starts_early and plan.rows == 8
    added = None if factors is None else shrink(x, factors, rows, 1, early=early)
    options = plan.options(gpu) | launch_options(added)
    plan.kernels.linear[argument.R, triton.cdiv(rows, plan.rows)](
        x, argument, added, out, count=rows, K=inputs, N=out_features, **options
    )
    return out


def add_adapters(out: torch.Tensor, x: torch.Tensor, factors: Factors) -> None:
    """Add to `out` [rows, out], the contiguous result of a dense linear layer, what adapters add for x [rows, in]."""
    expand(out, x.contiguous(), factors, early=gpu_of(x.device).starts_early)


def dequantize(weight: Packed, out_features: int, dtype: torch.dtype) -> torch.Tensor:
    """The dense weight [out_features, in] of a packed one in `dtype` (float16 or bfloat16)."""
    argument = kernel_weight(weight, dtype)
    inputs = argument.C * weight.codes.shape[-1] * ROWS
    out = torch.empty(out_features, inputs, dtype=dtype, device=weight.codes.device)
    tiles = dense.INPUT_TILES
    dense.dequantize[argument.R, triton.cdiv(argument.C, tiles)](
        argument, out, N=out_features, K=inputs, TILES=tiles, num_warps=4
    )
    return out


Align = Callable[
    [torch.Tensor, int, int, torch.Tensor | None], tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]
]


def routed_experts(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    num_experts: int,
    w13: Packed,
    w2: Packed,
    align: Align,
    out: torch.Tensor | None = None,
    w13_factors: Factors | None = None,
    w2_factors: Factors | None = None,
    plan: Plan | None = None,
) -> torch.Tensor:
    """Choose a plan, sort the slots by expert, and start the kernels of `experts`.

    Args:
        topk_ids: int32 [tokens, k], global expert numbers; a choice of -1 adds exactly 0.
        expert_map: int32 [num_experts] from global to local number, -1 for another rank's; None where all are here.
        num_experts: their global number.
        align: sorts more slots than `sort_slots` takes, with the same arguments and results.
        plan: in place of what `plan_experts` chooses.
        The others: as in `experts`.
    """
    tokens, top_k = topk_ids.shape
    plan = plan or plan_experts(tokens, top_k, num_experts, gpu_of(x.device))
    if tokens == 1 and isinstance(plan, Small):  # each slot its own block: nothing to sort
        routing = Routing(None, local_experts(topk_ids, expert_map), None)
    else:
        sort = sort_slots if fits(topk_ids.numel(), num_experts) else align
        routing = Routing(*sort(topk_ids, plan.rows, num_experts, expert_map))
    return experts(x, topk_weights, topk_ids, routing, w13, w2, plan, out, w13_factors, w2_factors)


def experts(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    routing: Routing,
    w13: Packed,
    w2: Packed,
    plan: Plan,
    out: torch.Tensor | None = None,
    w13_factors: Factors | None = None,
    w2_factors: Factors | None = None,
) -> torch.Tensor:
    """The weighted sum of each token's experts.

    Args:
        x: [tokens, hidden] float16 or bfloat16.
        topk_weights: float32 [tokens, k].
        topk_ids: int32 [tokens, k], global expert numbers; a choice of -1 adds exactly 0.
        routing: of the slots, for blocks of `plan.rows`.
        w13: tiles of gate and of up rows in turn (`tiles.gate_and_up_tiles`), with bias.
        w2: rows of hidden, with bias.
        out: what to return, if it exists already.
        w13_factors, w2_factors: of adapters, if they add something.

    Returns:
        [tokens, hidden] in x's dtype; slots of other ranks' experts add nothing.
    """
    x = x.contiguous()
    tokens, hidden = x.shape
    top_k = topk_weights.shape[1]
    intermediate = w2.codes.shape[2] * w2.codes.shape[4] * ROWS
    partial_dtype = torch.float32  # costs nothing with few slots
    if isinstance(plan, Large):
        partial_dtype = x.dtype  # half the bytes
        x = operand_order(x, w13.codes.shape[-1] * ROWS)
    middle = swiglu_experts(x, top_k, routing, w13, intermediate, plan, w13_factors)
    partial = down_experts(middle, topk_weights, routing, w2, hidden, plan, partial_dtype, w2_factors)
    return sum_slots(partial.view(tokens, top_k, hidden), topk_ids, x.dtype, out)


def swiglu_experts(
    x: torch.Tensor,
    top_k: int,
    routing: Routing,
    w13: Packed,
    intermediate: int,
    plan: Plan,
    factors: Factors | None = None,
) -> torch.Tensor:
    """x [tokens, hidden] -> [tokens * top_k, intermediate]; rows of other ranks' experts are not written.

    A `Large` plan takes and gives `tiles.operand_order`.
    """
    slots = x.shape[0] * top_k
    out = torch.empty(slots, intermediate, dtype=x.dtype, device=x.device)
    weight = kernel_weight(w13, x.dtype)
    added = _shrink(x, factors, slots, top_k, routing, plan)
    plan.kernels.swiglu_experts[triton.cdiv(weight.R, plan.kernels.SWIGLU_TILES), routing.experts.shape[0]](
        x,
        weight,
        added,
        out,
        routing=routing,
        count=slots,
        top_k=top_k,
        K=x.shape[1],
        N=intermediate,
        **plan.options(gpu_of(x.device)) | launch_options(added),
    )
    return out


def down_experts(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    routing: Routing,
    w2: Packed,
    hidden: int,
    plan: Plan,
    dtype: torch.dtype,
    factors: Factors | None = None,
) -> torch.Tensor:
    """x [slots, intermediate] -> [slots, hidden] in `dtype`, times topk_weights; zeros for other ranks' experts.

    A `Large` plan takes `tiles.operand_order`.
    """
    slots, intermediate = x.shape
    out = torch.empty(slots, hidden, dtype=dtype, device=x.device)
    weight = kernel_weight(w2, x.dtype)
    added = _shrink(x, factors, slots, topk_weights.shape[1], routing, plan)
    plan.kernels.down_experts[triton.cdiv(weight.R, plan.kernels.DOWN_TILES), routing.experts.shape[0]](
        x,
        weight,
        added,
        out,
        routing=routing,
        slot_weights=topk_weights,
        count=slots,
        K=intermediate,
        N=hidden,
        **plan.options(gpu_of(x.device)) | launch_options(added),
    )
    return out


def _shrink(x: torch.Tensor, factors: Factors | None, slots: int, top_k: int, routing: Routing, plan: Plan) -> Lora | None:
    """`shrink` for the product of `plan`, which reads the same x."""
    if factors is None:
        return None
    if isinstance(plan, Small):
        return shrink(x, factors, slots, top_k, early=gpu_of(x.device).starts_early)
    return shrink(x, factors, slots, top_k, block=plan.rows, routing=routing, operand_order=True)
