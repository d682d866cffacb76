"""Weights as bitsandbytes dequantizes them. The reference rests on these, not on our own codec."""

from collections.abc import Iterable

import torch
from bitsandbytes.functional import QuantState

from gptoss_nf4.format import names
from gptoss_nf4.format.blocks import OUTPUTS
from gptoss_nf4.format.bnb import dequantize_float32
from gptoss_nf4.format.quant_state import QUANT_TYPES
from gptoss_nf4.source.interface import Module, Source
from gptoss_nf4.storage.checkpoint import Checkpoint


def source_weight(source: Source, module: Module) -> torch.Tensor:
    """The weight of one module of a source, float32 [rows, in_features], 4-bit or not."""
    if module.state is None:
        return source.floating(module.weight).tensor().float()
    if module.blocks_along == OUTPUTS:  # a part of a tensor, which has no state of its own
        return torch.from_numpy(source.dequantized(module))
    stored = source.stored(module)
    weight = stored.pop("weight")
    return dequantize_float32(source.checkpoint.torch(weight), _state(source.checkpoint, stored.values()))


def stored_weight(checkpoint: Checkpoint, weight: str) -> torch.Tensor:
    """A weight of a converted checkpoint, float32 of its logical shape. It is dequantized if absmax lies beside it."""
    if f"{weight}.absmax" not in checkpoint.tensors:
        return checkpoint.torch(weight).float()
    return dequantize_float32(checkpoint.torch(weight), stored_state(checkpoint, weight))


def stored_state(checkpoint: Checkpoint, weight: str) -> QuantState:
    """bitsandbytes' state of a 4-bit weight of a converted checkpoint."""
    states = (names.STATE_PREFIX + quant_type for quant_type in QUANT_TYPES)
    kinds = (*names.SIDECARS, *names.NESTED_SIDECARS, *states)
    sidecars = [name for kind in kinds if (name := f"{weight}.{kind}") in checkpoint.tensors]
    return _state(checkpoint, sidecars)


def _state(checkpoint: Checkpoint, sidecars: Iterable[str]) -> QuantState:
    """bitsandbytes' QuantState of the tensors named. Its `from_dict` empties what it gets, so it gets a new dictionary."""
    return QuantState.from_dict({name: checkpoint.torch(name) for name in sidecars}, device=torch.device("cpu"))
