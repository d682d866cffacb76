"""smoke-adapter@NAME: generate with one adapter and with the base, compare with transformers and PEFT in float32."""

from common import METRICS, adapter_of, engine_of, model_of, stage
from omegaconf import DictConfig
from smoke import check, compare, require_finite, summary, vllm_left_out

from gptoss_nf4.adapters.adapter import Adapter
from gptoss_nf4.check.agreement import Generation
from gptoss_nf4.engine.generate import generate_with
from gptoss_nf4.engine.noise import leave_out_noise
from gptoss_nf4.engine.serve import ServedAdapter
from gptoss_nf4.source.model import adapter_directory, open_source
from gptoss_nf4.storage.reading import read_json_object
from gptoss_nf4.storage.writing import write_json


@stage
def main(cfg: DictConfig) -> str:
    leave_out_noise()
    model, artifacts = model_of(cfg)
    entry, engine_args = adapter_of(cfg), engine_of(cfg)
    report = METRICS / "adapters" / f"{entry.name}.json"
    if cfg.requant.merge is not None:
        why = {"left_out": f"adapters belong beside the unmerged base, and {cfg.requant.merge} is merged here: see smoke"}
        write_json(report, {"model": model.name, "adapter": entry.name, **why})
        return f"{entry.name}, {summary(why)}"
    artifacts.require(artifacts.checkpoint / "config.json", "assemble")
    described = read_json_object(artifacts.require(artifacts.adapter(entry.name), f"adapter@{entry.name}"))
    adapter = Adapter(adapter_directory(entry, artifacts))
    served = ServedAdapter(entry.name, adapter.directory, described["largest_rank"])
    source, prompts = open_source(model, artifacts), list(cfg.smoke.prompts)
    left_out = vllm_left_out(cfg, artifacts.checkpoint, source, prompts * 2)
    base: list[Generation] = []
    adapted: list[Generation] = []
    if left_out:
        found = {"adapter": {"left_out": left_out}, "base": {"left_out": left_out}}
    else:
        base, adapted = generate_with(artifacts.checkpoint, served, prompts, cfg.smoke.max_tokens, engine_args)
        require_finite([*base, *adapted], artifacts.checkpoint)
        found = dict(zip(("base", "adapter"), compare(source, base, adapter, adapted), strict=True))
        for result in found.values():
            result.pop("by_position", None)
    texts = [{"prompt": g.prompt, "text": g.text, "base": b.text} for g, b in zip(adapted, base, strict=True)]
    dtype = engine_args["dtype"]
    settings = {"model": model.name, "adapter": entry.name, "dtype": dtype, "engine": cfg.engine.name}
    write_json(report, settings | found | {"generations": texts})
    for each in texts:
        print(f"smoke_adapter: {each['prompt']!r} -> {each['text']!r}")
    for result in found.values():
        check(result, dtype, cfg)
    return f"{entry.name}, {summary(found['adapter'])}"


if __name__ == "__main__":
    main()
