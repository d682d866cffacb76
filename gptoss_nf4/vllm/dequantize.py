"""Codes and absmax to a dense weight: bitsandbytes' own operator, on the CPU and on the GPU."""

import bitsandbytes  # noqa: F401  (registers torch.ops.bitsandbytes)
import torch

from gptoss_nf4.format.blocks import INPUTS


def dequantize(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    dtype: torch.dtype,
    blocks_along: str = INPUTS,
) -> torch.Tensor:
    """Dequantize rows of whole blocks, or whole blocks of rows where blocks run along the outputs.

    Args:
        codes: uint8 [..., rows, in_features / 2], contiguous, first element in the high nibble.
        absmax: float32 [..., rows, in_features / blocksize], contiguous; [..., rows / blocksize, in_features] for blocks
            along the outputs.
        blocksize: weights per absmax value.
        quant_type: "nf4" or "fp4".
        blocks_along: a direction of `format/blocks.py`.

    Returns:
        `dtype` [..., rows, in_features], bit for bit what bitsandbytes' `dequantize_4bit` gives for the weight, or for its
        transpose.
    """
    shape = [*codes.shape[:-1], codes.shape[-1] * 2]
    flat = codes.view(-1, 1)
    if blocks_along == INPUTS:
        return torch.ops.bitsandbytes.dequantize_4bit(flat, absmax.view(-1), blocksize, quant_type, shape, dtype)
    # With an absmax of 1 the values are the codebook's. One product in float32, as bitsandbytes' own, then rounding.
    ones = absmax.new_ones(codes.numel() * 2 // blocksize)
    values = torch.ops.bitsandbytes.dequantize_4bit(
        flat, ones, blocksize, quant_type, [1, codes.numel() * 2], torch.float32
    )
    values.view(*absmax.shape[:-1], blocksize, absmax.shape[-1]).mul_(absmax.unsqueeze(-2))
    return values.view(shape).to(dtype)
