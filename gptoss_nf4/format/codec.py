"""The NF4 codec: pure functions on arrays, equal bit for bit to bitsandbytes 0.50 (tests/test_codec.py).

Two 4-bit codes share a byte, the first element in the high nibble. A weight is `quant_map[code] * absmax[block]`;
with double quantization absmax itself is a byte: `nested_quant_map[byte] * nested_absmax[byte's block] + offset`.
"""

import numpy as np

# The values of the 16 codes. bitsandbytes' kernels have them built in and do not read a stored quant_map.
NF4_MAP = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    dtype=np.float32,
)  # fmt: skip
FP4_MAP = np.array(
    [
        0.0, 0.0052083334885537624, 0.6666666865348816, 1.0,
        0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
        0.0, -0.0052083334885537624, -0.6666666865348816, -1.0,
        -0.3333333432674408, -0.5, -0.1666666716337204, -0.25,
    ],
    dtype=np.float32,
)  # fmt: skip
CODEBOOKS = {"nf4": NF4_MAP, "fp4": FP4_MAP}


def denest_absmax(
    absmax: np.ndarray, nested_quant_map: np.ndarray, nested_absmax: np.ndarray, blocksize: int, offset: float
) -> np.ndarray:
    """Undo the double quantization of absmax.

    Args:
        absmax: uint8 [blocks].
        nested_quant_map: float32 [256].
        nested_absmax: float32 [ceil(blocks / blocksize)].
        blocksize: absmax bytes per nested_absmax value, in elements (256 in every published checkpoint).
        offset: the mean of absmax, which bitsandbytes subtracts before it quantizes absmax.

    Returns:
        float32 [blocks]. The two operations round to float32 in this order, as bitsandbytes' `dequantize_4bit` does.
    """
    values = nested_quant_map[absmax]
    whole = len(values) // blocksize
    values[: whole * blocksize].reshape(whole, blocksize)[:] *= nested_absmax[:whole, None]
    values[whole * blocksize :] *= nested_absmax[whole:]
    values += np.float32(offset)
    return values


def unpack_codes(packed: np.ndarray) -> np.ndarray:
    """uint8 [..., n] bytes to uint8 [..., 2n] codes 0..15, high nibble first."""
    return np.stack([packed >> 4, packed & 15], axis=-1).reshape(*packed.shape[:-1], -1)


def dequantize(
    packed: np.ndarray, absmax: np.ndarray, quant_map: np.ndarray, blocksize: int, shape: tuple[int, ...]
) -> np.ndarray:
    """Dequantize a weight. Blocks run through the flat weight, so a block may cross rows that are not whole blocks.

    Args:
        packed: uint8, elements / 2 bytes in any shape.
        absmax: float32 [ceil(elements / blocksize)].
        quant_map: float32 [16], the values of the codes.
        blocksize: weights per absmax value.
        shape: logical shape of the weight.

    Returns:
        float32 of `shape`.
    """
    values = quant_map[unpack_codes(packed.reshape(-1))]
    values *= np.repeat(absmax, blocksize)[: values.size]
    return values.reshape(shape)
