"""The dimension of a weight along which blocks run, and turning 4-bit codes from one to the other.

A block is `blocksize` neighbouring weights that share an absmax. bitsandbytes lets blocks run through the flat tensor. It
stores a linear layer as [out, in], so there they run along the *inputs*. It stores fused experts as transformers has them,
[experts, in, out], so there they run along the *outputs*.

The kernels, and everything that serves, read codes in rows of outputs whatever the direction. Turning moves each code and
changes none, so no weight changes. absmax is turned with them: of a weight [out, in] it is [out, in / blocksize] in one
direction and [out / blocksize, in] in the other.
"""

import numpy as np

INPUTS = "inputs"
OUTPUTS = "outputs"
DIRECTIONS = (INPUTS, OUTPUTS)


def absmax_shape(shape: tuple[int, ...], blocksize: int, blocks_along: str) -> tuple[int, ...]:
    """Shape of the absmax of a weight [..., out, in] whose codes lie in rows of outputs.

    The dimension along which blocks run is a multiple of blocksize.
    """
    *experts, rows, columns = shape
    if blocks_along == OUTPUTS:
        return (*experts, rows // blocksize, columns)
    return (*experts, rows, columns // blocksize)


def state_shape(shape: tuple[int, ...], blocks_along: str) -> tuple[int, ...]:
    """The shape in bitsandbytes' state of a weight [..., out, in]: that of the tensor whose blocks run along its rows."""
    *experts, rows, columns = shape
    return (*experts, columns, rows) if blocks_along == OUTPUTS else shape


def rows_of_outputs(packed: np.ndarray, absmax: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Turn flat storage of a transposed weight into rows of outputs.

    Args:
        packed: uint8, elements / 2 bytes in any shape: the codes of [in, out], two neighbouring outputs in a byte, the
            first in the high nibble.
        absmax: float32 [in * out / blocksize], blocks along the outputs.
        shape: logical [out, in] of the weight; out a multiple of the blocksize, in a multiple of 2.

    Returns:
        uint8 [out, in / 2], two neighbouring inputs in a byte, the first in the high nibble; and float32
        [out / blocksize, in].
    """
    rows, columns = shape
    even, odd = packed.reshape(columns // 2, 2, rows // 2).swapaxes(0, 1)  # of the inputs; a byte holds two outputs of one
    codes = np.empty((rows // 2, 2, columns // 2), np.uint8)
    codes[:, 0] = ((even & 0xF0) | (odd >> 4)).T
    codes[:, 1] = ((even << 4) | (odd & 0x0F)).T
    return codes.reshape(rows, columns // 2), np.ascontiguousarray(absmax.reshape(columns, -1).T)
