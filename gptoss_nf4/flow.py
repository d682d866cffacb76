"""The whole conversion without DVC: each call is one stage."""

from dataclasses import asdict

from gptoss_nf4.check.audit import audit
from gptoss_nf4.check.proof import compare
from gptoss_nf4.convert.assemble import assemble
from gptoss_nf4.convert.dequant import dequant
from gptoss_nf4.convert.normalize import normalize
from gptoss_nf4.convert.plan import RequantOptions, require_plan
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
    """Convert `model` into the checkpoint directory `artifacts.checkpoint`.

    Args:
        dtype: of everything that is not 4-bit: "float16", "bfloat16" or "float32".
        residual_scale: "auto" or a power of two up to 1; see `format/residual.py`.
        device: torch's, where mode nf4 quantizes. Mode exact does not use it.

    Returns:
        The fields of `Comparison`, which the proof counted, and `floating_tensors`: their number by safetensors dtype. A
        weight that differs is counted, not raised: see `check.proof.require_exact`.

    Raises:
        UserError: for a source, a setting or a machine with which this cannot be done.
    """
    fetch(model, artifacts)
    source = open_source(model, artifacts)
    require_plan(source, options)
    for layer in range(source.dimensions.layers):
        dequant(source, artifacts, layer)
        requant(source, artifacts, layer, options, device)
    normalize(source, artifacts, options, dtype, residual_scale)
    assemble(source, artifacts, options, dtype, residual_scale)
    checkpoint = Checkpoint(artifacts.checkpoint)
    floating = audit(checkpoint, dtype)
    proof = compare(source, checkpoint, options, dtype)
    return {**asdict(proof), "floating_tensors": floating}
