"""Starting the kernels of linear layers: on packed weights, of the router, and of what adapters add to any.

No function here waits for the GPU or looks at a tensor's values, so all may be captured in a CUDA graph.
"""

import torch

from gptoss_nf4.vllm.kernels import dense, large, small
from gptoss_nf4.vllm.kernels.arguments import Packed, kernel_weight
from gptoss_nf4.vllm.kernels.combine import sum_slots
from gptoss_nf4.vllm.kernels.expand import expand
from gptoss_nf4.vllm.kernels.lora import Factors, start_options
from gptoss_nf4.vllm.kernels.order import in_operand_order
from gptoss_nf4.vllm.kernels.plan import Gpu, Large, Plan, Small, gpu_of, plan_linear
from gptoss_nf4.vllm.kernels.router import MAX_ROUTER_ROWS, few_logits
from gptoss_nf4.vllm.kernels.shared_memory import ask_when_loaded
from gptoss_nf4.vllm.kernels.shrink import shrink
from gptoss_nf4.vllm.kernels.start import cdiv, start_kernel
from gptoss_nf4.vllm.kernels.tiles import ROWS

ask_when_loaded()


def linear(
    x: torch.Tensor,
    weight: Packed,
    out_features: int,
    plan: Plan | None = None,
    factors: Factors | None = None,
) -> torch.Tensor:
    """A linear layer.

    Args:
        x: [rows, in] float16 or bfloat16.
        weight: of one expert; its bias is added if it has one.
        out_features: rows of the weight without padding.
        plan: in place of what `plan_of` chooses.
        factors: of adapters, if they add something.

    Returns:
        [rows, out_features] in x's dtype.
    """
    gpu = gpu_of(x.device)
    plan = plan or plan_of(len(x), weight)
    if isinstance(plan, Small):
        return _of_few_rows(x.contiguous(), weight, out_features, plan, gpu, factors)
    if isinstance(plan, Large):
        out = _in_parts(x.contiguous(), weight, out_features, plan, gpu)
    else:
        bias = None if weight.bias is None else weight.bias[0, :out_features]
        out = torch.nn.functional.linear(x, dequantize(weight, out_features, x.dtype), bias)
    if factors is not None:
        add_adapters(out, x, factors)
    return out


def plan_of(rows: int, weight: Packed) -> Plan | None:
    """How `linear` computes a layer: `plan_linear` for its sizes and its GPU."""
    _, row_tiles, input_tiles, *_ = weight.codes.shape
    return plan_linear(rows, row_tiles, input_tiles, gpu_of(weight.codes.device))


def _of_few_rows(
    x: torch.Tensor, weight: Packed, out_features: int, plan: Small, gpu: Gpu, factors: Factors | None
) -> torch.Tensor:
    """`linear` by one kernel, which adds what adapters add."""
    rows, inputs = x.shape
    out = torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    if rows == 0:
        return out
    argument = kernel_weight(weight, x.dtype)
    # With more rows the product takes the memory from `shrink`, and waits for it the longer (NOTES.md).
    few = gpu.starts_early and plan.rows == 8
    added = None if factors is None else shrink(x, factors, rows, 1, early=few)
    options = plan.options(gpu) | start_options(added, early=gpu.starts_early) | {"AHEAD": plan.ahead}
    grid = argument.R, cdiv(rows, plan.rows)
    start_kernel(small.linear, grid, x, argument, added, out, count=rows, K=inputs, N=out_features, **options)
    return out


def _in_parts(x: torch.Tensor, weight: Packed, out_features: int, plan: Large, gpu: Gpu) -> torch.Tensor:
    """`linear` by parts of the inputs, then their sum; x [1 or more rows, in]."""
    rows, inputs = x.shape
    argument, early = kernel_weight(weight, x.dtype), gpu.starts_early
    x = in_operand_order(x, early=early)
    partial = torch.empty(rows, plan.parts, out_features, dtype=torch.float32, device=x.device)
    grid = cdiv(argument.R, large.DOWN_TILES), plan.parts, cdiv(rows, plan.rows)
    options = plan.options(gpu) | start_options(None, early=early)
    sizes = {"count": rows, "parts": plan.parts, "K": inputs, "N": out_features}
    start_kernel(large.linear, grid, x, argument, partial, **sizes, **options)
    return sum_slots(partial, None, x.dtype, early=early)


def router(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The router's logits: x [rows, hidden] @ weight [experts, hidden] + bias [experts], in x's dtype."""
    if len(x) > MAX_ROUTER_ROWS:
        return torch.nn.functional.linear(x, weight, bias)
    return few_logits(x, weight, bias, early=gpu_of(x.device).starts_early)


def add_adapters(out: torch.Tensor, x: torch.Tensor, factors: Factors) -> None:
    """Add to `out` [rows, out], the contiguous result of a linear layer, what adapters add for x [rows, in]."""
    expand(out, x.contiguous(), factors, early=gpu_of(x.device).starts_early)


def dequantize(weight: Packed, out_features: int, dtype: torch.dtype) -> torch.Tensor:
    """The dense weight [out_features, in] of a packed one in `dtype` (float16 or bfloat16)."""
    argument = kernel_weight(weight, dtype)
    inputs = argument.C * weight.codes.shape[-1] * ROWS
    out = torch.empty(out_features, inputs, dtype=dtype, device=weight.codes.device)
    tiles = dense.INPUT_TILES
    grid = argument.R, cdiv(argument.C, tiles)
    start_kernel(dense.dequantize, grid, argument, out, N=out_features, K=inputs, TILES=tiles, num_warps=4)
    return out
