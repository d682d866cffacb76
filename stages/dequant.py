"""dequant@L: undo the double quantization of one layer's absmax."""

from common import layer_of, model_of, stage
from omegaconf import DictConfig

from gptoss_nf4.convert.layers import dequant_step
from gptoss_nf4.fetch.fetch import open_source


@stage
def main(cfg: DictConfig) -> str:
    model, artifacts = model_of(cfg)
    layer = layer_of(cfg)
    size = dequant_step(open_source(model, artifacts), artifacts, layer)
    return f"layer {layer}, {size / 1e9:.3f} GB"


if __name__ == "__main__":
    main()
