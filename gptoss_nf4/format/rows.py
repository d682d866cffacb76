"""Moving whole rows: the exact half of the conversion, pure functions on arrays or tensors.

A block of `blocksize` weights runs along a row, so where in_features is a multiple of blocksize no block crosses a
row, and rows can be stacked, joined and re-ordered together with their absmax without changing a single weight.
"""

from collections.abc import Sequence

import numpy as np

INTERLEAVED = "interleaved"
CONCATENATED = "concatenated"
W13_ORDERS = (INTERLEAVED, CONCATENATED)


def rows_of_blocks(packed: np.ndarray, absmax: np.ndarray, shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """View flat bitsandbytes storage as rows.

    Args:
        packed: uint8, elements / 2 bytes in any shape (bitsandbytes stores [n, 1]).
        absmax: float32 [rows * in_features / blocksize].
        shape: logical [rows, in_features], in_features a multiple of the blocksize.

    Returns:
        uint8 [rows, in_features / 2] and float32 [rows, in_features / blocksize].
    """
    return packed.reshape(shape[0], -1), absmax.reshape(shape[0], -1)


def w13_rows(order: str, rows: int) -> np.ndarray:
    """Which stored row comes where: int64 [rows], for `stored[..., w13_rows(order, rows), ...]`.

    The source stores gate and up interleaved (gate in even rows: transformers `modeling_gpt_oss.py`). `interleaved`
    keeps that, as vLLM's swigluoai wants it; `concatenated` puts all gate rows before all up rows. The classic
    mistake is to take the stored halves for gate and up.
    """
    numbers = np.arange(rows)
    if order == INTERLEAVED:
        return numbers
    if order == CONCATENATED:
        return np.concatenate([numbers[0::2], numbers[1::2]])
    raise ValueError(f"{order=} is none of {W13_ORDERS}")


def interleaved_rows(order: str, rows: int) -> np.ndarray:
    """The inverse of `w13_rows`: int64 [rows] that brings rows stored in `order` back to interleaved."""
    return np.argsort(w13_rows(order, rows))
