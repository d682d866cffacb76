"""fetch: make the source available and describe it."""

from common import model_of, stage
from omegaconf import DictConfig

from gptoss_nf4.errors import UserError
from gptoss_nf4.fetch.fetch import fetch


@stage
def main(cfg: DictConfig) -> str:
    model, artifacts = model_of(cfg)
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
    size = sum(file["bytes"] for file in manifest["files"])
    return f"{model.name}, {layers} layers, {manifest['tensors']} tensors, {size / 1e9:.3f} GB"


if __name__ == "__main__":
    main()
