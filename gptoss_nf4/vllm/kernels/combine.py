"""The last step of the experts: adding the outputs of a token's slots."""

import torch
import triton
import triton.language as tl

from gptoss_nf4.vllm.kernels.ahead import start_early
from gptoss_nf4.vllm.kernels.lora import early_launch


@triton.jit
def _sum_slots(partial, out, N, TOP_K: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """partial [tokens, TOP_K, N] -> out [tokens, N]. Grid: tokens, blocks of BLOCK columns."""
    start_early(EARLY)
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for slot in tl.static_range(TOP_K):
        total += tl.load(partial + (token * TOP_K + slot) * N + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + token * N + n, total.to(out.dtype.element_ty), mask=n < N)


def sum_slots(
    partial: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None = None, *, early: bool = False
) -> torch.Tensor:
    """[tokens, k, hidden] -> [tokens, hidden] in `dtype`, summed in float32; into `out` if it is given (contiguous)."""
    tokens, top_k, hidden = partial.shape
    if out is None:
        out = torch.empty(tokens, hidden, dtype=dtype, device=partial.device)
    if tokens:
        block = 1024
        grid = (tokens, triton.cdiv(hidden, block))
        _sum_slots[grid](partial, out, N=hidden, TOP_K=top_k, BLOCK=block, EARLY=early, num_warps=4, **early_launch(early))
    return out
