"""What adapters add to a product: B @ (A @ x), with the factors lora_A and lora_B of each slot's adapter and expert.

It is done in two steps. First `shrink.shrink` computes t = A @ x, one launch for each product. Then the product's own
kernel adds B @ t to its sums, before activation and routing weight get there: `delta` does so for the kernels of `small`,
`add_delta` for the experts' in `large`. To the results of `large.linear`, of cuBLAS and of dense layers `expand.expand`
adds B @ t.

A decoding kernel needs t at its end only. So where the GPU can (Hopper and newer), it is started while A @ x is computed,
and waits for it there: "programmatic dependent launch" in CUDA's words, `early` here.

Slots of the base have adapter -1. Nothing is computed for them: their t is neither written nor read, and what they get is
exactly 0.

Names end in the letters of their axes: n rows of the weight, m slots, k inputs, j ranks.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait


class Factors(NamedTuple):
    """lora_A and lora_B of one weight, of all adapters that the engine holds, and who uses them.

    A linear layer that is made of several (q, k and v) has that many slices of rows, with ranks of their own: those of
    slice i are the i-th r ranks of `a`.
    """

    a: torch.Tensor
    """[adapters, E, slices * r, in] in the dtype of the activations, contiguous; E is 1 for a linear layer."""
    b: torch.Tensor
    """[adapters, E, rows, r], contiguous. Gate and up rows are interleaved, as in a checkpoint."""
    adapters: torch.Tensor
    """int [tokens or more]: place of each token's adapter in `a` and `b`, -1 for none."""
    experts: torch.Tensor | None = None
    """int [slots]: local expert of each slot, -1 for another rank's; None for a linear layer."""
    ends: tuple[int, ...] = ()
    """Rows up to the end of each slice, multiples of 16 but for the last; () for one slice."""
    scale: float = 1.0
    """By which B @ t is multiplied, in float32."""


class Lora(NamedTuple):
    """What a product's kernel needs to add B @ t. It is None where there are no adapters."""

    b: torch.Tensor
    """As in `Factors`."""
    t: torch.Tensor
    """float32 [slots, slices * RANK]."""
    adapters: torch.Tensor
    top_k: int
    """Slots of a token."""
    held: int
    """Adapters in `b`."""
    E: int
    N: int
    """Rows of `b`."""
    T: int
    """Columns of `t`."""
    ends: tuple[int, ...]
    scale: float
    RANK: tl.constexpr
    CHUNK: tl.constexpr
    """Ranks of one `tl.dot`."""
    CHUNK_OF_FEW: tl.constexpr
    """The same for few slots, which leave registers for ranks of several adapters."""
    EARLY: tl.constexpr
    """The kernel is started before `shrink` has ended: it waits before it reads `t`, and before it ends."""


@triton.jit
def wait_for_t(lora):
    """Wait for `shrink`, where the kernel is started early. Every kernel that takes a `Lora` calls this in each program.

    Otherwise it could end before `shrink` has, and whatever comes next could write over what that one still reads.
    """
    if lora is not None and lora.EARLY:
        gdc_wait()


@triton.jit
def adapters_of(lora, slot_m):
    """Place of each slot's adapter, int64 [m]; -1 for none, and for slot -1."""
    return tl.load(lora.adapters + slot_m // lora.top_k, mask=slot_m >= 0, other=-1).to(tl.int64)


@triton.jit
def some_of_b(lora, expert, row_n, adapter_m, start):
    """B of rows `row_n`, ranks from `start` on, as many as a thread can ask for at once: [n, m, j]."""
    RANKS: tl.constexpr = max(8, 128 // adapter_m.shape[0])  # 8 are 16 bytes, the widest load
    j = start + tl.arange(0, RANKS)
    b_nm = lora.b + (((adapter_m * lora.E + expert) * lora.N)[None, :] + row_n[:, None]) * lora.RANK
    exists_nm = (adapter_m >= 0)[None, :] & (row_n < lora.N)[:, None]
    mask_nmj = exists_nm[:, :, None] & (j < lora.RANK)[None, None, :]
    return tl.load(b_nm[:, :, None] + j[None, None, :], mask=mask_nmj, other=0.0)


@triton.jit
def delta(lora, expert, row_n, slice, slot_m, adapter_m, b_nmj):
    """B @ t, times scale, of rows `row_n` for `slot_m`: float32 [n, m], zeros for slots without adapter.

    Every slot reads the rows of its own adapter. Of few slots, that is less work than a product for each adapter.

    Args:
        slice: which slice the rows belong to, a number.
        adapter_m: `adapters_of` the slots. b_nmj: `some_of_b` from rank 0 on, which may be asked for long before.
    """
    RANKS: tl.constexpr = b_nmj.shape[2]
    t_m = lora.t + slot_m * lora.T + slice * lora.RANK
    sum_nm = tl.zeros([row_n.shape[0], slot_m.shape[0]], tl.float32)
    for start in range(0, lora.RANK, RANKS):
        j = start + tl.arange(0, RANKS)
        t_mj = tl.load(t_m[:, None] + j[None, :], mask=(adapter_m >= 0)[:, None] & (j < lora.RANK)[None, :], other=0.0)
        sum_nm += tl.sum(b_nmj.to(tl.float32) * t_mj[None, :, :], axis=2)
        if RANKS < lora.RANK:
            b_nmj = some_of_b(lora, expert, row_n, adapter_m, start + RANKS)
    return sum_nm * lora.scale


@triton.jit
def add_delta(sum_nm, lora, expert, row_n, slice, slot_m, used_m):
    """`sum_nm` + B @ t, without scale, by products of many slots; t in the dtype of B."""
    adapter_m = tl.load(lora.adapters + slot_m // lora.top_k, mask=used_m, other=-1)
    t_m = lora.t + slot_m.to(tl.int64) * lora.T + slice * lora.RANK
    # With 32, w2's kernel takes 228 registers instead of 120: half as many programs run at once (sm_90, Triton 3.9).
    if slot_m.shape[0] <= 16:
        return _adapters_together(sum_nm, lora, expert, row_n, adapter_m, t_m)
    return _one_after_the_other(sum_nm, lora, expert, row_n, adapter_m, t_m)


@triton.jit
def _adapters_together(sum_nm, lora, expert, row_n, adapter_m, t_m):
    """`add_delta` by products over the ranks of several adapters: one wait for memory instead of one for each.

    c are the ranks of all adapters, one adapter after the other. Where no slot has an adapter of them, nothing is done.
    """
    RANK: tl.constexpr = lora.RANK
    CHUNK: tl.constexpr = lora.CHUNK_OF_FEW
    SAME: tl.constexpr = min(CHUNK, RANK & -RANK)
    dtype: tl.constexpr = lora.b.dtype.element_ty
    for start in range(0, lora.held * RANK, CHUNK):
        c = start + tl.arange(0, CHUNK)
        adapter_c, j_c = c // RANK, c % RANK
        mine_mc = adapter_m[:, None] == adapter_c[None, :]
        has_c = tl.max(mine_mc.to(tl.int32), axis=0) > 0
        if tl.max(has_c.to(tl.int32), axis=0) > 0:
            # So many neighbours are of one adapter. Unless it is told, Triton loads B two bytes at a time.
            has_c = tl.max_constancy(has_c, SAME)
            t_mc = tl.load(t_m[:, None] + j_c[None, :], mask=mine_mc, other=0.0)
            b_c = lora.b + (adapter_c.to(tl.int64) * lora.E + expert) * lora.N * RANK + j_c
            mask_nc = (row_n < lora.N)[:, None] & has_c[None, :]
            b_nc = tl.load(b_c[None, :] + row_n[:, None] * RANK, mask=mask_nc, other=0.0)
            sum_nm = tl.dot(b_nc, tl.trans(t_mc.to(dtype)), sum_nm)
    return sum_nm


@triton.jit
def _one_after_the_other(sum_nm, lora, expert, row_n, adapter_m, t_m):
    """`add_delta` by a product for each adapter that the slots have: of many slots, all registers are taken."""
    RANK: tl.constexpr = lora.RANK
    CHUNK: tl.constexpr = lora.CHUNK
    dtype: tl.constexpr = lora.b.dtype.element_ty
    for adapter in range(lora.held):
        mine_m = adapter_m == adapter
        if tl.max(mine_m.to(tl.int32), axis=0) > 0:
            b_n = lora.b + ((adapter * lora.E + expert) * lora.N + row_n) * RANK
            for start in tl.static_range(0, RANK, CHUNK):
                j = start + tl.arange(0, CHUNK)
                t_mj = tl.load(t_m[:, None] + j[None, :], mask=mine_m[:, None] & (j < RANK)[None, :], other=0.0)
                b_nj = tl.load(b_n[:, None] + j[None, :], mask=(row_n < lora.N)[:, None] & (j < RANK)[None, :], other=0.0)
                sum_nm = tl.dot(b_nj, tl.trans(t_mj.to(dtype)), sum_nm)
    return sum_nm


@triton.jit
def slice_of(lora, row):
    """Number of the slice that a row belongs to."""
    number = 0
    for i in tl.static_range(len(lora.ends)):
        number += (row >= lora.ends[i]).to(tl.int32)
    return number


def launch_options(lora: Lora | None) -> dict[str, bool]:
    """Triton's, of the kernel that takes `lora`."""
    return early_launch(lora is not None and lora.EARLY.value)


def start_options(lora: Lora | None, *, early: bool) -> dict[str, bool]:
    """When a product's kernel starts. With adapters it waits for `shrink` only where `lora` says so; else see `ahead`."""
    if lora is not None:
        return {"EARLY": False} | launch_options(lora)
    return {"EARLY": early} | early_launch(early)


def early_launch(early: bool) -> dict[str, bool]:
    """Triton's option for a kernel that is started early. Its interpreter does not know it."""
    return {"launch_pdl": True} if early else {}
