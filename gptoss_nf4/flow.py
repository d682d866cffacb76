"""The whole conversion without DVC: each line is one stage."""

from dataclasses import asdict

from gptoss_nf4.check.proof import compare
from gptoss_nf4.convert.assemble import assemble
from gptoss_nf4.convert.layers import dequant_step, requant_step
from gptoss_nf4.convert.normalize import normalize
from gptoss_nf4.convert.plan import RequantOptions
from gptoss_nf4.fetch.fetch import Model, fetch, open_source
from gptoss_nf4.format.residual import AUTO
from gptoss_nf4.storage.artifacts import Artifacts
from gptoss_nf4.storage.checkpoint import Checkpoint


def convert(
    model: Model,
    artifacts: Artifacts,
    options: RequantOptions,
    dtype: str,
    residual_scale: object = AUTO,
    device: str = "cpu",
) -> dict:
    """Convert `model` into `artifacts.checkpoint` and return what the proof and the audit found."""
    fetch(model, artifacts)
    source = open_source(model, artifacts)
    for layer in range(source.dimensions.layers):
        dequant_step(source, artifacts, layer)
        requant_step(source, artifacts, layer, options, device)
    normalize(source, artifacts, options, dtype, residual_scale)
    floating = assemble(source, artifacts, options, dtype, residual_scale)
    proof = compare(source, Checkpoint(artifacts.checkpoint), options, dtype)
    return {**asdict(proof), "floating_tensors": floating}
