"""From the router's logits to the experts' work: the top k of each token, their softmax, and the slots sorted by expert.

vLLM does this in three kernels. Here the router's product leaves its logits, and

- of one token, every program of the experts' kernels finds its expert by itself (`choice_of_token`), in less time than a
  launch takes;
- of a batch, one program does it all (`route`);
- of many tokens, `choose` finds the experts, and vLLM's `moe_align_block_size` sorts.

Of equal logits the one of the lower number comes first, as in vLLM. NaN counts as the lowest.
"""

import torch
import triton
import triton.language as tl

from gptoss_nf4.vllm.kernels.ahead import start_early
from gptoss_nf4.vllm.kernels.arguments import Routing
from gptoss_nf4.vllm.kernels.lora import early_launch
from gptoss_nf4.vllm.kernels.sort import store_blocks
from gptoss_nf4.vllm.kernels.start import cdiv, next_power_of_2, start_kernel

LARGEST = tl.constexpr(3e38)  # -3e38 is above what stands for experts that have been taken, and those that do not exist
NONE = tl.constexpr(float("-inf"))
MAX_CHOICES = 1 << 12  # tokens x experts of `route`, rounded up to powers of two: 128 x 32
TOKENS = tl.constexpr(8)  # of a program of `choose`


@triton.jit
def _ordered(logit):
    """Finite float32, so that every expert has a place in the order; NaN is the lowest."""
    logit = logit.to(tl.float32)
    return tl.minimum(tl.where(logit > -LARGEST, logit, -LARGEST), LARGEST)


@triton.jit
def _load_logits(logits, E, EXPERTS: tl.constexpr):
    expert = tl.arange(0, EXPERTS)
    return tl.where(expert < E, _ordered(tl.load(logits + expert, mask=expert < E, other=0.0)), NONE)


@triton.jit
def choice_of_token(logits, slot, top_k, E: tl.constexpr):
    """The expert of a slot of the only token, int32, and its softmax weight among the top_k, float32."""
    EXPERTS: tl.constexpr = triton.next_power_of_2(E)
    expert = tl.arange(0, EXPERTS)
    logit, other = _load_logits(logits, E, EXPERTS), _load_logits(logits, E, EXPERTS)
    before = (other[None, :] > logit[:, None]) | ((other[None, :] == logit[:, None]) & (expert[None, :] < expert[:, None]))
    rank = tl.sum(before.to(tl.int32), axis=1)
    share = tl.where(rank < top_k, tl.exp(logit - tl.max(logit, axis=0)), 0.0)
    mine = rank == slot
    weight = tl.sum(tl.where(mine, share, 0.0), axis=0) / tl.sum(share, axis=0)
    return tl.max(tl.where(mine, expert, 0), axis=0), weight


@triton.jit
def _top(logit_te, TOP_K: tl.constexpr):
    """Rank of each of a token's first TOP_K experts, TOP_K for others, int32 [t, e]; softmax weights over them [t, e]."""
    EXPERTS: tl.constexpr = logit_te.shape[1]
    expert = tl.arange(0, EXPERTS)[None, :]
    rank_te = tl.full(logit_te.shape, TOP_K, tl.int32)
    rest_te = logit_te
    for k in tl.static_range(TOP_K):
        best_t = tl.max(rest_te, axis=1)
        first_t = tl.min(tl.where(rest_te == best_t[:, None], expert, EXPERTS), axis=1)
        taken_te = expert == first_t[:, None]
        rank_te = tl.where(taken_te, k, rank_te)
        rest_te = tl.where(taken_te, NONE, rest_te)
    largest_t = tl.max(logit_te, axis=1)
    share_te = tl.where(rank_te < TOP_K, tl.exp(logit_te - largest_t[:, None]), 0.0)
    return rank_te, share_te / tl.sum(share_te, axis=1)[:, None]


@triton.jit
def _logits_of(logits, tokens, first, E, TOKENS: tl.constexpr, EXPERTS: tl.constexpr):
    token, expert = first + tl.arange(0, TOKENS)[:, None], tl.arange(0, EXPERTS)[None, :]
    exists_te = (token < tokens) & (expert < E)
    logit_te = tl.load(logits + token.to(tl.int64) * E + expert, mask=exists_te, other=0.0)
    return token, tl.where(expert < E, _ordered(logit_te), NONE)


@triton.jit
def _store_choices(topk_weights, topk_ids, is_padding, rank_te, weight_te, token, tokens, TOP_K: tl.constexpr):
    """Store what `_top` gave, expert -1 for padding. Gives each choice's slot, and whether it is one to compute, [t, e]."""
    expert_te = tl.arange(0, rank_te.shape[1])[None, :] + tl.zeros_like(rank_te)
    slot_te = token * TOP_K + rank_te
    chosen_te = (rank_te < TOP_K) & (token < tokens)
    if is_padding is not None:
        exists_t = tl.load(is_padding + token, mask=token < tokens, other=1) == 0
        expert_te = tl.where(exists_t, expert_te, -1)
    tl.store(topk_weights + slot_te, weight_te, mask=chosen_te)
    tl.store(topk_ids + slot_te, expert_te, mask=chosen_te)
    return slot_te, chosen_te & (expert_te >= 0)


@triton.jit(do_not_specialize=["tokens"])
def _choose(
    logits,
    topk_weights,
    topk_ids,
    tokens,
    E,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The tensors of `choose`. Grid: tokens / TOKENS."""
    start_early(EARLY)
    token, logit_te = _logits_of(logits, tokens, tl.program_id(0) * TOKENS, E, TOKENS, EXPERTS)
    rank_te, weight_te = _top(logit_te, TOP_K)
    _store_choices(topk_weights, topk_ids, None, rank_te, weight_te, token, tokens, TOP_K)


def choose(logits: torch.Tensor, top_k: int, *, early: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The top k of each token.

    Args:
        logits: [tokens, experts], contiguous, float32 or 16 bits.
        early: this kernel may start before the one in front of it has ended, see `ahead`.

    Returns:
        topk_weights float32 [tokens, k], which sum to 1, and topk_ids int32 [tokens, k].
    """
    tokens, experts = logits.shape
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    ids = torch.empty(tokens, top_k, dtype=torch.int32, device=logits.device)
    if tokens:
        start_kernel(
            _choose,
            (cdiv(tokens, TOKENS.value),),
            logits,
            weights,
            ids,
            tokens=tokens,
            E=experts,
            TOP_K=top_k,
            EXPERTS=next_power_of_2(experts),
            EARLY=early,
            num_warps=4,
            **early_launch(early),
        )
    return weights, ids


@triton.jit(do_not_specialize=["tokens"])
def _route(
    logits,
    is_padding,
    expert_map,
    topk_weights,
    topk_ids,
    slots,
    experts,
    padded_count,
    tokens,
    E,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PADDED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The tensors of `route`. The last constants are sizes, rounded up to powers of two."""
    start_early(EARLY)
    token, logit_te = _logits_of(logits, tokens, 0, E, TOKENS, EXPERTS)
    rank_te, weight_te = _top(logit_te, TOP_K)
    slot_te, chosen_te = _store_choices(topk_weights, topk_ids, is_padding, rank_te, weight_te, token, tokens, TOP_K)
    one_te = chosen_te.to(tl.int32)
    padded_e = (tl.sum(one_te, axis=0) + BLOCK - 1) // BLOCK * BLOCK
    end_e = tl.cumsum(padded_e, axis=0)
    place_te = (end_e - padded_e)[None, :] + tl.cumsum(one_te, axis=0) - 1
    routing = slots, experts, padded_count, expert_map
    store_blocks(routing, padded_e, end_e, slot_te, place_te, chosen_te, tokens * TOP_K, BLOCK, BLOCKS, PADDED)


def routes(tokens: int, experts: int) -> bool:
    """Whether `route` takes this many."""
    return next_power_of_2(tokens) * next_power_of_2(experts) <= MAX_CHOICES


def route(
    logits: torch.Tensor,
    top_k: int,
    block: int,
    expert_map: torch.Tensor | None = None,
    is_padding: torch.Tensor | None = None,
    *,
    early: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, Routing]:
    """`choose`, and the slots sorted by expert in whole blocks of `block`.

    Args:
        expert_map: int32 [experts] from global to local number, -1 for another rank's; None where all are here.
        is_padding: bool [tokens] or more; tokens that do not exist choose -1. None: all exist.

    Returns:
        topk_weights and topk_ids as `choose`, and the routing. What lies behind its padded_count is not set.
    """
    tokens, experts = logits.shape
    count = tokens * top_k
    blocks = min(count, experts + count // block)  # each expert leaves at most one block unfilled
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    ids = torch.empty(tokens, top_k, dtype=torch.int32, device=logits.device)
    slots = torch.empty(blocks * block, dtype=torch.int32, device=logits.device)
    owners = torch.empty(blocks, dtype=torch.int32, device=logits.device)
    padded_count = torch.empty(1, dtype=torch.int32, device=logits.device)
    start_kernel(
        _route,
        (1,),
        logits,
        is_padding,
        expert_map,
        weights,
        ids,
        slots,
        owners,
        padded_count,
        tokens=tokens,
        E=experts,
        TOP_K=top_k,
        BLOCK=block,
        TOKENS=next_power_of_2(tokens),
        EXPERTS=next_power_of_2(experts),
        BLOCKS=next_power_of_2(blocks),
        PADDED=next_power_of_2(blocks * block),
        EARLY=early,
        num_warps=8,
        **early_launch(early),
    )
    return weights, ids, Routing(slots, owners, padded_count)
