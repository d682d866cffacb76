"""From the checkpoint's tensors to the plugin's parameters: registering, sharding, and the check that all are filled."""

from collections.abc import Callable
from math import gcd

import torch
from vllm.config import get_current_vllm_config_or_none

from gptoss_nf4.errors import UserError
from gptoss_nf4.format.blocks import INPUTS
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
    """Register an empty parameter on `layer`. `load(parameter, tensor)` fills it; until then it is noted as unfilled."""
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
    """UserError for a parameter that no tensor of the checkpoint filled. vLLM itself would say nothing."""
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
    """Whether a layer created now, with activations in `dtype`, runs on our kernels. Its weights are packed then."""
    return torch.get_default_device().type == "cuda" and dtype in (torch.float16, torch.bfloat16)


def current_device() -> torch.device:
    """Where layers are made now."""
    return with_number(torch.get_default_device())


def with_number(device: torch.device) -> torch.device:
    """`device` as its tensors name it: "cuda" is the current one."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def most_tokens() -> int:
    """Tokens of the largest step that the engine makes."""
    config = get_current_vllm_config_or_none()
    return 1 if config is None else config.scheduler_config.max_num_batched_tokens


def blocksize_of_shard(blocksize: int, features: int, prefix: str, blocks_along: str = INPUTS) -> int:
    """The largest blocksize, up to `blocksize`, with which a rank's `features` are whole blocks. UserError if none is.

    `features` are those along which blocks run: inputs, or outputs. Both halves of a block have the same absmax. So halving
    the blocksize and repeating absmax is exact: 2880 / 2 = 1440 are 22.5 blocks of 64, but 45 of 32.
    """
    shard = gcd(blocksize, features)
    if shard not in BLOCKSIZES:
        raise UserError(
            "tensor parallel size does not fit",
            where=prefix,
            got=f"{features} {blocks_along} for each rank",
            expected=f"a multiple of {BLOCKSIZES[0]}",
            next_step="use a smaller tensor_parallel_size, or expert parallelism",
        )
    return shard


def repeat_absmax(absmax: torch.Tensor, blocksize: int, shard_blocksize: int, dim: int = -1) -> torch.Tensor:
    """absmax [..., blocks] of `blocksize` as [..., blocks * n] of `shard_blocksize`, where n is their quotient.

    `dim` is the dimension of the blocks: the last, or the last but one where they run along the outputs.
    """
    return absmax if blocksize == shard_blocksize else absmax.repeat_interleave(blocksize // shard_blocksize, dim=dim)


def require_packable(absmax: torch.Tensor, where: str) -> None:
    """UserError where absmax, float32 [...], has a value that the kernels' float16 cannot hold. Called before packing."""
    largest = float(absmax.abs().max()) if absmax.numel() else 0.0
    if not largest <= MAX_PACKED_ABSMAX:  # NaN too
        raise UserError(
            "absmax out of range",
            where=where,
            got=f"{largest:g}",
            expected=f"at most {MAX_PACKED_ABSMAX:g}",
            next_step="serve with --dtype float32, or check the weights: absmax of trained ones is far below 1",
        )
