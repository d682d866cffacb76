"""requant@L: make one layer's fused 4-bit tensors."""

from common import layer_of, model_of, stage
from merging import merge_of
from omegaconf import DictConfig

from gptoss_nf4.convert.plan import EXACT, RequantOptions
from gptoss_nf4.convert.requant import requant
from gptoss_nf4.source.model import open_source


def device_of(setting: str, mode: str) -> str:
    """torch's device for mode nf4. Mode exact needs none, and must not pay for importing torch."""
    if setting != "auto" or mode == EXACT:
        return setting
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@stage
def main(cfg: DictConfig) -> str:
    model, artifacts = model_of(cfg)
    layer, options = layer_of(cfg), RequantOptions.of(cfg.requant)
    device = device_of(cfg.requant.device, options.mode)
    source = open_source(model, artifacts)
    size = requant(source, artifacts, layer, options, device, merge_of(cfg, source, artifacts))
    return f"layer {layer}, mode {options.mode}, {size / 1e9:.3f} GB"


if __name__ == "__main__":
    main()
