"""Weights on their way from the checkpoint to the plugin's parameters: sharding, and the check that all arrived."""

from collections.abc import Callable
from math import gcd

import torch
from vllm.config import get_current_vllm_config_or_none

from gptoss_nf4.errors import UserError
from gptoss_nf4.format.quant_state import BLOCKSIZES
from gptoss_nf4.vllm.kernels.tiles import MAX_PACKED_ABSMAX

Loader = Callable[..., None]


def register_parameter(
    layer: torch.nn.Module,
    prefix: str,
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    load: Loader,
    **attributes: object,
) -> None:
    """Register an empty parameter on `layer` that `load(parameter, tensor)` fills, and note that it is still empty."""
    parameter = torch.nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
    unfilled = layer.__dict__.setdefault("nf4_unfilled", set())
    unfilled.add(f"{prefix}.{name}")

    def load_and_note(parameter: torch.nn.Parameter, tensor: torch.Tensor, *args: object, **kwargs: object) -> None:
        load(parameter, tensor, *args, **kwargs)
        unfilled.discard(f"{prefix}.{name}")

    for key, value in (attributes | {"weight_loader": load_and_note}).items():
        setattr(parameter, key, value)
    layer.register_parameter(name, parameter)


def require_filled(layer: torch.nn.Module) -> None:
    """Raise a UserError that names a parameter which no tensor of the checkpoint filled (vLLM stays silent there)."""
    config = get_current_vllm_config_or_none()
    if config is not None and config.load_config.load_format == "dummy":
        return
    unfilled = sorted(layer.nf4_unfilled)
    if unfilled:
        raise UserError(
            "parameter not loaded",
            where=unfilled[0],
            got="no tensor that fills it",
            expected="a tensor of the checkpoint that fills it",
            next_step="convert the checkpoint again with this version of gptoss-nf4",
        )


def runs_on_kernels(dtype: torch.dtype) -> bool:
    """Whether a layer created now, with activations in `dtype`, runs on our kernels and wants its weights packed."""
    return torch.get_default_device().type == "cuda" and dtype in (torch.float16, torch.bfloat16)


def blocksize_of_shard(blocksize: int, in_features: int, prefix: str) -> int:
    """The blocksize with which a rank's `in_features` are whole blocks.

    A cut through a block leaves both halves with the same absmax, so halving the blocksize and repeating absmax is
    exact: 2880 / 2 = 1440 is 22.5 blocks of 64, but 45 of 32.
    """
    shard = gcd(blocksize, in_features)
    if shard not in BLOCKSIZES:
        raise UserError(
            "tensor parallel size does not fit",
            where=prefix,
            got=f"{in_features} inputs a rank",
            expected=f"a multiple of {BLOCKSIZES[0]}",
            next_step="use a smaller tensor_parallel_size, or expert parallelism",
        )
    return shard


def repeat_absmax(absmax: torch.Tensor, blocksize: int, shard_blocksize: int) -> torch.Tensor:
    """absmax [..., blocks] for blocks of `blocksize` as [..., blocks * n] for blocks of `shard_blocksize`."""
    return absmax if blocksize == shard_blocksize else absmax.repeat_interleave(blocksize // shard_blocksize, dim=-1)


def require_packable(absmax: torch.Tensor, where: str) -> None:
    """Refuse an absmax float32 [...] that the kernels' float16 cannot hold, before it is packed."""
    largest = float(absmax.abs().max()) if absmax.numel() else 0.0
    if not largest <= MAX_PACKED_ABSMAX:  # NaN too
        raise UserError(
            "absmax out of range",
            where=where,
            got=f"{largest:g}",
            expected=f"at most {MAX_PACKED_ABSMAX:g}",
            next_step="serve it in float32 (dtype=float32), or look at the weights: trained ones are far below 1",
        )
