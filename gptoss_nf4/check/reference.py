"""The reference: transformers' gpt-oss in float32, on the source's weights as bitsandbytes dequantizes them."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

from gptoss_nf4.adapters.adapter import Adapter
from gptoss_nf4.adapters.peft_form import write_peft_form
from gptoss_nf4.check.weights import source_weight
from gptoss_nf4.format import names
from gptoss_nf4.format.dimensions import Dimensions
from gptoss_nf4.source.interface import Source

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import GptOssForCausalLM

FLOAT32_BYTES = 4


def float32_bytes(d: Dimensions) -> int:
    """Bytes of all weights of the reference."""
    attention_and_experts = sum(
        rows * columns for layer in range(d.layers) for _, _, (rows, columns) in names.modules_of(d, layer)
    )
    return FLOAT32_BYTES * (attention_and_experts + 2 * d.vocabulary * d.hidden)


def build(source: Source) -> "GptOssForCausalLM":
    """transformers' GptOssForCausalLM in float32, on the CPU.

    It is independent of the conversion: its weights come straight from the source, by bitsandbytes and torch alone.
    """
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(**{k: v for k, v in source.checkpoint.config.items() if k != "quantization_config"})
    config.dtype = torch.float32
    config._attn_implementation = "eager"
    model = GptOssForCausalLM(config).float().eval()
    model.load_state_dict(state_dict(source), strict=True)
    return model


def state_dict(source: Source) -> dict[str, torch.Tensor]:
    """Weights by transformers' names, float32. Experts are [E, in, out], gate and up interleaved in the last dimension."""
    d = source.dimensions
    tensors = {name: _float32(source, name) for name in names.outside_shapes(d)}
    for layer in range(d.layers):
        prefix = names.prefix(layer)
        tensors |= {prefix + name: _float32(source, prefix + name) for name in names.kept_shapes(d)}
        stacks: dict[str, list[torch.Tensor]] = {}
        for fusion, name, shape in names.modules_of(d, layer):
            weight, bias = source_weight(source, source.module(name, shape)), _float32(source, f"{name}.bias")
            if fusion.stacked:  # `...experts.gate_up_projs.3` is expert 3 of `...experts.gate_up_proj`
                stack = name.rsplit("s.", 1)[0]
                stacks.setdefault(stack, []).append(weight.T)
                stacks.setdefault(f"{stack}_bias", []).append(bias)
            else:
                tensors |= {f"{name}.weight": weight, f"{name}.bias": bias}
        tensors |= {name: torch.stack(each) for name, each in stacks.items()}
    return tensors


def _float32(source: Source, name: str) -> torch.Tensor:
    return source.floating(name).tensor().float()


def with_adapter(model: "GptOssForCausalLM", adapter: Adapter, d: Dimensions) -> "PeftModel":
    """`model` with the adapter on it, by PEFT in float32. Nothing is merged into the weights. `model` itself is changed."""
    from peft import PeftModel

    with TemporaryDirectory() as directory:
        write_peft_form(adapter, d, Path(directory))
        return PeftModel.from_pretrained(model, directory).eval()


@torch.inference_mode()
def log_probabilities(model: torch.nn.Module, token_ids: list[int]) -> torch.Tensor:
    """Log-probabilities, float32 [tokens, vocabulary]. Row i is the distribution of token i + 1."""
    return model(torch.tensor([token_ids])).logits[0].log_softmax(-1)
