"""Starting the kernels of the experts, from routing to the sum of a token's slots.

No function here waits for the GPU or looks at a tensor's values, so all may be captured in a CUDA graph.
"""

from collections.abc import Callable

import torch
import triton.language as tl

from gptoss_nf4.vllm.kernels.arguments import Packed, Routing, kernel_weight
from gptoss_nf4.vllm.kernels.combine import sum_slots
from gptoss_nf4.vllm.kernels.lora import Factors, Lora, start_options
from gptoss_nf4.vllm.kernels.order import in_operand_order
from gptoss_nf4.vllm.kernels.plan import Large, Plan, Small, gpu_of, plan_experts
from gptoss_nf4.vllm.kernels.routing import choose, route, routes
from gptoss_nf4.vllm.kernels.shared_memory import ask_when_loaded
from gptoss_nf4.vllm.kernels.shrink import shrink
from gptoss_nf4.vllm.kernels.sort import fits, local_experts, sort_slots
from gptoss_nf4.vllm.kernels.start import cdiv, start_kernel
from gptoss_nf4.vllm.kernels.tiles import ROWS

ask_when_loaded()

Align = Callable[
    [torch.Tensor, int, int, torch.Tensor | None], tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]
]
"""Sorts more slots than `sort_slots` takes, with the same arguments and results."""


def experts_of_logits(
    x: torch.Tensor,
    logits: torch.Tensor,
    top_k: int,
    is_padding: torch.Tensor | None,
    expert_map: torch.Tensor | None,
    w13: Packed,
    w2: Packed,
    align: Align,
    plan: Plan | None = None,
) -> torch.Tensor:
    """From the router's logits to the experts' weighted sum: routing, and the kernels of `experts`.

    Args:
        logits: [tokens, num_experts], contiguous. A token goes to the `top_k` largest, weighted by their softmax.
        is_padding: bool [tokens or more]: tokens that do not exist. Nobody reads their rows, so computing them is a waste.
        None: all exist.
        expert_map: int32 [num_experts] from global to local number, -1 for another rank's; None where all are here.
        plan: in place of what `plan_experts` chooses.
        The others: as in `experts`.
    """
    tokens, num_experts = logits.shape
    gpu = gpu_of(x.device)
    plan, early = plan or plan_experts(tokens, top_k, num_experts, gpu), gpu.starts_early
    if tokens == 1 and expert_map is None and isinstance(plan, Small):  # nothing to sort; computed whether it exists or not
        routing = Routing(None, None, None, logits, tl.constexpr(num_experts))
        return experts(x, top_k, None, None, routing, w13, w2, plan)
    if routes(tokens, num_experts):
        routed = route(logits, top_k, plan.rows, expert_map, is_padding, early=early)
        return experts(x, top_k, *routed, w13, w2, plan)
    # Not every vLLM's sorting knows an expert -1: here tokens that do not exist are computed as others are.
    weights, ids = choose(logits, top_k, early=early)
    return experts(x, top_k, weights, ids, Routing(*align(ids, plan.rows, num_experts, expert_map)), w13, w2, plan)


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
    """The same where the experts have been chosen.

    Args:
        topk_weights: float32 [tokens, k].
        topk_ids: int32 [tokens, k], global expert numbers; a choice of -1 adds exactly 0.
        num_experts: their global number.
        The others: as in `experts` and `experts_of_logits`.
    """
    tokens, top_k = topk_ids.shape
    plan = plan or plan_experts(tokens, top_k, num_experts, gpu_of(x.device))
    if tokens == 1 and isinstance(plan, Small):  # each slot its own block: nothing to sort
        routing = Routing(None, local_experts(topk_ids, expert_map), None)
    else:
        if fits(topk_ids.numel(), num_experts):
            routing = Routing(*sort_slots(topk_ids, plan.rows, num_experts, expert_map))
        else:  # not every vLLM's sorting knows an expert -1; the sum leaves its slots out all the same
            routing = Routing(*align(topk_ids.clamp(min=0), plan.rows, num_experts, expert_map))
    return experts(x, top_k, topk_weights, topk_ids, routing, w13, w2, plan, out, w13_factors, w2_factors)


def experts(
    x: torch.Tensor,
    top_k: int,
    topk_weights: torch.Tensor | None,
    topk_ids: torch.Tensor | None,
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
        topk_weights: float32 [tokens, k]; None where `routing` has logits.
        topk_ids: int32 [tokens, k], global expert numbers; a choice of -1 adds exactly 0. None: there is none.
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
    early = gpu_of(x.device).starts_early
    intermediate = w2.codes.shape[2] * w2.codes.shape[4] * ROWS
    partial_dtype = torch.float32  # costs nothing with few slots
    if isinstance(plan, Large):
        partial_dtype = x.dtype  # half the bytes
        x = in_operand_order(x, early=early)
    middle = swiglu_experts(x, top_k, routing, w13, intermediate, plan, w13_factors)
    partial = down_experts(middle, top_k, topk_weights, routing, w2, hidden, plan, partial_dtype, w2_factors)
    return sum_slots(partial.view(tokens, top_k, hidden), topk_ids, x.dtype, out, early=early)


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
    gpu, weight = gpu_of(x.device), kernel_weight(w13, x.dtype)
    added = _shrink(x, factors, slots, top_k, routing, plan)
    blocks = slots if routing.experts is None else len(routing.experts)
    start_kernel(
        plan.kernels.swiglu_experts,
        (cdiv(weight.R, plan.kernels.SWIGLU_TILES), blocks),
        x,
        weight,
        added,
        out,
        routing=routing,
        count=slots,
        top_k=top_k,
        K=x.shape[1],
        N=intermediate,
        **plan.options(gpu) | start_options(added, early=gpu.starts_early),
    )
    return out


def down_experts(
    x: torch.Tensor,
    top_k: int,
    topk_weights: torch.Tensor | None,
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
    gpu, weight = gpu_of(x.device), kernel_weight(w2, x.dtype)
    added = _shrink(x, factors, slots, top_k, routing, plan)
    blocks = slots if routing.experts is None else len(routing.experts)
    start_kernel(
        plan.kernels.down_experts,
        (cdiv(weight.R, plan.kernels.DOWN_TILES), blocks),
        x,
        weight,
        added,
        out,
        routing=routing,
        slot_weights=topk_weights,
        count=slots,
        K=intermediate,
        N=hidden,
        **plan.options(gpu, down=True) | start_options(added, early=gpu.starts_early),
    )
    return out


def _shrink(x: torch.Tensor, factors: Factors | None, slots: int, top_k: int, routing: Routing, plan: Plan) -> Lora | None:
    """`shrink` for the product of `plan`, which reads the same x."""
    if factors is None:
        return None
    if isinstance(plan, Small):
        return shrink(x, factors, slots, top_k, early=gpu_of(x.device).starts_early)
    if plan.shrinks_slots:
        return shrink(x, factors, slots, top_k, operand_order=True)
    return shrink(x, factors, slots, top_k, block=plan.rows, routing=routing, operand_order=True)
