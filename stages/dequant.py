"""dequant@L: undo the double quantization of one layer's absmax."""

from common import layer_of, model_of, stage
from omegaconf import DictConfig

from gptoss_nf4.convert.dequant import dequant
from gptoss_nf4.source.model import open_source


@stage
def main(cfg: DictConfig) -> str:
    model, artifacts = model_of(cfg)
    layer = layer_of(cfg)
    size = dequant(open_source(model, artifacts), artifacts, layer)
    return f"layer {layer}, {size / 1e9:.3f} GB"


if __name__ == "__main__":
    main()
