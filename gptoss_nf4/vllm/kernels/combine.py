"""The last step of the experts, adding the outputs of a token's slots; and of linear layers that are computed in parts."""

import torch
import triton
import triton.language as tl

from gptoss_nf4.vllm.kernels.ahead import start_early
from gptoss_nf4.vllm.kernels.lora import early_launch
from gptoss_nf4.vllm.kernels.start import cdiv, start_kernel


@triton.jit
def _sum_slots(partial, ids, out, N, TOP_K: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """partial [tokens, TOP_K, N] -> out [tokens, N]. Grid: tokens, blocks of BLOCK columns.

    ids: the expert of each slot. Nothing was written for a slot of expert -1. It is read all the same: to wait for its id
    first would take longer. None where all slots have experts.
    EARLY: the kernel is started before the one in front of it has ended, see `ahead`.
    """
    start_early(EARLY)
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for slot in tl.static_range(TOP_K):
        part = tl.load(partial + (token * TOP_K + slot) * N + n, mask=n < N, other=0.0).to(tl.float32)
        if ids is not None:
            part = tl.where(tl.load(ids + token * TOP_K + slot) >= 0, part, 0.0)
        total += part
    tl.store(out + token * N + n, total.to(out.dtype.element_ty), mask=n < N)


def sum_slots(
    partial: torch.Tensor,
    ids: torch.Tensor | None,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
    *,
    early: bool = False,
) -> torch.Tensor:
    """The sum of each token's slots, in float32.

    Args:
        partial: [tokens, k, hidden]. ids: integers [tokens, k]. Where one is -1, the slot adds exactly 0, whatever
        `partial` has there. None: there is none. dtype: of the result. out: what to return, if it exists already;
        contiguous. early: the kernel may start before the one in front of it has ended, see `ahead`.

    Returns:
        [tokens, hidden].
    """
    tokens, top_k, hidden = partial.shape
    if out is None:
        out = torch.empty(tokens, hidden, dtype=dtype, device=partial.device)
    if tokens:
        block = 1024
        grid = (tokens, cdiv(hidden, block))
        ids = None if ids is None else ids.contiguous()
        options = {"num_warps": 4} | early_launch(early)
        start_kernel(_sum_slots, grid, partial, ids, out, N=hidden, TOP_K=top_k, BLOCK=block, EARLY=early, **options)
    return out
