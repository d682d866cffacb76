"""B @ (A @ x) added to the result of a product, see `lora`: of `large.linear`, of cuBLAS, of a dense layer.

For few rows and a lora_A that fits into registers, as the router's does, one kernel does both steps.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from gptoss_nf4.vllm.kernels.lora import Factors, add_delta, early_launch, launch_options, slice_of, wait_for_t
from gptoss_nf4.vllm.kernels.shrink import shrink
from gptoss_nf4.vllm.kernels.start import cdiv, next_power_of_2, start_kernel

FEW_ROWS = 64
ROW_BLOCKS = (128, 64, 32, 16)  # rows of the weight that a program of `expand_rows` may take
MAX_ELEMENTS = 1 << 16  # of lora_A, in the registers of a program of `add_to_row`


@triton.jit
def add_to_row(
    out,
    x,
    a,
    b,
    adapters,
    scale,
    K,
    N,
    RANK,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    BN: tl.constexpr,
    EARLY: tl.constexpr,
):
    """out[row] += b[adapter] @ (a[adapter] @ x[row]), times scale. A program takes a row; it asks for all of A at once.

    Args:
        out: [rows, N]. x: [rows, K]. a: [adapters, RANK, K]. b: [adapters, N, RANK]. adapters: as in `Factors`.
        RANKS, BLOCK, BN: RANK, K and N, rounded up to powers of two.
        EARLY: this kernel is started before the one in front of it has ended.
    """
    if EARLY:
        gdc_wait()
    row = tl.program_id(0)
    adapter = tl.load(adapters + row).to(tl.int64)
    if adapter < 0:
        return
    j, k, n = tl.arange(0, RANKS), tl.arange(0, BLOCK), tl.arange(0, BN)
    x_k = tl.load(x + row * K + k, mask=k < K, other=0.0).to(tl.float32)
    a_jk = tl.load(
        a + (adapter * RANK + j)[:, None] * K + k[None, :], mask=(j < RANK)[:, None] & (k < K)[None, :], other=0.0
    )
    b_nj = tl.load(
        b + (adapter * N + n)[:, None] * RANK + j[None, :], mask=(n < N)[:, None] & (j < RANK)[None, :], other=0.0
    )
    out_n = tl.load(out + row * N + n, mask=n < N, other=0.0).to(tl.float32)
    t_j = tl.sum(a_jk.to(tl.float32) * x_k[None, :], axis=1)
    out_n += tl.sum(b_nj.to(tl.float32) * t_j[None, :], axis=1) * scale
    tl.store(out + row * N + n, out_n.to(out.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["slots"])
def expand_rows(out, lora, slots, BM: tl.constexpr, BN: tl.constexpr):
    """out[slot] += B @ t. Grid: blocks of BN rows of the weight, blocks of BM slots. out: [slots, N]."""
    wait_for_t(lora)
    first = tl.program_id(0) * BN
    row_n = first + tl.arange(0, BN)
    slot_m = tl.program_id(1) * BM + tl.arange(0, BM)
    used_m = slot_m < slots
    sum_nm = tl.zeros([BN, BM], tl.float32)
    sum_nm = add_delta(sum_nm, lora, 0, row_n, slice_of(lora, first), slot_m, used_m)
    out_mn = out + slot_m.to(tl.int64)[:, None] * lora.N + row_n[None, :]
    exists_mn = used_m[:, None] & (row_n < lora.N)[None, :]
    value_mn = tl.load(out_mn, mask=exists_mn, other=0.0).to(tl.float32) + tl.trans(sum_nm) * lora.scale
    tl.store(out_mn, value_mn.to(out.dtype.element_ty), mask=exists_mn)


def expand(out: torch.Tensor, x: torch.Tensor, factors: Factors, early: bool = False) -> None:
    """Add to `out` [rows, N], in place, what the adapters of a linear layer add for x [rows, in]. Both are contiguous.

    early: the GPU can start kernels early.
    """
    rows, outputs = out.shape
    if rows == 0:
        return
    few, early = rows <= FEW_ROWS, early and rows <= FEW_ROWS
    _, _, rank, inputs = factors.a.shape
    sizes = [next_power_of_2(size) for size in (rank, inputs, outputs)]
    if few and len(factors.ends) <= 1 and sizes[0] * max(sizes[1:]) <= MAX_ELEMENTS:
        RANKS, BLOCK, BN = sizes
        start_kernel(
            add_to_row,
            (rows,),
            out,
            x,
            factors.a,
            factors.b,
            factors.adapters,
            scale=factors.scale,
            K=inputs,
            N=outputs,
            RANK=rank,
            RANKS=RANKS,
            BLOCK=BLOCK,
            BN=BN,
            EARLY=early,
            num_warps=16,
            **early_launch(early),
        )
        return
    lora = shrink(x, factors, rows, 1, block=None if few else 32, early=early)
    inner = factors.ends[:-1]
    block = next(size for size in ROW_BLOCKS if all(end % size == 0 for end in inner))
    slots = 16 if few else 64
    grid = cdiv(outputs, block), cdiv(rows, slots)
    start_kernel(expand_rows, grid, out, lora, slots=rows, BM=slots, BN=block, num_warps=4, **launch_options(lora))
