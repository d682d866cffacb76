"""fetch: make the source available, describe it, and see that the settings can convert it."""

from common import model_of, stage
from omegaconf import DictConfig

from gptoss_nf4.convert.plan import RequantOptions, require_plan
from gptoss_nf4.errors import UserError
from gptoss_nf4.fetch.fetch import fetch
from gptoss_nf4.source.model import open_source


@stage
def main(cfg: DictConfig) -> str:
    model, artifacts = model_of(cfg)
    options = RequantOptions.of(cfg.requant)
    manifest = fetch(model, artifacts, say=lambda line: print(f"fetch: {line}", flush=True))
    layers = manifest["dimensions"]["layers"]
    if layers != len(cfg.model.layers):
        raise UserError(
            "wrong number of layers",
            where="params.yaml",
            got=f"model.layers with {len(cfg.model.layers)}",
            expected=f"{layers}, as the source has",
            next_step="run `python stages/configure.py model=...` again",
        )
    require_plan(open_source(model, artifacts), options)  # before the first layer
    size = sum(file["bytes"] for file in manifest["files"])
    return f"{model.name}, {layers} layers, {manifest['tensors']} tensors, {size / 1e9:.3f} GB"


if __name__ == "__main__":
    main()
