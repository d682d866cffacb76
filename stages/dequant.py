"""dequant@L: undo the double quantization of one layer's absmax."""

from common import layer_of, model_of, stage
from omegaconf import DictConfig

from gptoss_nf4.fetch import open_source
from gptoss_nf4.steps import dequant_step


@stage
def main(cfg: DictConfig) -> None:
    model, artifacts = model_of(cfg)
    layer = layer_of(cfg)
    weights = dequant_step(open_source(model, artifacts), artifacts, layer)
    print(f"dequant: layer {layer}, {weights} weights")


if __name__ == "__main__":
    main()
