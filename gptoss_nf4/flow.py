"""The whole conversion without DVC: each call is one stage."""

from dataclasses import replace

from gptoss_nf4.adapters.adapter import Adapter
from gptoss_nf4.check.audit import audit
from gptoss_nf4.check.merge import changed_weights, losses, require_merged
from gptoss_nf4.convert.assemble import assemble
from gptoss_nf4.convert.dequant import dequant
from gptoss_nf4.convert.merge import Merge
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
    adapter: Adapter | None = None,
) -> dict:
    """Convert `model` into the checkpoint directory `artifacts.checkpoint`.

    Args:
        dtype: of everything that is not 4-bit: "float16", "bfloat16" or "float32".
        residual_scale: "auto" or a power of two up to 1; see `format/residual.py`.
        device: torch's, where mode nf4 quantizes. Mode exact does not use it.
        adapter: merged into the weights. `options.merge` is its name.

    Returns:
        What the proof counted (`proof.prove.Exactness.as_dict`), and `floating_tensors`: their number by safetensors dtype.
        With an adapter also `merge`: what quantizing again lost of it, see `check.merge.losses`.

    Raises:
        UserError: for a source, a setting or a machine with which this cannot be done, and for a result that the proof
            does not find to be the source, with the adapter if there is one.
    """
    fetch(model, artifacts)
    source = open_source(model, artifacts)
    require_plan(source, options)
    merge = Merge(adapter, source.dimensions) if adapter else None
    for layer in range(source.dimensions.layers):
        dequant(source, artifacts, layer)
        requant(source, artifacts, layer, options, device, merge)
    normalize(source, artifacts, options, dtype, residual_scale, merge)
    assemble(source, artifacts, options, dtype, residual_scale, merge)
    checkpoint = Checkpoint(artifacts.checkpoint)
    floating = audit(checkpoint, dtype)
    asked = Asked(options.mode, options.w13_order, options.quant_type, options.blocksize, dtype, residual_scale)
    if merge:
        asked = replace(
            asked, merged_adapter=merge.recorded(str(options.merge)), changed=changed_weights(source, merge, options)
        )
    proof = prove(source_directory(model, artifacts), artifacts.checkpoint, asked)
    require_proved(proof, artifacts.checkpoint)
    found = {**proof.as_dict(), "floating_tensors": floating}
    if merge is None:
        return found
    lost = losses(source, checkpoint, merge, options, dtype)
    require_merged(lost, artifacts.checkpoint)
    return found | {"merge": lost}
