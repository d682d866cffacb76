"""The embedded model: a small gpt-oss in the published split layout or the fused one, written by bitsandbytes itself.

It is small, but has everything that has gone wrong before: interleaved gate and up, biases and sinks that are not zero, a
router in another dtype than the rest, several shards, absmax that is not a whole number of nested blocks, and an
intermediate width other than the hidden one. The weights are large enough that generation does not repeat one token.
"""

import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from gptoss_nf4.format import names
from gptoss_nf4.format.config_fields import LAYER_TYPES, RMS_NORM_EPS, SWIGLU_LIMIT
from gptoss_nf4.format.dimensions import Dimensions
from gptoss_nf4.samples import fused
from gptoss_nf4.source import split
from gptoss_nf4.storage.checkpoint import INDEX_FILE
from gptoss_nf4.storage.writing import write_bytes, write_json, write_text

TINY = Dimensions(
    layers=2, hidden=192, intermediate=320, experts=8, experts_per_token=4, heads=4, kv_heads=2, head_dim=64, vocabulary=320
)
# Three layers add up to 98,304, beyond float16's 65,504. Every token uses all four experts. Otherwise a 16-bit dtype would
# now and then choose another expert than float32 does, and that would hide what rounding the stream does.
MASSIVE_DIMENSIONS = replace(TINY, layers=3, experts=4)
MASSIVE_VALUE, MASSIVE_CHANNEL = 32768.0, 7
OTHER_CHANNELS_RMS = 7.0  # assumed for the norms' weights; measured 5 to 9 from the second layer on
SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>", "<|return|>", "<|start|>", "<|message|>", "<|end|>")
SLIDING_WINDOW = 16
ROUTER_DTYPE = torch.float32
OTHER_DTYPE = torch.bfloat16
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|start|>{{ message.role }}<|message|>{{ message.content }}<|end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant<|message|>{%- endif -%}
"""


def model_config(d: Dimensions) -> dict:
    """config.json as transformers 4.5x writes it for Unsloth's repositories."""
    return {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": 256 + SPECIAL_TOKENS.index("<|return|>"),
        "experts_per_token": d.experts_per_token,
        "head_dim": d.head_dim,
        "hidden_act": "silu",
        "hidden_size": d.hidden,
        "initial_context_length": 256,
        "intermediate_size": d.intermediate,
        "layer_types": [LAYER_TYPES[layer % 2] for layer in range(d.layers)],
        "max_position_embeddings": 8192,
        "model_type": "gpt_oss",
        "num_attention_heads": d.heads,
        "num_experts_per_tok": d.experts_per_token,
        "num_hidden_layers": d.layers,
        "num_key_value_heads": d.kv_heads,
        "num_local_experts": d.experts,
        "output_router_logits": False,
        "pad_token_id": 256 + SPECIAL_TOKENS.index("<|endoftext|>"),
        "quantization_config": {
            "_load_in_4bit": True,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "llm_int8_skip_modules": ["router", "lm_head", "embed_tokens"],
            "load_in_4bit": True,
            "quant_method": "bitsandbytes",
        },
        "rms_norm_eps": RMS_NORM_EPS,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 256,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": SLIDING_WINDOW,
        "swiglu_limit": SWIGLU_LIMIT,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": d.vocabulary,
    }


def random_tensor(name: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> torch.Tensor:
    """Normal values, float32 of `shape`, that depend on the tensor's name and shape alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator) * std + mean


def quantized(name: str, weight: torch.Tensor, blocksize: int) -> dict[str, torch.Tensor]:
    """`weight`, floating of any shape, rounded to bfloat16 and stored as bitsandbytes does with double quantization."""
    from gptoss_nf4.eager_bnb import bnb

    packed, state = bnb.quantize_4bit(
        weight.to(OTHER_DTYPE), blocksize=blocksize, compress_statistics=True, quant_type="nf4"
    )
    sidecars = {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    return {name: packed, **sidecars}


def weight_of(module: str, shape: tuple[int, int]) -> torch.Tensor:
    """The weight of that canonical name, float32 [out, in]."""
    return random_tensor(f"{module}.weight", shape, std=2.0 / math.sqrt(shape[1]))


def fused_tensors(d: Dimensions, blocksize: int = 64) -> Iterator[dict[str, torch.Tensor]]:
    """The same weights in the fused layout: a dictionary for each layer, then one for the tensors outside the layers."""
    for layer, tensors in enumerate(split_tensors(d, blocksize)):
        if layer == d.layers:
            yield tensors
            continue
        found = fused.stacked_biases(tensors, d, layer)
        for stack, modules, (_, columns, rows) in fused.stacks(d, layer):
            weights = torch.stack([weight_of(module, (rows, columns)).T for module in modules])
            found |= quantized(stack, weights, blocksize)
        yield found


def split_tensors(d: Dimensions, blocksize: int = 64, massive: bool = False) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of the checkpoint by stored name: a dictionary for each layer, then one for those outside the layers.

    With `massive`, every layer adds MASSIVE_VALUE to one channel of the residual stream, as trained models do. The weights
    of the norms after it drop that channel and make up for it, so that the other channels count.
    """
    for layer in range(d.layers):
        tensors: dict[str, torch.Tensor] = {}
        for _, module, shape in names.modules_of(d, layer):
            tensors |= quantized(f"{module}.weight", weight_of(module, shape), blocksize)
            tensors[f"{module}.bias"] = random_tensor(f"{module}.bias", shape[:1], std=0.2).to(OTHER_DTYPE)
        for key, kept in split.kept_shapes(d).items():
            name, norm = names.prefix(layer) + key, key.endswith("layernorm.weight")
            dtype = ROUTER_DTYPE if "router" in key else OTHER_DTYPE
            # The router's logits are of about unit size, so routing spreads over the experts.
            std = 0.1 if norm else 1.0 / math.sqrt(d.hidden) if key == "mlp.router.linear.weight" else 0.5
            tensors[name] = random_tensor(name, kept, std=std, mean=1.0 if norm else 0.0).to(dtype)
        if massive:
            _make_massive(tensors, layer, d)
        yield tensors
    outside = {
        name: random_tensor(
            name, shape, std=0.1 if "norm" in name else 1.0 / math.sqrt(shape[1]) * 3, mean=1.0 if "norm" in name else 0.0
        ).to(OTHER_DTYPE)
        for name, shape in names.outside_shapes(d).items()
    }
    if massive:
        _undo_massive(outside["model.norm.weight"], d.layers, d)
    yield outside


def _make_massive(tensors: dict[str, torch.Tensor], layer: int, d: Dimensions) -> None:
    """Give every expert that bias in MASSIVE_CHANNEL. A token's routing weights sum to 1, so it is added once."""
    for expert in range(d.experts):
        tensors[f"{names.prefix(layer)}mlp.experts.down_projs.{expert}.bias"][MASSIVE_CHANNEL] = MASSIVE_VALUE
    if layer:
        for norm in ("input_layernorm", "post_attention_layernorm"):
            _undo_massive(tensors[f"{names.prefix(layer)}{norm}.weight"], layer, d)


def _undo_massive(norm: torch.Tensor, layers_before: int, d: Dimensions) -> None:
    """Change a norm's weight so that the massive channel leaves it as 0 and the others with an RMS of about 1."""
    norm *= layers_before * MASSIVE_VALUE / math.sqrt(d.hidden) / OTHER_CHANNELS_RMS
    norm[MASSIVE_CHANNEL] = 0


def write_checkpoint(
    directory: Path, d: Dimensions = TINY, blocksize: int = 64, massive: bool = False, stacked: bool = False
) -> None:
    """Write the whole model: a shard for each layer and one for the rest, index, config and tokenizer.

    With `stacked` in the fused layout, which has no massive channel.
    """
    from safetensors.torch import save

    weight_map: dict[str, str] = {}
    total = 0
    made = fused_tensors(d, blocksize) if stacked else split_tensors(d, blocksize, massive)
    for number, tensors in enumerate(made):
        file = f"model-{number + 1:05d}-of-{d.layers + 1:05d}.safetensors"
        write_bytes(directory / file, save(tensors, metadata={"format": "pt"}))
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    config = model_config(d)
    write_json(directory / "config.json", config)
    ids = {key: config[key] for key in ("eos_token_id", "pad_token_id")}
    write_json(directory / "generation_config.json", ids | {"bos_token_id": 256, "do_sample": False})
    write_tokenizer(directory)


def write_tokenizer(directory: Path) -> None:
    """Write a byte-level tokenizer: a token for each of the 256 bytes, in GPT-2's alphabet, then the special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: number for number, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    write_text(directory / "tokenizer.json", json.dumps(json.loads(tokenizer.to_str()), indent=1) + "\n")
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|startoftext|>",
            "eos_token": "<|return|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": 8192,
        },
    )
    write_text(directory / "chat_template.jinja", CHAT_TEMPLATE)
