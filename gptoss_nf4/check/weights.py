"""Weights as bitsandbytes reads them: what proofs and references rest on. None of our own codec is used here."""

from collections.abc import Iterable

import torch
from bitsandbytes.functional import QuantState

from gptoss_nf4.format import names
from gptoss_nf4.format.bnb import dequantize_float32
from gptoss_nf4.format.quant_state import QUANT_TYPES
from gptoss_nf4.source.interface import Module, Source
from gptoss_nf4.storage.checkpoint import Checkpoint


def source_weight(source: Source, module: Module) -> torch.Tensor:
    """The weight of one module of a source, float32 [rows, in_features]."""
    if module.state is None:
        return source.floating(module.weight).tensor().float()
    stored = source.stored(module)
    weight = stored.pop("weight")
    return dequantize_float32(source.checkpoint.torch(weight), _state(source.checkpoint, stored.values()))


def stored_weight(checkpoint: Checkpoint, weight: str, scale: float = 1.0) -> torch.Tensor:
    """A weight whose sidecars, if it is 4-bit, lie beside it under bitsandbytes' names: float32 of its shape.

    absmax is multiplied by `scale`, as the plugin does with what writes to the residual stream.
    """
    if f"{weight}.absmax" not in checkpoint.tensors:
        return checkpoint.torch(weight).float()
    return dequantize_float32(checkpoint.torch(weight), stored_state(checkpoint, weight, scale))


def stored_state(checkpoint: Checkpoint, weight: str, scale: float = 1.0) -> QuantState:
    """bitsandbytes' own QuantState of `weight`; with float32 absmax times `scale`."""
    states = (names.STATE_PREFIX + quant_type for quant_type in QUANT_TYPES)
    kinds = (*names.SIDECARS, *names.NESTED_SIDECARS, *states)
    state = _state(checkpoint, [name for kind in kinds if (name := f"{weight}.{kind}") in checkpoint.tensors])
    if scale != 1:
        state.absmax = state.absmax * scale
    return state


def _state(checkpoint: Checkpoint, sidecars: Iterable[str]) -> QuantState:
    """By `QuantState.from_dict`, which changes the dictionary that it gets."""
    return QuantState.from_dict({name: checkpoint.torch(name) for name in sidecars}, device=torch.device("cpu"))
