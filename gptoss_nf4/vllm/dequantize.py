"""Codes and absmax to a dense weight: bitsandbytes' own operator, on the CPU and on the GPU."""

import bitsandbytes  # noqa: F401  (registers torch.ops.bitsandbytes)
import torch


def dequantize(
    codes: torch.Tensor, absmax: torch.Tensor, blocksize: int, quant_type: str, dtype: torch.dtype
) -> torch.Tensor:
    """Dequantize rows of whole blocks.

    Args:
        codes: uint8 [..., rows, in_features / 2], contiguous, first element in the high nibble.
        absmax: float32 [..., rows, in_features / blocksize], contiguous.
        blocksize: weights per absmax value.
        quant_type: "nf4" or "fp4".

    Returns:
        `dtype` [..., rows, in_features], bit for bit what bitsandbytes' `dequantize_4bit` gives.
    """
    shape = [*codes.shape[:-1], codes.shape[-1] * 2]
    flat = codes.view(-1, 1)
    return torch.ops.bitsandbytes.dequantize_4bit(flat, absmax.view(-1), blocksize, quant_type, shape, dtype)
