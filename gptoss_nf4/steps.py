"""The two per-layer steps of a conversion, from files to files; in mode exact neither imports torch."""

from safetensors.numpy import load_file

from gptoss_nf4.artifacts import Artifacts, write_tensors
from gptoss_nf4.files import describe_file, write_json
from gptoss_nf4.names import FUSIONS
from gptoss_nf4.plan import RequantOptions, plan_layer
from gptoss_nf4.requant import requant_layer
from gptoss_nf4.source import SplitSource


def dequant_step(source: SplitSource, artifacts: Artifacts, layer: int) -> int:
    """Write the layer's absmax as float32; returns the number of weights."""
    modules = [module for fusion in FUSIONS for module in source.modules(layer, fusion) if module.state]
    write_tensors(artifacts.absmax(layer), {module.weight: source.absmax(module) for module in modules})
    return len(modules)


def requant_step(source: SplitSource, artifacts: Artifacts, layer: int, options: RequantOptions, device: str) -> int:
    """Write the layer's fused 4-bit tensors and its report; returns the bytes written."""
    targets = plan_layer(source, layer, options)
    absmax = load_file(artifacts.require(artifacts.absmax(layer), f"dequant@{layer}"))
    tensors, report = requant_layer(source, absmax, targets, options, device)
    write_tensors(artifacts.layer_weights(layer), tensors)
    # The file's digest makes this small report stand for the layer where later stages depend on it.
    file = describe_file(artifacts.layer_weights(layer))
    write_json(artifacts.report(layer), {"layer": layer, "mode": options.mode, **report, "file": file})
    return file["bytes"]
