"""An independent reference: transformers' gpt-oss in float32, on the source's weights as bitsandbytes reads them."""

import torch

from gptoss_nf4.check.proof import source_weight
from gptoss_nf4.format import names
from gptoss_nf4.format.dimensions import Dimensions
from gptoss_nf4.source.split import SplitSource

FLOAT32_BYTES = 4


def float32_bytes(d: Dimensions) -> int:
    """Memory of all weights in float32."""
    attention_and_experts = sum(
        rows * columns for layer in range(d.layers) for _, _, (rows, columns) in names.source_modules(d, layer)
    )
    return FLOAT32_BYTES * (attention_and_experts + 2 * d.vocabulary * d.hidden)


def build(source: SplitSource):
    """transformers' GptOssForCausalLM in float32; uses none of our fusing, only bitsandbytes and torch.

    bitsandbytes dequantizes to float32 here: left alone it rounds to the state's dtype.
    """
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(**{k: v for k, v in source.checkpoint.config.items() if k != "quantization_config"})
    config.dtype = torch.float32
    config._attn_implementation = "eager"
    model = GptOssForCausalLM(config).float().eval()
    model.load_state_dict(state_dict(source), strict=True)
    return model


def state_dict(source: SplitSource) -> dict[str, torch.Tensor]:
    """transformers' own names: experts [E, in, out] with gate and up interleaved in the last dimension."""
    checkpoint, d, tensors = source.checkpoint, source.dimensions, {}
    for name in names.OUTSIDE_LAYERS:
        tensors[name] = checkpoint.torch(name).float()
    for layer in range(d.layers):
        prefix = names.prefix(layer)
        for key in ("input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.sinks"):
            tensors[prefix + key] = checkpoint.torch(prefix + key).float()
        for kind in ("weight", "bias"):
            tensors[f"{prefix}mlp.router.{kind}"] = checkpoint.torch(f"{prefix}mlp.router.linear.{kind}").float()
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            module = f"{prefix}self_attn.{projection}"
            tensors[f"{module}.weight"] = source_weight(checkpoint, f"{module}.weight")
            tensors[f"{module}.bias"] = checkpoint.torch(f"{module}.bias").float()
        for stored, target in (("gate_up_projs", "gate_up_proj"), ("down_projs", "down_proj")):
            modules = [f"{prefix}mlp.experts.{stored}.{expert}" for expert in range(d.experts)]
            weights = [source_weight(checkpoint, f"{module}.weight").T for module in modules]
            tensors[f"{prefix}mlp.experts.{target}"] = torch.stack(weights)
            tensors[f"{prefix}mlp.experts.{target}_bias"] = torch.stack(
                [checkpoint.torch(f"{module}.bias").float() for module in modules]
            )
    return tensors


@torch.inference_mode()
def log_probabilities(model, token_ids: list[int]) -> torch.Tensor:
    """float32 [tokens, vocabulary]: row i is the distribution of token i + 1."""
    return model(torch.tensor([token_ids])).logits[0].log_softmax(-1)
