"""A @ x: the first half of what adapters add, see `lora`. Names end in the letters of their axes, as there."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gptoss_nf4.vllm.kernels.arguments import NOT_ROUTED, Routing
from gptoss_nf4.vllm.kernels.lora import Factors, Lora, early_launch
from gptoss_nf4.vllm.kernels.order import natural
from gptoss_nf4.vllm.kernels.start import cdiv, next_power_of_2, start_kernel

MAX_CHUNK = 64  # ranks of one `tl.dot`


@triton.jit
def shrink_slots(
    x,
    a,
    t,
    experts,
    adapters,
    top_k,
    x_top_k,
    K,
    E,
    T,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    OPERAND_ORDER: tl.constexpr,
    EARLY: tl.constexpr,
):
    """t[slot] = a[adapter, expert] @ x[slot // x_top_k], for few slots.

    A program takes a slot and RANKS rows of lora_A, and asks for all of them at once. Grid: slots, T / RANKS.

    Args:
        x: [.., K]. a: [adapters, E, T, K]. t: float32 [slots, T].
        experts, adapters: as in `Factors`. top_k: slots of a token. BLOCK: inputs read at once.
        OPERAND_ORDER: x is in `tiles.operand_order`.
        EARLY: both this kernel and the next are started before the one in front of it has ended.
    """
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
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
        place = start + tl.arange(0, BLOCK)  # in memory
        k = natural(place) if OPERAND_ORDER else place
        exists_k = place < K
        x_k = tl.load(x + place, mask=exists_k, other=0.0).to(tl.float32)
        a_jk = tl.load(a + j[:, None] * K + k[None, :], mask=(j < T)[:, None] & exists_k[None, :], other=0.0)
        sum_j += tl.sum(a_jk.to(tl.float32) * x_k[None, :], axis=1)
    tl.store(t + slot * T + j, sum_j, mask=j < T)


@triton.jit(do_not_specialize=["slots"])
def shrink_blocks(
    x,
    a,
    t,
    routing,
    adapters,
    slots,
    top_k,
    x_top_k,
    K,
    E,
    T,
    BM: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    OPERAND_ORDER: tl.constexpr,
):
    """The same for many slots, by blocks of one expert: a program takes those of one adapter.

    Grid: blocks of BM slots, T / RANKS, adapters.

    Args:
        routing: a `Routing` for blocks of BM, with slots; NOT_ROUTED for a linear layer, whose rows are the slots.
        slots: their number. BLOCK: inputs of one `tl.dot`.
        OPERAND_ORDER: x is in `tiles.operand_order`.
    """
    block = tl.program_id(0)
    if routing.slots is not None:
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
    adapter = tl.program_id(2)
    mine_m = adapter_m == adapter
    if tl.max(mine_m.to(tl.int32), axis=0) == 0:
        return
    a += (adapter.to(tl.int64) * E + expert) * T * K
    sum_mj = tl.zeros([BM, RANKS], tl.float32)
    for start in range(0, K, BLOCK):
        place = start + tl.arange(0, BLOCK)
        k = natural(place) if OPERAND_ORDER else place
        exists_k = place < K
        x_mk = tl.load(
            x + (slot_m // x_top_k)[:, None] * K + place[None, :], mask=mine_m[:, None] & exists_k[None, :], other=0.0
        )
        a_jk = tl.load(a + j[:, None] * K + k[None, :], mask=(j < T)[:, None] & exists_k[None, :], other=0.0)
        sum_mj = tl.dot(x_mk, tl.trans(a_jk), sum_mj)
    tl.store(t + slot_m[:, None] * T + j[None, :], sum_mj, mask=mine_m[:, None] & (j < T)[None, :])


def shrink(
    x: torch.Tensor,
    factors: Factors,
    slots: int,
    top_k: int,
    *,
    block: int | None = None,
    routing: Routing | None = None,
    operand_order: bool = False,
    early: bool = False,
) -> Lora:
    """t = A @ x of every slot, as the product's kernel takes it.

    Args:
        x: [slots or slots / top_k, in], contiguous: a row for each slot or for each token.
        slots: their number. top_k: slots of a token.
        block: None for few slots; else that many slots are multiplied at once, and `routing` (None for a linear layer)
        is for blocks of that size.
        operand_order: x is in `tiles.operand_order`.
        early: the product may start before this has ended; only without `block`, and where the GPU can.
    """
    held, num_experts, ranks, inputs = factors.a.shape
    rows, rank = factors.b.shape[2:]
    if len(factors.adapters) * top_k < slots:
        raise ValueError(f"adapters of {len(factors.adapters)} tokens for {slots // top_k}")
    t = torch.empty(slots, ranks, dtype=torch.float32, device=x.device)
    shared = {"adapters": factors.adapters, "top_k": top_k, "x_top_k": slots // len(x), "K": inputs, "E": num_experts}
    if block is None:
        at_once = _ranks_of_program(slots, early)
        start_kernel(
            shrink_slots,
            (slots, cdiv(ranks, at_once)),
            x,
            factors.a,
            t,
            experts=factors.experts,
            T=ranks,
            RANKS=at_once,
            BLOCK=min(4096, next_power_of_2(inputs)),
            OPERAND_ORDER=operand_order,
            EARLY=early,
            num_warps=4,
            **early_launch(early),
            **shared,
        )
    else:
        experts = None if routing is None else routing.experts
        blocks = cdiv(slots, block) if experts is None else len(experts)
        at_once = min(MAX_CHUNK, _padded(ranks))
        start_kernel(
            shrink_blocks,
            (blocks, cdiv(ranks, at_once), held),
            x,
            factors.a,
            t,
            # Not None itself: Triton 3.6 cannot compare a tuple with it that has None in it.
            routing=NOT_ROUTED if routing is None else routing,
            slots=slots,
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
        CHUNK=tl.constexpr(min(MAX_CHUNK, _padded(rank))),
        CHUNK_OF_FEW=tl.constexpr(min(MAX_CHUNK, _padded(rank)) if held == 1 else MAX_CHUNK),
        EARLY=tl.constexpr(early),
    )


def _padded(rank: int) -> int:
    """`rank` rounded up to what `tl.dot` takes."""
    return max(16, next_power_of_2(rank))


def _ranks_of_program(slots: int, early: bool) -> int:
    """Rows of lora_A that a program of `shrink_slots` takes. Measured, see NOTES.md.

    More programs end sooner. But where the product runs beside them, a few large ones leave more of the GPU to it.
    """
    return 8 if early and 4 < slots <= 32 else 2
