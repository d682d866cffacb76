"""smoke-adapter@NAME: generate with one adapter and with the base, compare with transformers and PEFT in float32."""

from common import METRICS, adapter_of, engine_of, model_of, stage
from omegaconf import DictConfig
from smoke import GIB, check, require_finite

from gptoss_nf4.adapters.adapter import Adapter
from gptoss_nf4.check import reference
from gptoss_nf4.check.agreement import Agreement, Generation
from gptoss_nf4.engine.generate import ServedAdapter, generate_with
from gptoss_nf4.source.interface import Source
from gptoss_nf4.source.model import adapter_directory, open_source
from gptoss_nf4.storage.reading import read_json_object
from gptoss_nf4.storage.writing import write_json


def compare(
    source: Source, adapter: Adapter, base: list[Generation], adapted: list[Generation], limit_gib: float
) -> dict[str, dict]:
    """Agreement of base and adapter with their references. Where these need more than `limit_gib`: why it was skipped."""
    needed = reference.float32_bytes(source.dimensions) / GIB
    if needed > limit_gib:
        skipped = {"skipped": f"a float32 reference needs {needed:.1f} GiB, smoke.reference_gib is {limit_gib}"}
        return {"adapter": skipped, "base": skipped}
    model, found = reference.build(source), {"base": Agreement(), "adapter": Agreement()}
    for generation in base:
        found["base"].add(generation, reference.log_probabilities(model, generation.token_ids))
    model = reference.with_adapter(model, adapter, source.dimensions)
    for generation in adapted:
        found["adapter"].add(generation, reference.log_probabilities(model, generation.token_ids))
    return {name: agreement.as_dict() for name, agreement in found.items()}


@stage
def main(cfg: DictConfig) -> str:
    model, artifacts = model_of(cfg)
    entry, engine_args = adapter_of(cfg), engine_of(cfg)
    report = METRICS / "adapters" / f"{entry.name}.json"
    if cfg.requant.merge is not None:
        skipped = f"adapters belong beside the unmerged base, and {cfg.requant.merge} is merged here: see smoke"
        write_json(report, {"model": model.name, "adapter": entry.name, "skipped": skipped})
        return f"{entry.name}, skipped: {skipped}"
    artifacts.require(artifacts.checkpoint / "config.json", "assemble")
    described = read_json_object(artifacts.require(artifacts.adapter(entry.name), f"adapter@{entry.name}"))
    adapter = Adapter(adapter_directory(entry, artifacts))
    served = ServedAdapter(entry.name, adapter.directory, described["largest_rank"])
    prompts = list(cfg.smoke.prompts)
    base, adapted = generate_with(artifacts.checkpoint, served, prompts, cfg.smoke.max_tokens, engine_args)
    require_finite([*base, *adapted], artifacts.checkpoint)
    found = compare(open_source(model, artifacts), adapter, base, adapted, cfg.smoke.reference_gib)
    texts = [{"prompt": g.prompt, "text": g.text, "base": b.text} for g, b in zip(adapted, base, strict=True)]
    dtype = engine_args["dtype"]
    settings = {"model": model.name, "adapter": entry.name, "dtype": dtype, "engine": cfg.engine.name}
    write_json(report, settings | found | {"generations": texts})
    for each in texts:
        print(f"smoke_adapter: {each['prompt']!r} -> {each['text']!r}")
    for result in found.values():
        check(result, dtype, cfg)
    return f"{entry.name}, " + ", ".join(f"{key} {value}" for key, value in found["adapter"].items())


if __name__ == "__main__":
    main()
