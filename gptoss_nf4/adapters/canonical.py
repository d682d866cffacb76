"""The canonical form of a delta: lora_A and lora_B in float32, for one module of the base, with the scale in lora_B."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import isfinite

import torch

from gptoss_nf4.adapters.config import AdapterConfig
from gptoss_nf4.adapters.resolve import Factors, Module, resolve
from gptoss_nf4.errors import UserError
from gptoss_nf4.format.dimensions import Dimensions

Read = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Delta:
    """What an adapter adds to one weight of the base: `weight += b @ a`.

    The rows of w13 are in the base's order, gate and up interleaved. Experts of one module share r, the largest rank among
    them. The factors of a smaller rank are padded with zeros, and those of an expert without a delta are all zeros.
    """

    name: str
    """Full name of the target, such as `model.layers.0.self_attn.q_proj` or `model.layers.0.mlp.experts.w13`."""
    a: torch.Tensor
    """lora_A, float32 [r, in]; with experts [E, r, in]."""
    b: torch.Tensor
    """lora_B times the scale, float32 [out, r]; with experts [E, out, r]."""

    def frobenius_norm(self) -> float:
        """Root of the sum of squares of b @ a, over all experts, without forming the product.

        |B A|^2 = trace(A^T B^T B A) = the sum of the elements of (B^T B) * (A A^T), two [r, r] matrices, in float64.
        """
        a, b = self.a.double(), self.b.double()
        square = ((b.mT @ b) * (a @ a.mT)).sum()
        return float(square.clamp(min=0).sqrt())


def deltas(
    config: AdapterConfig, tensors: Mapping[str, torch.Tensor], d: Dimensions, where: object = "adapter"
) -> Iterator[Delta]:
    """The deltas of an adapter whose tensors are in memory, layer by layer.

    Keys may have PEFT's prefix `base_model.model.` or not. Tensors may have any floating dtype. UserError, which calls the
    adapter `where`, for all that `resolve` and `delta_of` refuse.
    """
    by_layer = resolve(config, {key: tensor.shape for key, tensor in tensors.items()}, d, where)
    return (delta_of(module, tensors.__getitem__, where) for modules in by_layer.values() for module in modules)


def delta_of(module: Module, read: Read, where: object) -> Delta:
    """Read the tensors of one module and bring them into canonical form. UserError for a value that is not finite."""

    def values(key: str) -> torch.Tensor:
        stored = read(key)
        tensor = stored.float()  # before the check, since a float64 value may overflow here
        smallest, largest = tensor.aminmax()  # NaN if any value is
        if not stored.is_floating_point() or not (isfinite(smallest) and isfinite(largest)):
            raise UserError(
                "bad values",
                where=where,
                got=f"{stored.dtype} {key[:200]}" + (", not all finite" if stored.is_floating_point() else ""),
                expected="finite floating-point numbers",
                next_step="use a checkpoint saved before training went wrong",
            )
        return tensor

    first = module.factors[0]
    if module.experts is None:
        return Delta(module.name, values(first.a), values(first.b) * first.scale)
    if first.expert is None:
        a, b = _by_expert(first, values(first.a), values(first.b), module.experts)
        return Delta(module.name, a, b * first.scale)
    read_factors = [(factors, values(factors.a), values(factors.b) * factors.scale) for factors in module.factors]
    rank = max(factors.rank for factors in module.factors)
    out_features, in_features = module.shape
    device = read_factors[0][1].device
    stacked_a = torch.zeros(module.experts, rank, in_features, device=device)
    stacked_b = torch.zeros(module.experts, out_features, rank, device=device)
    for factors, a, b in read_factors:
        stacked_a[factors.expert, : factors.rank] = a
        stacked_b[factors.expert, :, : factors.rank] = b
    return Delta(module.name, stacked_a, stacked_b)


def _by_expert(factors: Factors, a: torch.Tensor, b: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All experts' lora_A [E * r, x] and lora_B [y, r * E] as [E, r, in] and [E, out, r]. Swapped: x is out, y is in."""
    a = a.reshape(experts, factors.rank, -1)  # rows of lora_A are grouped by expert in every order
    if factors.grouped_by_expert:
        b = b.reshape(-1, experts, factors.rank).permute(1, 0, 2)
    else:
        b = b.reshape(-1, factors.rank, experts).permute(2, 0, 1)
    if factors.swapped:  # the pair is that of the transposed weight: (B A)^T = A^T B^T
        a, b = b.mT, a.mT
    return a.contiguous(), b.contiguous()
