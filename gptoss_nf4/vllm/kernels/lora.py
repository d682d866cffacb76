"""What adapters add to a product: B @ (A @ x), with the factors lora_A and lora_B of each slot's adapter and expert.

It is done in two steps. First `shrink` computes t = A @ x, one launch for each product. Then the product's own kernel
adds B @ t to its sums, before bias, activation and routing weight get there: `delta` does so for the kernels of `small`,
`add_delta` for those of `large`. Where the product is not ours (cuBLAS, dense layers), `expand` adds B @ t to its result.

Slots of the base have adapter -1. Nothing is computed for them: their t is neither written nor read, and what they get is
exactly 0.

Names end in the letters of their axes: n rows of the weight, m slots, k inputs, j ranks.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gptoss_nf4.vllm.kernels.arguments import Routing

RANKS_AT_ONCE = tl.constexpr(8)  # of `delta`: 16 bytes of lora_B, the widest load
ROW_BLOCKS = (128, 64, 32, 16)  # rows of the weight that a program of `expand` may take


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


# ---- A @ x ----


@triton.jit
def shrink_slots(x, a, t, experts, adapters, top_k, x_top_k, K, E, T, RANKS: tl.constexpr, BLOCK: tl.constexpr):
    """t[slot] = a[adapter, expert] @ x[slot // x_top_k], for few slots.

    A program takes a slot and RANKS rows of lora_A, and asks for all of them at once. Grid: slots, T / RANKS.

    Args:
        x: [.., K]. a: [adapters, E, T, K]. t: float32 [slots, T].
        experts, adapters: as in `Factors`. top_k: slots of a token. BLOCK: inputs read at once.
    """
    slot = tl.program_id(0)
    adapter = tl.load(adapters + slot // top_k).to(tl.int64)
    expert = 0 if experts is None else tl.load(experts + slot).to(tl.int64)
    if (adapter < 0) | (expert < 0):
        return
    j = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    a += (adapter * E + expert) * T * K
    x += (slot // x_top_k) * K
    sum_j = tl.zeros([RANKS], tl.float32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        x_k = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        a_jk = tl.load(a + j[:, None] * K + k[None, :], mask=(j < T)[:, None] & (k < K)[None, :], other=0.0)
        sum_j += tl.sum(a_jk.to(tl.float32) * x_k[None, :], axis=1)
    tl.store(t + slot * T + j, sum_j, mask=j < T)


@triton.jit
def shrink_blocks(
    x,
    a,
    t,
    routing,
    adapters,
    slots,
    top_k,
    x_top_k,
    held,
    K,
    E,
    T,
    BM: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    OPERAND_ORDER: tl.constexpr,
):
    """The same for many slots, by blocks of one expert: one product for each adapter that a block has.

    Grid: blocks of BM slots, T / RANKS.

    Args:
        routing: a `Routing` for blocks of BM, with slots; None for a linear layer, whose rows are the slots.
        slots: their number. held: how many adapters `a` has. BLOCK: inputs of one `tl.dot`.
        OPERAND_ORDER: x is in `tiles.operand_order`.
    """
    block = tl.program_id(0)
    if routing is not None:
        if block * BM >= tl.load(routing.padded_count):
            return
        expert = tl.load(routing.experts + block).to(tl.int64)
        if expert < 0:
            return
        slot_m = tl.load(routing.slots + block * BM + tl.arange(0, BM))
    else:
        expert = 0
        slot_m = block * BM + tl.arange(0, BM)
    adapter_m = tl.load(adapters + slot_m // top_k, mask=slot_m < slots, other=-1)
    slot_m = slot_m.to(tl.int64)
    j = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    for adapter in range(held):
        mine_m = adapter_m == adapter
        if tl.max(mine_m.to(tl.int32), axis=0) > 0:
            factors = a + (adapter * E + expert) * T * K
            sum_mj = tl.zeros([BM, RANKS], tl.float32)
            for start in range(0, K, BLOCK):
                place = start + tl.arange(0, BLOCK)  # in memory
                k = _natural(place) if OPERAND_ORDER else place
                exists_k = place < K
                x_mk = tl.load(
                    x + (slot_m // x_top_k)[:, None] * K + place[None, :],
                    mask=mine_m[:, None] & exists_k[None, :],
                    other=0.0,
                )
                a_jk = tl.load(factors + j[:, None] * K + k[None, :], mask=(j < T)[:, None] & exists_k[None, :], other=0.0)
                sum_mj = tl.dot(x_mk, tl.trans(a_jk), sum_mj)
            tl.store(t + slot_m[:, None] * T + j[None, :], sum_mj, mask=mine_m[:, None] & (j < T)[None, :])


@triton.jit
def _natural(place):
    """Which input stands at a place of `tiles.operand_order`: there (q e h t p), here (q t e h p)."""
    p, t, h, e = place % 2, place // 2 % 4, place // 8 % 2, place // 16 % 2
    return place // 32 * 32 + t * 8 + e * 4 + h * 2 + p


# ---- B @ t ----


@triton.jit
def delta(lora, expert, row_n, slice, slot_m):
    """B @ t, times scale, of rows `row_n` for `slot_m`: float32 [n, m], zeros for slot -1.

    Every slot reads the rows of its own adapter. Of few slots, that is less work than a product for each adapter.

    Args:
        slice: which slice the rows belong to, a number.
    """
    RANK: tl.constexpr = lora.RANK
    adapter_m = tl.load(lora.adapters + slot_m // lora.top_k, mask=slot_m >= 0, other=-1).to(tl.int64)
    has_m = adapter_m >= 0
    b_nm = lora.b + (((adapter_m * lora.E + expert) * lora.N)[None, :] + row_n[:, None]) * RANK
    t_m = lora.t + slot_m * lora.T + slice * RANK
    exists_nm = has_m[None, :] & (row_n < lora.N)[:, None]
    sum_nm = tl.zeros([row_n.shape[0], slot_m.shape[0]], tl.float32)
    for start in range(0, RANK, RANKS_AT_ONCE):
        j = start + tl.arange(0, RANKS_AT_ONCE)
        t_mj = tl.load(t_m[:, None] + j[None, :], mask=has_m[:, None] & (j < RANK)[None, :], other=0.0)
        b_nmj = tl.load(
            b_nm[:, :, None] + j[None, None, :], mask=exists_nm[:, :, None] & (j < RANK)[None, None, :], other=0.0
        )
        sum_nm += tl.sum(b_nmj.to(tl.float32) * t_mj[None, :, :], axis=2)
    return sum_nm * lora.scale


@triton.jit
def add_delta(sum_nm, lora, expert, row_n, slice, slot_m, used_m):
    """`sum_nm` + B @ t, without scale, by one product for each adapter that the slots have; t in the dtype of B."""
    RANK: tl.constexpr = lora.RANK
    CHUNK: tl.constexpr = lora.CHUNK
    dtype: tl.constexpr = lora.b.dtype.element_ty
    adapter_m = tl.load(lora.adapters + slot_m // lora.top_k, mask=used_m, other=-1)
    t_m = lora.t + slot_m.to(tl.int64) * lora.T + slice * RANK
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


@triton.jit
def expand_rows(out, lora, slots, BM: tl.constexpr, BN: tl.constexpr):
    """out[slot] += B @ t. Grid: blocks of BN rows of the weight, blocks of BM slots. out: [slots, N]."""
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


# ---- starting them ----


def shrink(
    x: torch.Tensor,
    factors: Factors,
    slots: int,
    top_k: int,
    *,
    block: int | None = None,
    routing: Routing | None = None,
    operand_order: bool = False,
) -> Lora:
    """t = A @ x of every slot, as the product's kernel takes it.

    Args:
        x: [slots or slots / top_k, in], contiguous: a row for each slot or for each token.
        slots: their number. top_k: slots of a token.
        block: None for few slots; else that many slots are multiplied at once, and `routing` (None for a linear layer)
        is for blocks of that size.
        operand_order: x is in `tiles.operand_order`; only with `block`.
    """
    held, num_experts, ranks, inputs = factors.a.shape
    rows, rank = factors.b.shape[2:]
    if len(factors.adapters) * top_k < slots:
        raise ValueError(f"adapters of {len(factors.adapters)} tokens for {slots // top_k}")
    t = torch.empty(slots, ranks, dtype=torch.float32, device=x.device)
    shared = {"adapters": factors.adapters, "top_k": top_k, "x_top_k": slots // len(x), "K": inputs, "E": num_experts}
    if block is None:
        at_once = 2
        shrink_slots[slots, triton.cdiv(ranks, at_once)](
            x,
            factors.a,
            t,
            experts=factors.experts,
            T=ranks,
            RANKS=at_once,
            BLOCK=min(4096, triton.next_power_of_2(inputs)),
            num_warps=4,
            **shared,
        )
    else:
        blocks = triton.cdiv(slots, block) if routing is None else routing.experts.shape[0]
        at_once = min(64, _padded_rank(ranks))
        shrink_blocks[blocks, triton.cdiv(ranks, at_once)](
            x,
            factors.a,
            t,
            routing=routing,
            slots=slots,
            held=held,
            T=ranks,
            BM=block,
            RANKS=at_once,
            BLOCK=64,
            OPERAND_ORDER=operand_order,
            num_warps=4,
            num_stages=3,
            **shared,
        )
    return Lora(
        b=factors.b,
        t=t,
        adapters=factors.adapters,
        top_k=top_k,
        held=held,
        E=num_experts,
        N=rows,
        T=ranks,
        ends=factors.ends or (rows,),
        scale=factors.scale,
        RANK=tl.constexpr(rank),
        CHUNK=tl.constexpr(min(64, _padded_rank(rank))),
    )


def expand(out: torch.Tensor, x: torch.Tensor, factors: Factors) -> None:
    """Add to `out` [rows, N], in place, what the adapters of a linear layer add for x [rows, in]. Both are contiguous."""
    rows, outputs = out.shape
    if rows == 0:
        return
    few = rows <= 64
    lora = shrink(x, factors, rows, 1, block=None if few else 32)
    inner = factors.ends[:-1]
    block = next(size for size in ROW_BLOCKS if all(end % size == 0 for end in inner))
    slots = 16 if few else 64
    expand_rows[triton.cdiv(outputs, block), triton.cdiv(rows, slots)](
        out, lora, slots=rows, BM=slots, BN=block, num_warps=4
    )


def _padded_rank(rank: int) -> int:
    """`rank` rounded up to what `tl.dot` takes."""
    return max(16, triton.next_power_of_2(rank))
