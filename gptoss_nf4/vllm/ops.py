"""The kernels as operators that torch.compile and CUDA graphs take as they are.

How a product is split depends on the number of tokens, which is known only when it runs: inside an operator the
compiler does not look. The same holds for whether a step needs adapters. `no_lora` is vLLM's flag for that, bool [1] on
the CPU. Where it is set, the kernels run as if there were none. vLLM captures CUDA graphs with and without adapters apart.
"""

from collections.abc import Sequence

import torch
from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size

from gptoss_nf4.format.blocks import INPUTS
from gptoss_nf4.vllm.kernels import experts_launch, linear_launch
from gptoss_nf4.vllm.kernels.arguments import Packed
from gptoss_nf4.vllm.kernels.lora import Factors
from gptoss_nf4.vllm.kernels.sort import local_experts
from gptoss_nf4.vllm.kernels.tiles import ABSMAX_FACTOR


@torch.library.custom_op("gptoss_nf4::packed_linear", mutates_args=())
def packed_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    blocksize: int,
    quant_type: str,
) -> torch.Tensor:
    """A linear layer on packed weights.

    Args:
        x: [rows, in] float16 or bfloat16.
        codes, absmax, blocksize, quant_type: the weight in the order of `kernels.tiles`, one expert.
        bias: [1, padded rows of the weight] in x's dtype, or None.
        out_features: rows of the weight without padding.

    Returns:
        [rows, out_features] in x's dtype.
    """
    return linear_launch.linear(x, Packed(codes, absmax, bias, blocksize, quant_type), out_features)


@packed_linear.register_fake
def _(
    x: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, bias: torch.Tensor | None, out_features: int, *_: object
) -> torch.Tensor:
    return x.new_empty(x.shape[0], out_features)


@torch.library.custom_op("gptoss_nf4::packed_linear_with_adapters", mutates_args=())
def packed_linear_with_adapters(
    x: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    blocksize: int,
    quant_type: str,
    adapters: torch.Tensor,
    no_lora: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    lora_ends: Sequence[int],
) -> torch.Tensor:
    """`packed_linear` and what adapters add. adapters, lora_*: the fields of `kernels.lora.Factors`."""
    factors = Factors(lora_a, lora_b, adapters, ends=tuple(lora_ends)) if needed(no_lora) else None
    return linear_launch.linear(x, Packed(codes, absmax, bias, blocksize, quant_type), out_features, factors=factors)


@packed_linear_with_adapters.register_fake
def _(
    x: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, bias: torch.Tensor | None, out_features: int, *_: object
) -> torch.Tensor:
    return x.new_empty(x.shape[0], out_features)


@torch.library.custom_op("gptoss_nf4::add_adapters", mutates_args=("out",))
def add_adapters(
    out: torch.Tensor,
    x: torch.Tensor,
    adapters: torch.Tensor,
    no_lora: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    lora_ends: Sequence[int],
) -> None:
    """Add to `out` [rows, out], the result of a dense linear layer, what the adapters add for x [rows, in]."""
    if needed(no_lora):
        linear_launch.add_adapters(out, x, Factors(lora_a, lora_b, adapters, ends=tuple(lora_ends)))


def needed(no_lora: torch.Tensor | None) -> bool:
    """Whether some token of the step may have an adapter."""
    return no_lora is None or not bool(no_lora)


@torch.library.custom_op("gptoss_nf4::packed_experts", mutates_args=())
def packed_experts(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    experts: int,
    w13_codes: torch.Tensor,
    w13_absmax: torch.Tensor,
    w13_bias: torch.Tensor,
    w13_blocksize: int,
    w2_codes: torch.Tensor,
    w2_absmax: torch.Tensor,
    w2_bias: torch.Tensor,
    w2_blocksize: int,
    quant_type: str,
    w13_blocks_along: str = INPUTS,
    w13_absmax_factor: float = ABSMAX_FACTOR,
    w2_blocks_along: str = INPUTS,
    w2_absmax_factor: float = ABSMAX_FACTOR,
) -> torch.Tensor:
    """The weighted sum of each token's experts.

    Args:
        x: [tokens, hidden] float16 or bfloat16.
        topk_weights, topk_ids: [tokens, k], global expert numbers; a choice of -1 adds exactly 0.
        expert_map: int32 [experts] from global to local number, -1 for another rank's; None where all are here.
        experts: their global number.
        w13_*, w2_*: this rank's experts in the order of `kernels.tiles`, as `kernels.arguments.Packed` has them.

    Returns:
        [tokens, hidden] in x's dtype; choices of other ranks' experts add nothing.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    w13 = Packed(w13_codes, w13_absmax, w13_bias, w13_blocksize, quant_type, w13_blocks_along, w13_absmax_factor)
    w2 = Packed(w2_codes, w2_absmax, w2_bias, w2_blocksize, quant_type, w2_blocks_along, w2_absmax_factor)
    _experts(out, x, topk_weights, topk_ids, expert_map, experts, w13, w2)
    return out


@torch.library.custom_op("gptoss_nf4::packed_experts_of_logits", mutates_args=())
def packed_experts_of_logits(
    x: torch.Tensor,
    router_logits: torch.Tensor,
    top_k: int,
    is_padding: torch.Tensor | None,
    expert_map: torch.Tensor | None,
    w13_codes: torch.Tensor,
    w13_absmax: torch.Tensor,
    w13_bias: torch.Tensor,
    w13_blocksize: int,
    w2_codes: torch.Tensor,
    w2_absmax: torch.Tensor,
    w2_bias: torch.Tensor,
    w2_blocksize: int,
    quant_type: str,
    w13_blocks_along: str = INPUTS,
    w13_absmax_factor: float = ABSMAX_FACTOR,
    w2_blocks_along: str = INPUTS,
    w2_absmax_factor: float = ABSMAX_FACTOR,
) -> torch.Tensor:
    """`packed_experts` of the `top_k` experts with the largest logits, weighted by their softmax.

    Args:
        router_logits: [tokens, experts].
        is_padding: bool, of each token whether it only fills up the batch; may be longer. None: all exist.
        The others: as in `packed_experts`.
    """
    if len(x) == 0:
        return torch.empty_like(x)
    w13 = Packed(w13_codes, w13_absmax, w13_bias, w13_blocksize, quant_type, w13_blocks_along, w13_absmax_factor)
    w2 = Packed(w2_codes, w2_absmax, w2_bias, w2_blocksize, quant_type, w2_blocks_along, w2_absmax_factor)
    logits = router_logits.contiguous()
    return experts_launch.experts_of_logits(x, logits, top_k, is_padding, expert_map, w13, w2, moe_align_block_size)


@packed_experts.register_fake
@packed_experts_of_logits.register_fake
def _(x: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("gptoss_nf4::router", mutates_args=())
def router(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """x [rows, hidden] @ weight [experts, hidden] + bias [experts], all in one 16-bit dtype: [rows, experts]."""
    return linear_launch.router(x, weight, bias)


@router.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("gptoss_nf4::packed_experts_with_adapters", mutates_args=("out",))
def packed_experts_with_adapters(
    out: torch.Tensor,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    experts: int,
    w13_codes: torch.Tensor,
    w13_absmax: torch.Tensor,
    w13_bias: torch.Tensor,
    w13_blocksize: int,
    w2_codes: torch.Tensor,
    w2_absmax: torch.Tensor,
    w2_bias: torch.Tensor,
    w2_blocksize: int,
    quant_type: str,
    adapters: torch.Tensor,
    no_lora: torch.Tensor | None,
    w13_lora_a: torch.Tensor,
    w13_lora_b: torch.Tensor,
    w2_lora_a: torch.Tensor,
    w2_lora_b: torch.Tensor,
    w2_lora_scale: float,
    w13_blocks_along: str = INPUTS,
    w13_absmax_factor: float = ABSMAX_FACTOR,
    w2_blocks_along: str = INPUTS,
    w2_absmax_factor: float = ABSMAX_FACTOR,
) -> None:
    """`packed_experts` into `out` [tokens, hidden], where vLLM wants it, with what adapters add.

    adapters, *_lora_*: the fields of `kernels.lora.Factors` for w13 and w2.
    """
    w13 = Packed(w13_codes, w13_absmax, w13_bias, w13_blocksize, quant_type, w13_blocks_along, w13_absmax_factor)
    w2 = Packed(w2_codes, w2_absmax, w2_bias, w2_blocksize, quant_type, w2_blocks_along, w2_absmax_factor)
    w13_factors = w2_factors = None
    if needed(no_lora):
        local = local_experts(topk_ids.to(torch.int32), expert_map)
        w13_factors = Factors(w13_lora_a, w13_lora_b, adapters, local)
        w2_factors = Factors(w2_lora_a, w2_lora_b, adapters, local, scale=w2_lora_scale)
    _experts(out, x, topk_weights, topk_ids, expert_map, experts, w13, w2, w13_factors, w2_factors)


def _experts(
    out: torch.Tensor,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    experts: int,
    w13: Packed,
    w2: Packed,
    w13_factors: Factors | None = None,
    w2_factors: Factors | None = None,
) -> None:
    if len(x):
        experts_launch.routed_experts(
            x,
            topk_weights,
            topk_ids.to(torch.int32),  # as vLLM's routers have it: no copy. The kernels are compiled for this dtype.
            expert_map,
            experts,
            w13,
            w2,
            moe_align_block_size,
            out,
            w13_factors,
            w2_factors,
        )
