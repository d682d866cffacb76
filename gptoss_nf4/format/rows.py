"""Moving whole rows, which changes no weight: pure functions on arrays.

A block of `blocksize` weights runs along a row. Where in_features is a multiple of blocksize, no block crosses into the
next row. Then rows can be stacked, joined and re-ordered together with their absmax.
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
    """Index, int64 [rows], that brings the source's rows of w13 into `order`: `stored[w13_rows(order, rows)]`.

    The source stores gate and up interleaved, with gate in the even rows (transformers `modeling_gpt_oss.py`).
    `interleaved` keeps that, as vLLM's swigluoai wants it. `concatenated` puts all gate rows before all up rows. The
    classic mistake is to take the two halves of the stored rows for gate and up.
    """
    numbers = np.arange(rows)
    if order == INTERLEAVED:
        return numbers
    if order == CONCATENATED:
        return np.concatenate([numbers[0::2], numbers[1::2]])
    raise ValueError(f"{order=} is none of {W13_ORDERS}")


def interleaved_rows(order: str, rows: int) -> np.ndarray:
    """Index, int64 [rows], that brings rows stored in `order` back to interleaved: the inverse of `w13_rows`."""
    return np.argsort(w13_rows(order, rows))
