"""The whole conversion, step by step; each step is one DVC stage, `convert` runs them in order without DVC."""

from gptoss_nf4.artifacts import Artifacts
from gptoss_nf4.assemble import assemble
from gptoss_nf4.checkpoint import Checkpoint
from gptoss_nf4.dtypes import audit, check_dtype, normalize
from gptoss_nf4.errors import UserError
from gptoss_nf4.fetch import Model, fetch, open_source
from gptoss_nf4.plan import EXACT, RequantOptions
from gptoss_nf4.source import SplitSource
from gptoss_nf4.steps import dequant_step, requant_step


def convert(model: Model, artifacts: Artifacts, options: RequantOptions, dtype: str, device: str = "cpu") -> dict:
    """Convert `model` into `artifacts.checkpoint` and return the exactness report."""
    fetch(model, artifacts)
    source = open_source(model, artifacts)
    for layer in range(source.dimensions.layers):
        dequant_step(source, artifacts, layer)
        requant_step(source, artifacts, layer, options, device)
    normalize(source, artifacts, options, dtype)
    return assemble_step(source, artifacts, options, dtype)


def assemble_step(source: SplitSource, artifacts: Artifacts, options: RequantOptions, dtype: str) -> dict:
    """Write the checkpoint's own files, audit its dtypes and compare every weight; returns the report."""
    from gptoss_nf4.proof import compare  # bitsandbytes takes seconds to import

    assemble(source, artifacts, options, check_dtype(dtype))
    result = Checkpoint(artifacts.checkpoint)
    floating = audit(result, dtype)
    return {**compare(source, result, options, dtype), "floating_tensors": floating}


def require_exact(report: dict, options: RequantOptions, artifacts: Artifacts) -> None:
    """Raise a UserError where mode exact changed a weight."""
    if options.mode == EXACT and report["different"]:
        raise UserError(
            "the result is not exact", where=artifacts.checkpoint, got=f"{report['different']} different weights",
            expected="0", next_step="run `dvc repro -f assemble`; if it stays, report it",
        )  # fmt: skip
