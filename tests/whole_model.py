"""transformers' gpt-oss in float32 with a checkpoint's weights, split or fused, for comparing with what this project makes.

It is read by the safetensors library and dequantized by bitsandbytes, under the published names. Nothing of ours is used.
"""

import json
from pathlib import Path

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from safetensors.torch import load_file
from transformers import GptOssConfig, GptOssForCausalLM

STATE = ".quant_state.bitsandbytes__nf4"


def whole_model(directory: Path) -> GptOssForCausalLM:
    """The model of a checkpoint whose rows are whole blocks (bitsandbytes 0.50.2 on a CPU reads others wrongly)."""
    fields = json.loads((directory / "config.json").read_text())
    del fields["quantization_config"]
    config = GptOssConfig(**fields | {"torch_dtype": "float32"})
    config._attn_implementation = "eager"
    model = GptOssForCausalLM(config).float().eval()
    model.load_state_dict(state_dict(directory, model), strict=True)
    return model


def state_dict(directory: Path, model: GptOssForCausalLM) -> dict[str, torch.Tensor]:
    """Every weight by transformers' name, float32. Experts are [E, in, out]."""
    stored = {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}

    def read(name: str) -> torch.Tensor:
        if f"{name}{STATE}" not in stored:
            return stored[name].float()
        state = QuantState.from_dict(
            {key: stored[key] for key in stored if key.startswith(f"{name}.")}, torch.device("cpu")
        )
        state.dtype = torch.float32
        return dequantize_4bit(stored[name], state)

    found = {}
    for name, parameter in model.state_dict().items():
        if name in stored:
            found[name] = read(name)
        elif ".mlp.experts." in name:
            stack, bias = name.removesuffix("_bias"), name.endswith("_bias")
            experts = [f"{stack}s.{e}" for e in range(len(parameter))]
            parts = [read(f"{expert}.bias") if bias else read(f"{expert}.weight").T for expert in experts]
            found[name] = torch.stack(parts)
        else:
            found[name] = read(name.replace("mlp.router.", "mlp.router.linear."))
    return found


@torch.inference_mode()
def log_probabilities(model: torch.nn.Module, token_ids: list[int]) -> torch.Tensor:
    """Log-probabilities, float32 [tokens, vocabulary]. Row i is the distribution of token i + 1."""
    return model(torch.tensor([token_ids])).logits[0].log_softmax(-1)
