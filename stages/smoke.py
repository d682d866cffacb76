"""smoke: generate with vLLM and compare with transformers in float32."""

import sys
from pathlib import Path

from common import METRICS, engine_of, model_of, stage
from merging import merge_of
from omegaconf import DictConfig
from torch.nn import Module

from gptoss_nf4.adapters.adapter import Adapter
from gptoss_nf4.check import reference
from gptoss_nf4.check.agreement import Agreement, Generation
from gptoss_nf4.convert.plan import EXACT
from gptoss_nf4.engine.generate import generate
from gptoss_nf4.errors import UserError
from gptoss_nf4.format.residual import AUTO_FLOAT16, SMALLEST, scale_of
from gptoss_nf4.source.interface import Source
from gptoss_nf4.source.model import open_source
from gptoss_nf4.storage.reading import read_json_object
from gptoss_nf4.storage.writing import write_json

GIB = 1 << 30


def require_finite(generations: list[Generation], checkpoint: Path) -> None:
    """UserError where the engine computed NaN or infinity. It says what helps if the residual stream left float16."""
    bad = [generation for generation in generations if not generation.finite]
    if bad:
        raise UserError(
            "log-probabilities are not finite",
            where=checkpoint,
            expected="finite log-probabilities",
            got=f"NaN or infinity for {len(bad)} of {len(generations)} prompts",
            next_step=advice(checkpoint),
        )


def advice(checkpoint: Path) -> str:
    """What helps where the residual stream leaves the dtype's range: a smaller residual_scale than now, or bfloat16."""
    config_file = checkpoint / "config.json"
    scale = scale_of(read_json_object(config_file)["quantization_config"], config_file)
    more_room = "residual_scale=auto" if scale > AUTO_FLOAT16 else f"residual_scale={max(scale / 16, SMALLEST)!r}"
    return f"residual_scale is {scale!r}: configure with {more_room}, or with dtype=bfloat16, and run `dvc repro`"


def compare(source: Source, adapter: Adapter | None, generations: list[Generation], limit_gib: float) -> dict:
    """Agreement with the reference. Where that would need more than `limit_gib` of memory: why it was skipped.

    Where `adapter` was merged, the reference is the source with the adapter beside it, and `without_adapter` is the
    agreement with the source alone: what to compare with to see how much of the adapter is left.
    """
    needed = reference.float32_bytes(source.dimensions) / GIB
    if needed > limit_gib:
        return {"skipped": f"a float32 reference needs {needed:.1f} GiB, smoke.reference_gib is {limit_gib}"}
    model = reference.build(source)
    result = agreement(model, generations)
    if adapter is None:
        return result
    model = reference.with_adapter(model, adapter, source.dimensions)
    return {**agreement(model, generations), "without_adapter": result}


def agreement(model: Module, generations: list[Generation]) -> dict:
    """How the engine's `generations` agree with `model`."""
    found = Agreement()
    for generation in generations:
        found.add(generation, reference.log_probabilities(model, generation.token_ids))
    return found.as_dict()


def check(result: dict, dtype: str, cfg: DictConfig) -> None:
    """UserError where vLLM is further from the reference than its dtype explains.

    A checkpoint that was quantized again has other weights than the reference: its agreement is reported, not judged.
    """
    if "skipped" in result or cfg.requant.mode != EXACT:
        return
    limits = {"top-1 agreement": (result["top1_agreement"], "at least", cfg.smoke.min_top1_agreement)}
    if dtype == "float32" and cfg.engine.max_float32_difference is not None:
        limits["log-probability difference"] = (
            result["worst_logprob_difference"],
            "at most",
            cfg.engine.max_float32_difference,
        )
    for what, (got, bound, limit) in limits.items():
        if not (got >= limit if bound == "at least" else got <= limit):
            raise UserError(
                f"vLLM does not agree with transformers in {what}",
                where=f"smoke, {dtype}",
                got=f"{got:.4g}",
                expected=f"{bound} {limit:.4g}",
                next_step="see metrics/smoke.json; this is a bug, please report it",
            )


@stage
def main(cfg: DictConfig) -> str:
    model, artifacts = model_of(cfg)
    engine_args = engine_of(cfg)
    artifacts.require(artifacts.checkpoint / "config.json", "assemble")
    try:
        generations = generate(artifacts.checkpoint, list(cfg.smoke.prompts), cfg.smoke.max_tokens, engine_args)
    except RuntimeError:
        if engine_args["dtype"] == "float16":  # a GPU ends with an assertion on token ids sampled from NaN
            print(f"smoke: if vLLM ended on values that are not finite: {advice(artifacts.checkpoint)}", file=sys.stderr)
        raise
    require_finite(generations, artifacts.checkpoint)
    dtype = engine_args["dtype"]
    source = open_source(model, artifacts)
    merge = merge_of(cfg, source, artifacts)
    result = compare(source, merge.adapter if merge else None, generations, cfg.smoke.reference_gib)
    write_json(
        METRICS / "smoke.json",
        {
            "model": model.name,
            "dtype": dtype,
            "engine": cfg.engine.name,
            **({"merged_adapter": cfg.requant.merge} if merge else {}),
            **result,
            "generations": [
                {"prompt": g.prompt, "text": g.text, "distinct_tokens": len(set(g.token_ids[g.prompt_tokens :]))}
                for g in generations
            ],
        },
    )
    for generation in generations:
        print(f"smoke: {generation.prompt!r} -> {generation.text!r}")
    check(result, dtype, cfg)
    return ", ".join(f"{key} {value}" for key, value in result.items())


if __name__ == "__main__":
    main()
