"""The two per-layer steps of a conversion, from files to files; in mode exact neither imports torch."""

from collections.abc import Iterator

import numpy as np

from gptoss_nf4.convert.plan import RequantOptions, Target, plan_layer
from gptoss_nf4.convert.requant import AddedError, requant_layer
from gptoss_nf4.format.names import FUSIONS
from gptoss_nf4.source.split import Module, SplitSource
from gptoss_nf4.storage.artifacts import Artifacts
from gptoss_nf4.storage.tensor_reader import read_array, read_header
from gptoss_nf4.storage.tensor_writer import Stream, write_tensors
from gptoss_nf4.storage.writing import write_json


def dequant_step(source: SplitSource, artifacts: Artifacts, layer: int) -> int:
    """Write the layer's absmax as float32; returns the bytes written."""
    modules = [module for fusion in FUSIONS for module in source.modules(layer, fusion) if module.state]

    def absmax(module: Module) -> Iterator[np.ndarray]:
        yield source.absmax(module)

    streams = [Stream(module.weight, "F32", (module.state.blocks,), absmax(module)) for module in modules]
    return write_tensors(artifacts.absmax(layer), streams)


def requant_step(source: SplitSource, artifacts: Artifacts, layer: int, options: RequantOptions, device: str) -> int:
    """Write the layer's fused 4-bit tensors and its report; returns the bytes written."""
    targets = plan_layer(source, layer, options)
    stored = read_header(artifacts.require(artifacts.absmax(layer), f"dequant@{layer}"))
    absmax = {name: read_array(info) for name, info in stored.items()}
    streams, errors = requant_layer(source, absmax, targets, options, device)
    size = write_tensors(artifacts.layer_weights(layer), streams)
    source.checkpoint.forget(source.tensors_by_layer[layer])
    report = {target.name: _describe(target, errors.get(target.name)) for target in targets}
    write_json(artifacts.report(layer), {"layer": layer, "mode": options.mode, "targets": report})
    return size


def _describe(target: Target, error: AddedError | None) -> dict:
    described = {"shape": target.shape, "quant_type": target.quant_type, "blocksize": target.blocksize}
    if not target.quantized:
        described["joined_dense"] = target.joined_dense
    return described | ({"added_error": error.as_dict()} if error else {})
