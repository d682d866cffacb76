"""smoke: generate with vLLM and compare with transformers in float32."""

import sys
from collections.abc import Sequence
from pathlib import Path

from common import METRICS, engine_of, model_of, stage
from merging import merge_of
from omegaconf import DictConfig
from plotting import draw

from gptoss_nf4.adapters.adapter import Adapter
from gptoss_nf4.check import reference
from gptoss_nf4.check.agreement import Generation
from gptoss_nf4.convert.plan import EXACT
from gptoss_nf4.engine.forecast import forecast_on_cpu
from gptoss_nf4.engine.generate import generate
from gptoss_nf4.engine.noise import leave_out_noise
from gptoss_nf4.errors import UserError
from gptoss_nf4.format.residual import AUTO_FLOAT16, SMALLEST, scale_of
from gptoss_nf4.source.interface import Source
from gptoss_nf4.source.model import open_source
from gptoss_nf4.storage.checkpoint import Checkpoint
from gptoss_nf4.storage.machine import available_memory, cores
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


def vllm_left_out(cfg: DictConfig, checkpoint: Path, source: Source, prompts: list[str]) -> str | None:
    """Why vLLM is not run on `prompts`: a CPU would take too long, or has too little memory. None where it is run."""
    if cfg.engine.max_minutes is None:
        return None
    tensors = Checkpoint(checkpoint).tensors
    # vLLM keeps a second copy of the head, in oneDNN's order.
    weights = sum(info.bytes for info in tensors.values()) + tensors["lm_head.weight"].bytes
    kv_cache = cfg.engine.env.get("VLLM_CPU_KVCACHE_SPACE") or "0"  # GiB; without one, vLLM takes of what is free
    if not str(kv_cache).isdecimal():
        raise UserError(
            "bad setting",
            where="engine.env.VLLM_CPU_KVCACHE_SPACE",
            got=repr(kv_cache),
            expected="a whole number of GiB",
            next_step="run `python stages/configure.py engine.env.VLLM_CPU_KVCACHE_SPACE=1`",
        )
    forecast = forecast_on_cpu(source.dimensions, weights, int(kv_cache) * GIB, prompts, cfg.smoke.max_tokens, cores())
    return forecast.too_much(available_memory(), cfg.engine.max_minutes)


def generated(checkpoint: Path, prompts: list[str], max_tokens: int, engine_args: dict) -> list[Generation]:
    """`generate`, and the advice where the values are not finite. UserError then, or vLLM's own error."""
    try:
        generations = generate(checkpoint, prompts, max_tokens, engine_args)
    except RuntimeError:
        if engine_args["dtype"] == "float16":  # a GPU ends with an assertion on token ids sampled from NaN
            print(f"smoke: if vLLM ended on values that are not finite: {advice(checkpoint)}", file=sys.stderr)
        raise
    require_finite(generations, checkpoint)
    return generations


def compare(
    source: Source, base: list[Generation], adapter: Adapter | None = None, adapted: Sequence[Generation] = ()
) -> tuple[dict, dict]:
    """Agreement of `base` and of `adapted` with the reference; where there is too little memory, what is left out.

    An agreement also has `by_position`, for the plot: metrics are the figures without it.
    """
    longest = max(len(generation.token_ids) for generation in (*base, *adapted))
    needed, free = reference.peak_bytes(source.dimensions, longest, adapter is not None), available_memory()
    if needed > free:
        sizes = f"needs about {needed / GIB:.1f} GiB of memory; {free / GIB:.1f} are free"
        left_out = {"left_out": f"the comparison, whose reference {sizes}"}
        return left_out, left_out
    one, other = reference.agreements(source, base, adapter, adapted)
    return one.as_dict() | {"by_position": one.by_position}, other.as_dict() | {"by_position": other.by_position}


def summary(result: dict) -> str:
    """The agreement, or what was left out, in one line for the console."""
    left_out = result.get("left_out")
    figures = ", ".join(f"{key} {value}" for key, value in result.items() if key != "without_adapter")
    return f"left out: {left_out}" if left_out else figures


def check(result: dict, dtype: str, cfg: DictConfig) -> None:
    """UserError where vLLM is further from the reference than its dtype explains.

    A checkpoint that was quantized again has other weights than the reference: its agreement is reported, not judged.
    """
    if "left_out" in result or cfg.requant.mode != EXACT:
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
    leave_out_noise()
    model, artifacts = model_of(cfg)
    engine_args = engine_of(cfg)
    artifacts.require(artifacts.checkpoint / "config.json", "assemble")
    source, prompts, dtype = open_source(model, artifacts), list(cfg.smoke.prompts), engine_args["dtype"]
    left_out = vllm_left_out(cfg, artifacts.checkpoint, source, prompts)
    merge = merge_of(cfg, source, artifacts)
    generations: list[Generation] = []
    if left_out:
        result: dict = {"left_out": left_out}
    else:
        generations = generated(artifacts.checkpoint, prompts, cfg.smoke.max_tokens, engine_args)
        if merge is None:
            result, _ = compare(source, generations)
        else:
            # Against the base with the adapter beside it; and against the base alone, which says how much of it is left.
            without, result = compare(source, generations, merge.adapter, generations)
            without.pop("by_position", None)
            result = {**result, "without_adapter": without}
    write_json(artifacts.logprobs, result.pop("by_position", []))
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
    draw(cfg)
    for generation in generations:
        print(f"smoke: {generation.prompt!r} -> {generation.text!r}")
    check(result, dtype, cfg)
    return summary(result)


if __name__ == "__main__":
    main()
