"""requant@L: make one layer's fused 4-bit tensors."""

from common import layer_of, model_of, stage
from omegaconf import DictConfig
from safetensors.numpy import load_file

from gptoss_nf4.artifacts import write_tensors
from gptoss_nf4.fetch import describe_file, open_source
from gptoss_nf4.files import write_json
from gptoss_nf4.plan import EXACT, RequantOptions, plan_layer
from gptoss_nf4.requant import requant_layer


def device_of(setting: str) -> str:
    if setting != "auto":
        return setting
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@stage
def main(cfg: DictConfig) -> None:
    model, artifacts = model_of(cfg)
    layer, options, source = layer_of(cfg), RequantOptions.of(cfg.requant), open_source(model, artifacts)
    targets = plan_layer(source, layer, options)
    absmax = load_file(artifacts.require(artifacts.absmax(layer), f"dequant@{layer}"))
    device = "cpu" if options.mode == EXACT else device_of(cfg.requant.device)
    tensors, report = requant_layer(source, absmax, targets, options, device)
    write_tensors(artifacts.layer_weights(layer), tensors)
    # The file's digest makes this small report stand for the layer where later stages depend on it.
    write_json(artifacts.report(layer), {"layer": layer, "mode": options.mode, **report,
                                         "file": describe_file(artifacts.layer_weights(layer))})  # fmt: skip
    size = sum(tensor.nbytes for tensor in tensors.values())
    print(f"requant: layer {layer}, mode {options.mode}, {size / 1e9:.3f} GB")


if __name__ == "__main__":
    main()
