"""bitsandbytes' own dequantization to float32.

Mode nf4 starts from it, and so does the reference. The proof has its own.
"""

import torch

from gptoss_nf4.eager_bnb import bnb


def dequantize_float32(packed: torch.Tensor, state: bnb.QuantState) -> torch.Tensor:
    """Dequantize a 4-bit weight without rounding it to the state's dtype, as `dequantize_4bit` alone would.

    bitsandbytes 0.50.2's quantizer lets blocks run on across rows. Its CPU kernel starts a new block with every row. The
    two disagree where rows are not whole blocks: on [6, 96] with blocksize 64 the error was 25 % instead of 9 %. Such a
    weight is handed over as one row, so it is read as it was written.

    Args:
        packed: elements / 2 bytes in any shape; uint8, or another dtype that holds the same bytes (bnb_4bit_quant_storage).
        state: of the weight, with or without double quantization. It is not changed.

    Returns:
        float32 of `state.shape`, on the device of `packed`.
    """
    shape = state.shape
    flat = bnb.QuantState(
        absmax=state.absmax,
        shape=shape,
        dtype=torch.float32,
        blocksize=state.blocksize,
        code=state.code,
        quant_type=state.quant_type,
        offset=state.offset,
        state2=state.state2,
    )
    if shape[-1] % state.blocksize:
        flat.shape = torch.Size([1, shape.numel()])
    return bnb.dequantize_4bit(packed.reshape(-1, 1).view(torch.uint8).reshape(-1, 1), flat).reshape(shape)
