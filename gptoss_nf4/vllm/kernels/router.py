"""The router's product for few rows: a dense matrix of so few rows that cuBLAS splits its inputs and adds them up
afterwards."""

import torch
import triton
import triton.language as tl

from gptoss_nf4.vllm.kernels.ahead import start_early
from gptoss_nf4.vllm.kernels.lora import early_launch
from gptoss_nf4.vllm.kernels.start import next_power_of_2, start_kernel

MAX_ROUTER_ROWS = 64  # of activations; beyond, cuBLAS


@triton.jit
def _router(x, weight, bias, out, K, E, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """out[row, expert] = weight[expert] @ x[row] + bias[expert]. A program takes one of them; grid: E, rows."""
    expert, row = tl.program_id(0), tl.program_id(1)
    k = tl.arange(0, BLOCK)
    weight_k = tl.load(weight + expert * K + k, mask=k < K, other=0.0).to(tl.float32)
    bias_of_expert = tl.load(bias + expert).to(tl.float32)
    start_early(EARLY)
    x_k = tl.load(x + row.to(tl.int64) * K + k, mask=k < K, other=0.0).to(tl.float32)
    logit = tl.sum(weight_k * x_k, axis=0) + bias_of_expert
    tl.store(out + row * E + expert, logit.to(out.dtype.element_ty))


def few_logits(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, early: bool = False) -> torch.Tensor:
    """The router's logits, of few rows.

    Args:
        x: [rows, hidden]. weight: [experts, hidden], contiguous. bias: [experts]. All in one 16-bit dtype.
        early: the kernel may start before the one in front of it has ended, see `ahead`.

    Returns:
        [rows, experts] in x's dtype, summed in float32.
    """
    rows, hidden = x.shape
    experts = len(weight)
    out = torch.empty(rows, experts, dtype=x.dtype, device=x.device)
    if rows:
        start_kernel(
            _router,
            (experts, rows),
            x.contiguous(),
            weight,
            bias,
            out,
            K=hidden,
            E=experts,
            BLOCK=next_power_of_2(hidden),
            EARLY=early,
            num_warps=4,
            **early_launch(early),
        )
    return out
