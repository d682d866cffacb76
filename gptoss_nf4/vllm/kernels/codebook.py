"""The codebook in the GPU's memory, and the contract of decoding with it.

A weight is value[code] * absmax: a code has 4 bits, and the codebook has the 16 values. The kernels compute in float16
or bfloat16, below `dtype`, so the values have to be rounded. This is the kernels' largest error, and a systematic one:
the same value is wrong by the same amount everywhere. Therefore the values are first multiplied by the factor in [1, 2)
that makes the rounding error smallest. bfloat16's relative error falls from 1.06e-3 to 0.63e-3, float16's from 1.6e-4
to 0.65e-4.

Host contract, what `codebook` gives, with v = (value * factor) rounded to `dtype`:

    factor  float in [1, 2)
    table   int32 [11, 32]. Rows 0 to 9 hold one word each, 32 times, once for every lane:
            rows 0 .. 3   the low bytes of v[0] .. v[15], v[0] in the lowest byte of row 0
            rows 4 .. 7   their high bytes in the same order
            rows 8, 9     2^31 and 2^16, by which `decode` shifts
            row 10        the bits of v[0] .. v[15] in its first 16 places

Device contract, what the functions of the module `decode` do with the table:

    decode(word, ..)       Takes int32 [w, l, s] in the order of `tiles`, with the lane on axis 1.
                           Gives v[code], `dtype` [w, l, s, p, r, h]. Element (p, r, h) comes from nibble 4h + 2r + p
                           and stays in the lane that held the word.
    lookup(word, ..)       Gives the same bits in the same place.
    decode_scaled(word, absmax, ..)
                           Gives v[code] * absmax in the same place: absmax rounded to `dtype`, and the product too.

    decode_times(word, absmax0, absmax1, ..)
                           The same where blocks run along the outputs: absmax of each input, in pairs of `dtype` already.

None of them divides by the factor, or undoes the units of absmax (`Packed.absmax_factor`). The kernels do both at
once: they multiply their float32 sums by `Weight.unscale` = 1 / (factor * absmax_factor), before they add the bias.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from gptoss_nf4.format.codec import CODEBOOKS

CANDIDATES = 8192  # factors tried in [1, 2)
SIGNIFICAND_BITS = {torch.bfloat16: 8, torch.float16: 11}


@dataclass(frozen=True)
class Codebook:
    """The host contract above."""

    table: torch.Tensor
    factor: float


@cache
def codebook(quant_type: str, dtype: torch.dtype, device: torch.device) -> Codebook:
    """The codebook of `quant_type` (nf4 or fp4) for weights in `dtype` (float16 or bfloat16)."""
    factor = best_factor(quant_type, SIGNIFICAND_BITS[dtype])
    values = torch.from_numpy(CODEBOOKS[quant_type].astype(np.float64) * factor).to(dtype)
    low_and_high = values.view(torch.uint8).view(16, 2).t().contiguous().view(torch.int32).flatten()
    shifts = torch.tensor([-(1 << 31), 1 << 16], dtype=torch.int32, device="cpu")  # whatever the default device is
    for_all_lanes = torch.cat((low_and_high, shifts))[:, None].repeat(1, 32)
    bits = torch.nn.functional.pad(values.view(torch.int16).to(torch.int32) & 0xFFFF, (0, 16))
    return Codebook(torch.cat((for_all_lanes, bits[None])).to(device), factor)


def best_factor(quant_type: str, bits: int) -> float:
    """The factor in [1, 2) that makes the mean squared error of the codebook smallest, rounded to `bits` bits."""
    values = CODEBOOKS[quant_type].astype(np.float64)
    factors = 1 + np.arange(CANDIDATES) / CANDIDATES
    scaled = values * factors[:, None]
    errors = np.square((_rounded(scaled, bits) - scaled) / factors[:, None]).sum(axis=1)
    return float(factors[errors.argmin()])


def _rounded(values: np.ndarray, bits: int) -> np.ndarray:
    """float64 `values` with significands of `bits` bits, rounded to nearest even."""
    fraction, exponent = np.frexp(values)
    return np.ldexp(np.round(np.ldexp(fraction, bits)), exponent - bits)
