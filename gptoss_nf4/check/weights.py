"""Weights as bitsandbytes dequantizes them. The reference rests on these, not on our own codec."""

from collections.abc import Iterable
from math import prod

import torch

from gptoss_nf4.eager_bnb import bnb
from gptoss_nf4.format import names
from gptoss_nf4.format.blocks import OUTPUTS
from gptoss_nf4.format.bnb import dequantize_float32
from gptoss_nf4.format.quant_state import QUANT_TYPES
from gptoss_nf4.format.result import directions
from gptoss_nf4.source.interface import Module, Source
from gptoss_nf4.storage.checkpoint import Checkpoint


def source_weight(source: Source, module: Module) -> torch.Tensor:
    """The weight of one module of a source, float32 [rows, in_features], 4-bit or not."""
    if module.state is None:
        return source.floating(module.weight).tensor().float()
    if module.blocks_along == OUTPUTS:
        return _expert_of_stack(source, module)
    stored = source.stored(module)
    weight = stored.pop("weight")
    return dequantize_float32(source.checkpoint.torch(weight), _state(source.checkpoint, stored.values()))


def _expert_of_stack(source: Source, module: Module) -> torch.Tensor:
    """The weight of one expert of a tensor [experts, in, out], which has one state for all: float32 [out, in]."""
    stored = source.stored(module)
    weight = stored.pop("weight")
    state = _state(source.checkpoint, stored.values())
    absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    number, elements = int(module.name.rpartition(".")[2]), prod(module.shape)
    blocks = elements // state.blocksize
    own = bnb.QuantState(
        absmax=absmax[number * blocks : (number + 1) * blocks],
        shape=torch.Size(module.shape[::-1]),
        blocksize=state.blocksize,
        quant_type=state.quant_type,
    )
    packed = source.checkpoint.raw(weight, number * elements // 2, (number + 1) * elements // 2)
    return dequantize_float32(torch.from_numpy(packed), own).T.contiguous()


def stored_weight(checkpoint: Checkpoint, weight: str) -> torch.Tensor:
    """A weight of a converted checkpoint, float32 of its logical shape. It is dequantized if absmax lies beside it."""
    if f"{weight}.absmax" not in checkpoint.tensors:
        return checkpoint.torch(weight).float()
    codes, state = checkpoint.torch(weight), stored_state(checkpoint, weight)
    where = checkpoint.directory / "config.json"
    along = directions(checkpoint.config.get("quantization_config") or {}, where)
    if along.get(weight.removesuffix(".weight")) != OUTPUTS:
        return dequantize_float32(codes, state)
    # Back to the order in which bitsandbytes reads them: [..., in, out].
    outputs = torch.stack((codes >> 4, codes & 15), -1).flatten(-2).transpose(-2, -1)
    state.absmax = state.absmax.transpose(-2, -1).contiguous()
    return dequantize_float32((outputs[..., 0::2] << 4 | outputs[..., 1::2]).contiguous(), state).transpose(-2, -1)


def stored_state(checkpoint: Checkpoint, weight: str) -> bnb.QuantState:
    """bitsandbytes' state of a 4-bit weight of a converted checkpoint."""
    states = (names.STATE_PREFIX + quant_type for quant_type in QUANT_TYPES)
    kinds = (*names.SIDECARS, *names.NESTED_SIDECARS, *states)
    sidecars = [name for kind in kinds if (name := f"{weight}.{kind}") in checkpoint.tensors]
    return _state(checkpoint, sidecars)


def _state(checkpoint: Checkpoint, sidecars: Iterable[str]) -> bnb.QuantState:
    """bitsandbytes' QuantState of the tensors named. Its `from_dict` empties what it gets, so it gets a new dictionary."""
    return bnb.QuantState.from_dict({name: checkpoint.torch(name) for name in sidecars}, device=torch.device("cpu"))
