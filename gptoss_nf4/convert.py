"""The whole conversion without DVC: each line is one stage."""

from dataclasses import asdict

from gptoss_nf4.artifacts import Artifacts
from gptoss_nf4.assemble import assemble
from gptoss_nf4.checkpoint import Checkpoint
from gptoss_nf4.dtypes import normalize
from gptoss_nf4.fetch import Model, fetch, open_source
from gptoss_nf4.plan import RequantOptions
from gptoss_nf4.proof import compare
from gptoss_nf4.residual import AUTO
from gptoss_nf4.steps import dequant_step, requant_step


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
