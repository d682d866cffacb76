"""bitsandbytes' own dequantization to float32: what the conversion is compared with, and what mode nf4 starts from."""

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit


def dequantize_float32(packed: torch.Tensor, state: QuantState) -> torch.Tensor:
    """float32 of `state.shape`, on packed's device; left alone bitsandbytes would round to the state's dtype.

    bitsandbytes 0.50.2's CPU kernel starts a new block with every row, its quantizer does not: where rows are not
    whole blocks they disagree (seen on [6, 96] with blocksize 64: 25 % error instead of 9 %). Handed over as one row
    the weight is read as it was written.
    """
    shape = state.shape
    flat = QuantState(
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
    return dequantize_4bit(packed.reshape(-1, 1), flat).reshape(shape)
