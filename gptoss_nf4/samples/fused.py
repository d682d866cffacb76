"""The samples in the layout that newer Unsloth saves: the experts of a layer in one tensor, quantized as a whole.

bitsandbytes gets [experts, inputs, outputs], as transformers has it. So blocks run along the outputs, and the nested blocks
of absmax run from one expert into the next. The router lies flat, and biases are called `gate_up_proj_bias` and
`down_proj_bias`.
"""

from collections.abc import Iterator

import torch

from gptoss_nf4.format import names
from gptoss_nf4.format.dimensions import Dimensions
from gptoss_nf4.source.stored import ALIASES

STACKS = {names.W13: "mlp.experts.gate_up_proj", names.W2: "mlp.experts.down_proj"}
_FLAT = {alias: name for name, alias in ALIASES.items()}


def stacks(d: Dimensions, layer: int) -> Iterator[tuple[str, list[str], tuple[int, int, int]]]:
    """(stored name, canonical names of its experts, shape [experts, inputs, outputs]) of a layer's two stacks."""
    for fusion, name in STACKS.items():
        rows, columns = names.weight_shapes(d)[fusion.sources[0]]
        yield names.prefix(layer) + name, names.parts_of(fusion, layer, d.experts), (d.experts, columns, rows)


def stored_name(layer: int, name: str) -> str:
    """The name of a tensor that is no expert's, from that of the published layout."""
    prefix = names.prefix(layer)
    own = name.removeprefix(prefix)
    return prefix + _FLAT.get(own, own)


def stacked_biases(tensors: dict[str, torch.Tensor], d: Dimensions, layer: int) -> dict[str, torch.Tensor]:
    """The layer's tensors of the published layout, with its experts' biases stacked and without its experts' weights."""
    experts = {f"{module}." for _, modules, _ in stacks(d, layer) for module in modules}
    kept = {
        stored_name(layer, name): tensor
        for name, tensor in tensors.items()
        if not any(name.startswith(expert) for expert in experts)
    }
    biases = {
        f"{stack}_bias": torch.stack([tensors[f"{module}.bias"] for module in modules])
        for stack, modules, _ in stacks(d, layer)
    }
    return kept | biases
