"""The whole conversion without DVC: each line is one stage."""

from dataclasses import asdict

from gptoss_nf4.check.audit import audit
from gptoss_nf4.check.proof import compare
from gptoss_nf4.convert.assemble import assemble
from gptoss_nf4.convert.dequant import dequant
from gptoss_nf4.convert.normalize import normalize
from gptoss_nf4.convert.plan import RequantOptions
from gptoss_nf4.convert.requant import requant
from gptoss_nf4.fetch.fetch import fetch
from gptoss_nf4.format.residual import AUTO
from gptoss_nf4.source.model import Model, open_source
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
        dequant(source, artifacts, layer)
        requant(source, artifacts, layer, options, device)
    normalize(source, artifacts, options, dtype, residual_scale)
    assemble(source, artifacts, options, dtype, residual_scale)
    checkpoint = Checkpoint(artifacts.checkpoint)
    floating = audit(checkpoint, dtype)
    proof = compare(source, checkpoint, options, dtype)
    return {**asdict(proof), "floating_tensors": floating}
