"""Sorting the slots of a decode batch by expert, in one small kernel.

vLLM's `moe_align_block_size` does the same for any size; at a batch of 32 it takes 6 us a layer, as long as a
fifth of a layer's w2. One program with all slots in registers is enough there.

An expert of -1 is no expert: vLLM gives it to the tokens by which it fills up a batch (VLLM_MOE_SKIP_PADDING). Such slots
are in no block. No kernel computes them, and `combine.sum_slots` leaves them out.
"""

import torch
import triton
import triton.language as tl

from gptoss_nf4.vllm.kernels.start import cdiv, next_power_of_2, start_kernel

MAX_COMPARISONS = 1 << 13  # slots x experts: 256 x 32 take a third of the shared memory that a program may have


@triton.jit
def store_blocks(
    routing, padded_e, end_e, slot, place, exists, count, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, PADDED: tl.constexpr
):
    """The blocks of slots and their experts, by one program.

    Args:
        routing: pointers (slots, experts, padded count) to write, and the expert map to read or None.
        padded_e, end_e: int32 [experts], the number of an expert's slots in whole blocks, and its running sum.
        slot, place, exists: of one shape: slots, where they go, and which of them go anywhere.
        count: the number of slots, which fills up a block.
    """
    slots, experts, padded_count, expert_map = routing
    total = tl.sum(padded_e, axis=0)
    tl.store(padded_count, total)
    free = tl.arange(0, PADDED)
    tl.store(slots + free, tl.zeros_like(free) + count, mask=free < total)
    tl.debug_barrier()
    tl.store(slots + place, slot, mask=exists)
    block = tl.arange(0, BLOCKS)
    used = block * BLOCK < total
    owner = tl.sum((end_e[None, :] <= block[:, None] * BLOCK).to(tl.int32), axis=1)
    if expert_map is not None:
        owner = tl.load(expert_map + owner, mask=used, other=-1)
    tl.store(experts + block, owner, mask=used)


@triton.jit(do_not_specialize=["count"])
def _sort_slots(
    ids,
    expert_map,
    slots,
    experts,
    padded_count,
    count,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """The tensors of `sort_slots`; `count` slots. The last four constants are sizes, rounded up to powers of two."""
    slot = tl.arange(0, SLOTS)
    expert = tl.arange(0, EXPERTS)
    chosen = tl.load(ids + slot, mask=slot < count, other=-1).to(tl.int32)
    matches = (chosen[:, None] == expert[None, :]).to(tl.int32)
    rank = tl.sum(matches * tl.cumsum(matches, axis=0), axis=1) - 1  # of a slot among those of its expert
    padded = (tl.sum(matches, axis=0) + BLOCK - 1) // BLOCK * BLOCK
    end = tl.cumsum(padded, axis=0)
    place = rank + tl.sum(matches * (end - padded)[None, :], axis=1)
    routing = slots, experts, padded_count, expert_map
    store_blocks(routing, padded, end, slot, place, chosen >= 0, count, BLOCK, BLOCKS, PADDED)  # -1 beyond count too


@triton.jit(do_not_specialize=["count"])
def _local_experts(ids, expert_map, out, count, BLOCK: tl.constexpr):
    """out[slot] = expert_map[ids[slot]], and -1 for -1. Grid: blocks of BLOCK slots."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    chosen = tl.load(ids + slot, mask=slot < count, other=-1)
    local = tl.load(expert_map + chosen, mask=chosen >= 0, other=-1)
    tl.store(out + slot, local, mask=slot < count)


def local_experts(ids: torch.Tensor, expert_map: torch.Tensor | None) -> torch.Tensor:
    """The local expert of each slot, int32 [slots]; -1 for another rank's, and for none. Arguments as in `sort_slots`."""
    if expert_map is None:
        return ids.flatten()
    out = torch.empty(ids.numel(), dtype=torch.int32, device=ids.device)
    block = 256
    grid = (cdiv(ids.numel(), block),)
    start_kernel(_local_experts, grid, ids.contiguous(), expert_map, out, count=ids.numel(), BLOCK=block, num_warps=4)
    return out


def fits(slots: int, experts: int) -> bool:
    """Whether `sort_slots` takes this many."""
    return next_power_of_2(slots) * next_power_of_2(experts) <= MAX_COMPARISONS


def sort_slots(
    ids: torch.Tensor, block: int, experts: int, expert_map: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Slots sorted by expert, in whole blocks: the fields of `arguments.Routing`.

    Args:
        ids: integers [tokens, k], global expert numbers, -1 for none.
        block: slots in a block.
        experts: their global number.
        expert_map: int32 [experts] from global to local number, -1 for another rank's; None where all are here.

    Returns:
        slots int32 [padded], experts int32 [blocks], padded_count int32 [1]. What lies behind padded_count is not set.
    """
    count = ids.numel()
    blocks = min(count, experts + count // block)  # each expert leaves at most one block unfilled
    slots = torch.empty(blocks * block, dtype=torch.int32, device=ids.device)
    owners = torch.empty(blocks, dtype=torch.int32, device=ids.device)
    padded_count = torch.empty(1, dtype=torch.int32, device=ids.device)
    start_kernel(
        _sort_slots,
        (1,),
        ids.contiguous(),
        expert_map,
        slots,
        owners,
        padded_count,
        count=count,
        BLOCK=block,
        SLOTS=next_power_of_2(count),
        EXPERTS=next_power_of_2(experts),
        BLOCKS=next_power_of_2(blocks),
        PADDED=next_power_of_2(blocks * block),
        num_warps=8,
    )
    return slots, owners, padded_count
