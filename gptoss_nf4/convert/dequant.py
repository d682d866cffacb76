"""Stage dequant: undoing the double quantization of one layer's absmax. Imports no torch."""

from gptoss_nf4.format.names import FUSIONS
from gptoss_nf4.source.interface import Source
from gptoss_nf4.storage.artifacts import Artifacts
from gptoss_nf4.storage.tensor_writer import Declared, writing_tensors


def dequant(source: Source, artifacts: Artifacts, layer: int) -> int:
    """Write the absmax of the layer's 4-bit modules, and return the size of the file in bytes.

    Each is float32 [blocks], under the canonical name of its weight.
    """
    modules = [module for fusion in FUSIONS for module in source.modules(layer, fusion)]
    blocks = {module: module.state.blocks for module in modules if module.state}
    declared = [Declared(module.weight, "F32", (count,)) for module, count in blocks.items()]
    with writing_tensors(artifacts.absmax(layer), declared) as out:
        for module in blocks:
            out.append(module.weight, source.absmax(module))
    return out.size
