"""One tensor of the result against those of the source that make it."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from gptoss_nf4.errors import UserError
from gptoss_nf4.proof.compare import INTERLEAVED, Difference, difference, places
from gptoss_nf4.proof.config import EXACT, Asked
from gptoss_nf4.proof.names import Pair
from gptoss_nf4.proof.stored import DTYPES, Dense, FourBit, Matrix, Tensors, TurnedFourBit, Values

NEXT_STEP = "run `dvc repro -f prove`, which converts again; if it stays, report it"


@dataclass(frozen=True)
class Fault:
    """A matrix or vector of the source's that is not what tensor `target` of the result has in its place."""

    target: str
    got: str


def pair_bytes(pair: Pair, before: Tensors, after: Tensors) -> int:
    """Bytes that comparing `pair` reads, on both sides."""
    return after.bytes(pair.target) + sum(before.bytes(name) for name in pair.sources)


def keeps_outputs_together(pair: Pair, before: Tensors, asked: Asked) -> bool:
    """Whether blocks of the pair's target run along the outputs. Those of fused 4-bit experts do, [experts, in, out].

    Mode exact keeps them.
    """
    return bool(asked.mode == EXACT and pair.fused and pair.entry.four_bit and before.four_bit(pair.sources[0]))


def compare_pair(
    pair: Pair, before: Tensors, after: Tensors, asked: Asked, advance: Callable[[int], None]
) -> tuple[Difference, list[Fault]]:
    """Compare a few rows at a time. Returns the sum, and a fault for each of the source's matrices that has one.

    Weights that a merged adapter changed are passed over.
    `advance` is told how many bytes were done. UserError for another shape or storage than the plugin reads.
    """
    matrices = deque(matrix for name in pair.sources for matrix in before.matrices(name, pair.fused))
    values = _result_values(pair, before, after, asked)
    _require_shape(pair, matrices, values)
    order = asked.w13_order if pair.entry.gate_and_up else INTERLEAVED
    size, done = pair_bytes(pair, before, after), 0
    total, faults = Difference(), []
    if isinstance(values, TurnedFourBit):
        matrices = deque(matrix.as_stored for matrix in matrices)
    rows_of_all, place = sum(matrix.rows for matrix in matrices), 0
    for number in range(len(matrices)):
        matrix = matrices.popleft()  # so that the absmax of one is held, not of all
        if pair.entry.kind.endswith("_weight") and (pair.target, number) in asked.changed:
            place += matrix.rows
            continue
        found, again = Difference(), _quantized_again(matrix, values, asked)
        if isinstance(values, TurnedFourBit):
            result = Matrix(pair.target, values.expert(number), 0, matrix.shape)
        else:
            result = Matrix(pair.target, values, place * matrix.columns, matrix.shape)
        for start in range(0, matrix.rows, matrix.rows_at_a_time):
            stop = min(start + matrix.rows_at_a_time, matrix.rows)
            # The first rows of each matrix are always compared as bitsandbytes dequantizes them.
            if start and order == INTERLEAVED and matrix.same_bytes(start, stop, result, start):
                found += Difference((stop - start) * matrix.columns)
            else:
                rows = matrix.read(start, stop)
                for which, lies_at in places(order, matrix.rows, start):
                    expected = rows[which]
                    found += difference(expected, result.read(lies_at, lies_at + len(expected)))
            reached = size * (place + stop) // rows_of_all
            advance(reached - done)
            done = reached
        place += matrix.rows
        total += found
        if again and found.unrelated_rows:
            got = f"{found.unrelated_rows} of {matrix.rows} rows that have nothing in common with {matrix.name}"
            faults.append(Fault(pair.target, got))
        if not again and found.different:
            faults.append(
                Fault(pair.target, f"{found.different} of {found.compared} values that differ from {matrix.name}")
            )
    advance(size - done)  # what was passed over at the end
    return total, faults


def _quantized_again(matrix: Matrix, values: Values | TurnedFourBit, asked: Asked) -> bool:
    """Whether the conversion changed the codes of `matrix`. A merge moves those of its own format, as mode exact does."""
    if not isinstance(values, FourBit) or asked.mode == EXACT:
        return False
    before = matrix.values
    movable = isinstance(before, FourBit) and before.blocks == values.blocks and not matrix.transposed
    return asked.merged_adapter is None or not movable


def _result_values(pair: Pair, before: Tensors, after: Tensors, asked: Asked) -> Values | TurnedFourBit:
    """The values of the pair's target. UserError where the plugin would not read them as they are stored."""
    name, dtype = pair.target, getattr(torch, asked.dtype)
    four_bit = pair.entry.four_bit
    if four_bit is None:
        four_bit = all(before.four_bit(source) for source in pair.sources)
    _require(name, "4-bit" if after.four_bit(name) else "dense", "4-bit" if four_bit else "dense")
    if not four_bit:
        values = Dense(after.stored[name])
        _require(name, values.dtype, dtype)
        return values
    # The plugin reads config.json and not the state, and absmax as it lies: float32, without double quantization.
    section, state = after.checkpoint.config["quantization_config"], after.state(name)
    _require(name, (state.quant_type, state.blocksize), (section["quant_type"], section["blocksize"]))
    _require(name, state.dtype, dtype)
    *others, columns = state.shape
    codes, absmax = (*others, columns // 2), (*others, columns // state.blocksize)
    turned = keeps_outputs_together(pair, before, asked)
    if turned:
        _require(name, len(state.shape), 3)
        experts, columns, rows = state.shape
        codes, absmax = (experts, rows, columns // 2), (experts, rows // state.blocksize, columns)
    for stored, expected in (
        (after.stored[name], (torch.uint8, codes)),
        (after.stored[f"{name}.absmax"], (torch.float32, absmax)),
    ):
        _require(stored.name, (DTYPES.get(stored.dtype, torch.uint8), stored.shape), expected)
    return TurnedFourBit(after.stored[name], state) if turned else FourBit.stored(after.stored[name], state)


def _require_shape(pair: Pair, matrices: Sequence[Matrix], values: Values | TurnedFourBit) -> None:
    """Experts are stacked along a new first dimension, and other matrices joined along their rows. UserError otherwise."""
    rows, *rest = matrices[0].shape
    stacked = ".experts." in pair.target
    for matrix in matrices:
        _require(matrix.name, matrix.shape, (rows if stacked else matrix.rows, *rest))
    joined = (len(matrices), rows) if stacked else (sum(matrix.rows for matrix in matrices),)
    _require(pair.target, values.shape, (*joined, *rest))


def _require(where: str, got: object, expected: object) -> None:
    if got != expected:
        raise UserError("not as the plugin reads it", where=where, got=got, expected=expected, next_step=NEXT_STEP)
