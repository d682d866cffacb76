"""The whole conversion without DVC: each call is one stage."""

from gptoss_nf4.check.audit import audit
from gptoss_nf4.convert.assemble import assemble
from gptoss_nf4.convert.dequant import dequant
from gptoss_nf4.convert.normalize import normalize
from gptoss_nf4.convert.plan import RequantOptions, require_plan
from gptoss_nf4.convert.requant import requant
from gptoss_nf4.fetch.fetch import fetch
from gptoss_nf4.format.residual import AUTO
from gptoss_nf4.proof.config import Asked
from gptoss_nf4.proof.prove import prove, require_proved
from gptoss_nf4.source.model import Model, open_source, source_directory
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
        What the proof counted (`proof.prove.Exactness.as_dict`), and `floating_tensors`: their number by safetensors dtype.

    Raises:
        UserError: for a source, a setting or a machine with which this cannot be done, and for a result that the proof
            does not find to be the source.
    """
    fetch(model, artifacts)
    source = open_source(model, artifacts)
    require_plan(source, options)
    for layer in range(source.dimensions.layers):
        dequant(source, artifacts, layer)
        requant(source, artifacts, layer, options, device)
    normalize(source, artifacts, options, dtype, residual_scale)
    assemble(source, artifacts, options, dtype, residual_scale)
    floating = audit(Checkpoint(artifacts.checkpoint), dtype)
    asked = Asked(options.mode, options.w13_order, options.quant_type, options.blocksize, dtype, residual_scale)
    proof = prove(source_directory(model, artifacts), artifacts.checkpoint, asked)
    require_proved(proof, artifacts.checkpoint)
    return {**proof.as_dict(), "floating_tensors": floating}
