"""dequant@L: undo the double quantization of one layer's absmax."""

from common import layer_of, model_of, stage
from omegaconf import DictConfig

from gptoss_nf4.artifacts import write_tensors
from gptoss_nf4.fetch import open_source
from gptoss_nf4.names import FUSIONS


@stage
def main(cfg: DictConfig) -> None:
    model, artifacts = model_of(cfg)
    layer, source = layer_of(cfg), open_source(model, artifacts)
    modules = [module for fusion in FUSIONS for module in source.modules(layer, fusion) if module.state]
    write_tensors(artifacts.absmax(layer), {module.weight: source.absmax(module) for module in modules})
    print(f"dequant: layer {layer}, {len(modules)} weights")


if __name__ == "__main__":
    main()
