"""What one layer of the source becomes: which modules are 4-bit, and which stay dense. Only headers and states are read."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import gcd

import numpy as np

from gptoss_nf4.errors import UserError
from gptoss_nf4.format import names
from gptoss_nf4.format.blocks import INPUTS, OUTPUTS, state_shape
from gptoss_nf4.format.quant_state import BLOCKSIZES, QUANT_TYPES, QuantState
from gptoss_nf4.format.rows import INTERLEAVED, W13_ORDERS, w13_rows
from gptoss_nf4.source.interface import Module, Source, becomes_dense

EXACT = "exact"
NF4 = "nf4"
MODES = (EXACT, NF4)


@dataclass(frozen=True)
class RequantOptions:
    """Section `requant` of params.yaml. UserError for a bad value.

    `quant_type` and `blocksize` are for mode nf4. `merge` names the adapter that is merged, None for none.
    """

    mode: str = EXACT
    w13_order: str = INTERLEAVED
    quant_type: str = "nf4"
    blocksize: int = 64
    merge: str | None = None

    @classmethod
    def of(cls, section: Mapping) -> "RequantOptions":
        """Read the `requant` section. Its `device` is left out: it says where to compute, not what."""
        keys = {field.name for field in fields(cls)}
        if not isinstance(section, Mapping) or section.keys() - {*keys, "device"}:
            raise UserError(
                "bad setting",
                where="requant",
                got=sorted(section) if isinstance(section, Mapping) else section,
                expected=f"the keys {', '.join(sorted(keys))}",
                next_step="run `python stages/configure.py model=...`, which makes params.yaml",
            )
        return cls(**{key: value for key, value in section.items() if key != "device"})

    def __post_init__(self) -> None:
        choices = {"mode": MODES, "w13_order": W13_ORDERS, "quant_type": QUANT_TYPES, "blocksize": BLOCKSIZES}
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise UserError(
                    "bad setting",
                    where=f"requant.{key}",
                    got=repr(getattr(self, key)),
                    expected=f"one of {allowed}",
                    next_step=f"run `python stages/configure.py requant.{key}={allowed[0]}`, or with another of these",
                )
        if self.merge is not None and self.mode == EXACT:
            raise UserError(
                "bad setting",
                where="requant.merge",
                got=f"{self.merge} with requant.mode={EXACT}",
                expected=f"requant.mode={NF4}, since merged weights have to be quantized again",
                next_step=f"pass requant.mode={NF4}, or requant.merge= and serve the adapter beside its base",
            )


@dataclass(frozen=True)
class Target:
    """A module of the fused checkpoint, and the source's modules that make it, in order. `name` is full."""

    name: str
    fusion: names.Fusion
    parts: tuple[Module, ...]

    @property
    def weight(self) -> str:
        return f"{self.name}.weight"

    @property
    def bias(self) -> str:
        return f"{self.name}.bias"

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical [experts, rows, in_features] or [rows, in_features]."""
        return names.fused_shape(self.fusion, [part.shape for part in self.parts])

    def row_order(self, w13_order: str) -> np.ndarray | slice:
        """Index that brings one part's rows into the target's order. Where they stay: a slice, which copies nothing."""
        if self.fusion != names.W13 or w13_order == INTERLEAVED:
            return slice(None)
        return w13_rows(w13_order, self.parts[0].shape[0])


@dataclass(frozen=True)
class QuantizedTarget(Target):
    """A target in 4 bit. Its codes lie in rows of outputs whatever the direction of blocks: see `format/blocks.py`."""

    quant_type: str
    blocksize: int
    blocks_along: str = INPUTS

    def state(self, dtype: str) -> QuantState:
        """bitsandbytes' state of the fused weight, without double quantization.

        Where blocks run along the outputs, it is the state of the weight after turning it back.
        """
        return QuantState(self.quant_type, self.blocksize, dtype, state_shape(self.shape, self.blocks_along))

    def holds(self, part: Module) -> bool:
        """Whether codes and absmax of `part`, one of the target's, can be moved into it as they are."""
        state = part.state
        return (
            state is not None
            and (state.quant_type, state.blocksize) == (self.quant_type, self.blocksize)
            and part.blocks_along == self.blocks_along
        )


@dataclass(frozen=True)
class DenseTarget(Target):
    """A target that is stored and served in the checkpoint's dtype."""

    @property
    def joined(self) -> bool:
        """Whether some parts are 4-bit: these are dequantized, since the others are not 4-bit."""
        return any(part.state for part in self.parts)


def require_plan(source: Source, options: RequantOptions) -> None:
    """UserError where the mode cannot convert some layer of `source`."""
    for layer in range(source.dimensions.layers):
        plan_layer(source, layer, options)


def plan_layer(source: Source, layer: int, options: RequantOptions) -> list[Target]:
    """The targets of one layer, in the order of `names.FUSIONS`. UserError where the mode cannot make one."""
    return [_plan_target(source, layer, fusion, options) for fusion in names.FUSIONS]


def _plan_target(source: Source, layer: int, fusion: names.Fusion, options: RequantOptions) -> Target:
    name, parts = names.target_of(fusion, layer), tuple(source.modules(layer, fusion))
    if becomes_dense(fusion, parts):
        return DenseTarget(name, fusion, parts)
    if options.mode == NF4:
        quant_type, blocksize, blocks_along = options.quant_type, options.blocksize, INPUTS
    else:
        quant_type, blocksize = _stored_quantization(source, name, parts, fusion.stacked)
        blocks_along = parts[0].blocks_along
    if blocks_along == OUTPUTS and fusion == names.W13 and options.w13_order != INTERLEAVED:
        raise UserError(
            "gate and up share blocks",
            where=name,
            got=f"requant.w13_order={options.w13_order} and blocks of {blocksize} outputs, half of them of gate",
            expected=f"requant.w13_order={INTERLEAVED}, since blocks are moved whole",
            next_step=f"pass requant.w13_order={INTERLEAVED}",
        )
    rows, columns = parts[0].shape
    blocked, features = ("out_features", rows) if blocks_along == OUTPUTS else ("in_features", columns)
    if features % blocksize or columns % 2:
        raise UserError(
            f"{'columns' if blocks_along == OUTPUTS else 'rows'} are not whole blocks",
            where=name,
            got=f"{blocked} {features} and blocksize {blocksize}" if features % blocksize else f"in_features {columns}",
            expected=f"a blocksize that divides {blocked}, since blocks are moved whole, and an even in_features",
            next_step=_advice(source),
        )
    return QuantizedTarget(name, fusion, parts, quant_type, blocksize, blocks_along)


def _stored_quantization(source: Source, name: str, parts: tuple[Module, ...], stacked: bool) -> tuple[str, int]:
    """(quant_type, blocksize) that the parts of a target share with the rest of the model. UserError where they do not.

    Their blocks have one direction, in what is not stacked that of the inputs.
    """
    dense = [part for part in parts if part.state is None]
    if dense:
        raise UserError(
            "experts that were never 4-bit" if len(dense) == len(parts) else "dense expert in a quantized layer",
            where=dense[0].name,
            got=f"{len(dense)} of {len(parts)} experts in 16 or 32 bit",
            expected="4-bit experts only in mode exact",
            next_step="use requant.mode=nf4, which quantizes them and reports the error",
        )
    across = [part for part in parts if part.blocks_along != (parts[0].blocks_along if stacked else INPUTS)]
    if across:
        raise UserError(
            "blocks run across rows",
            where=across[0].name,
            got=f"blocks of neighbouring {across[0].blocks_along}",
            expected=f"{'one direction in all experts' if stacked else 'blocks along the inputs'} in mode exact",
            next_step="use requant.mode=nf4, which quantizes again and reports the error",
        )
    states = {(part.state.quant_type, part.state.blocksize) for part in parts if part.state} | _states_of_model(source)
    if len(states) != 1:
        raise UserError(
            "mixed quantization",
            where=name,
            got=f"{sorted(states)} in one model",
            expected="one quantization type and one blocksize",
            next_step="use requant.mode=nf4, which quantizes all of it alike",
        )
    return states.pop()


def _states_of_model(source: Source) -> set[tuple[str, int]]:
    """(quant_type, blocksize) of the first expert of layer 0, which every other module must match.

    Empty where that expert is not 4-bit. Only its state is read, not those of all experts.
    """
    modules = names.modules_of(source.dimensions, 0)
    name, shape = next((name, shape) for fusion, name, shape in modules if fusion == names.W13)
    state = source.module(name, shape).state
    return {(state.quant_type, state.blocksize)} if state else set()


def _advice(source: Source) -> str:
    """The next step for a model whose rows are not whole blocks."""
    widths = gcd(*(shape[1] for shape in names.weight_shapes(source.dimensions).values()))
    fitting = [size for size in BLOCKSIZES if widths % size == 0]
    if fitting:
        return f"use requant.mode=nf4 requant.blocksize={fitting[-1]}, which quantizes again and reports the error"
    return f"no blocksize of bitsandbytes {BLOCKSIZES} divides every in_features of this model: it cannot be converted"
