"""What the kernels take, in groups. Triton passes a named tuple to a kernel whole, and its fields keep their names there.

A field that is None is None when the kernel is compiled: `if weight.bias is not None` costs nothing where it runs.
Letters stand for the axes of `tiles`.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton.language as tl

from gptoss_nf4.format.blocks import INPUTS, OUTPUTS
from gptoss_nf4.vllm.kernels.codebook import codebook
from gptoss_nf4.vllm.kernels.tiles import ABSMAX_FACTOR, ROWS


class Packed(NamedTuple):
    """A weight as a layer keeps it, or the weights of its experts, in the order of `tiles`."""

    codes: torch.Tensor
    """int32 [E, R, C, 32, S]; E is 1 for a linear layer."""
    absmax: torch.Tensor
    """float16 [E, R, B, 16]; where blocks run along the outputs, [E, B, in] in the dtype of the activations. It has been
    multiplied by `absmax_factor`."""
    bias: torch.Tensor | None
    """[E, 16 R] in the dtype of the activations."""
    blocksize: int
    """Inputs with one absmax, or outputs."""
    quant_type: str
    """nf4 or fp4."""
    blocks_along: str = INPUTS
    """Or OUTPUTS: `blocksize`, a multiple of 32, neighbouring outputs share an absmax for each input."""
    absmax_factor: float = ABSMAX_FACTOR
    """A power of two: ABSMAX_FACTOR, or that times `tiles.fitting_power`."""


class Weight(NamedTuple):
    """A packed weight as a kernel takes it; the first three fields are those of `Packed`."""

    codes: torch.Tensor
    absmax: torch.Tensor
    bias: torch.Tensor | None
    table: torch.Tensor
    """`Codebook.table`."""
    unscale: float
    """By which sums of products are multiplied, see the contract in `codebook`."""
    R: int
    """Row tiles of an expert."""
    C: int
    """Input tiles."""
    B: int
    """Blocks of a row; where they run along the outputs, of an input."""
    S: tl.constexpr
    """Words of a lane in a tile."""
    TILES_PER_BLOCK: tl.constexpr
    """Input tiles that share an absmax. Not used where blocks run along the outputs."""
    ROW_TILES_PER_BLOCK: tl.constexpr
    """Row tiles that share an absmax for each input, where blocks run along the outputs; else 0."""


class Routing(NamedTuple):
    """Which slots go to which expert. Slot s is choice s % top_k of token s // top_k.

    Either slots are sorted by expert and padded to whole blocks, as vLLM's `moe_align_block_size` and `sort.sort_slots`
    return them. Or each slot is a block of its own, and `slots` and `padded_count` are None.
    """

    slots: torch.Tensor | None
    """int32 [padded]: whole blocks for each expert, filled up with numbers that are no slots, but larger."""
    experts: torch.Tensor | None
    """int32 [blocks]: local expert of each block, -1 for another rank's."""
    padded_count: torch.Tensor | None
    """int32 [1]: how many of `slots` are in use."""
    logits: torch.Tensor | None = None
    """The router's [E] for the only token: slot s goes to the expert with the s-th largest. `experts` is None then."""
    E: tl.constexpr = tl.constexpr(0)
    """Of `logits`."""


NOT_ROUTED = Routing(None, None, None)
"""Of a linear layer."""


# Made once: each launch would make three, and that takes as long as the rest of it.
_constant = lru_cache(maxsize=None, typed=True)(tl.constexpr)


def kernel_weight(packed: Packed, dtype: torch.dtype) -> Weight:
    """`packed` as the kernels take it for activations in `dtype` (float16 or bfloat16)."""
    codes, absmax, bias, blocksize, quant_type, blocks_along, absmax_factor = packed
    outputs = blocks_along == OUTPUTS
    absmax_dtype = dtype if outputs else torch.float16
    if codes.dtype != torch.int32 or absmax.dtype != absmax_dtype:
        raise TypeError(f"packed weight of {codes.dtype} and {absmax.dtype}, expected int32 and {absmax_dtype}")
    _, row_tiles, input_tiles, _, words = codes.shape
    book = codebook(quant_type, dtype, codes.device)
    return Weight(
        codes=codes,
        absmax=absmax,
        bias=bias,
        table=book.table,
        unscale=1 / (book.factor * absmax_factor),
        R=row_tiles,
        C=input_tiles,
        B=absmax.shape[1 if outputs else 2],
        S=_constant(words),
        TILES_PER_BLOCK=_constant(1 if outputs else max(1, blocksize // (words * ROWS))),
        ROW_TILES_PER_BLOCK=_constant(blocksize // ROWS if outputs else 0),
    )
