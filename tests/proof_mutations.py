"""Ways in which a result may be wrong. Names are written out here, and none is taken from the code under test."""

import re
from collections.abc import Callable

import torch

Tensors = dict[str, torch.Tensor]
LAYER = "model.layers.1."
ATTENTION, EXPERTS = f"{LAYER}self_attn.", f"{LAYER}mlp.experts."
# Every tensor of a result that is not 4-bit: all of layer 1, and those outside the layers.
DENSE = (
    f"{LAYER}input_layernorm.weight",
    f"{ATTENTION}qkv_proj.bias",
    f"{ATTENTION}o_proj.bias",
    f"{ATTENTION}sinks",
    f"{LAYER}post_attention_layernorm.weight",
    f"{LAYER}mlp.router.weight",
    f"{LAYER}mlp.router.bias",
    f"{EXPERTS}w13.bias",
    f"{EXPERTS}w2.bias",
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
)
FOUR_BIT = tuple(f"{ATTENTION}{name}.weight" for name in ("qkv_proj", "o_proj")) + tuple(
    f"{EXPERTS}{name}.weight" for name in ("w13", "w2")
)
STATE = ".quant_state.bitsandbytes__nf4"


def exchange(tensors: Tensors, one: str, other: str) -> None:
    tensors[one], tensors[other] = tensors[other], tensors[one]


def last_bit(tensors: Tensors, name: str) -> None:
    """The smallest change of one value of a 16-bit tensor."""
    tensors[name] = tensors[name].clone()
    bits = tensors[name].view(torch.int16).view(-1)
    bits[len(bits) // 2] ^= 1


def noise(tensors: Tensors, name: str) -> None:
    tensors[name] = torch.randn(tensors[name].shape).to(tensors[name].dtype)


def rows_taken(tensors: Tensors, weight: str, order: Callable[[int], torch.Tensor], bias: bool = True) -> None:
    """Rows, the last dimension but one, in another order: codes, absmax and bias together.

    Where blocks run along the outputs, absmax has a row for each group of rows, which stays where it is.
    """
    rows = tensors[weight].shape[-2]
    for name in (weight, f"{weight}.absmax"):
        if tensors[name].shape[-2] == rows:
            tensors[name] = tensors[name][..., order(rows), :].contiguous()
    if bias:
        name = weight.replace(".weight", ".bias")
        tensors[name] = tensors[name][..., order(tensors[name].shape[-1])].contiguous()


def experts_taken(tensors: Tensors, weight: str, order: Callable[[int], torch.Tensor]) -> None:
    for name in (weight, f"{weight}.absmax", weight.replace(".weight", ".bias")):
        tensors[name] = tensors[name][order(len(tensors[name]))].contiguous()


def reverse(count: int) -> torch.Tensor:
    return torch.arange(count - 1, -1, -1)


def two_exchanged(count: int) -> torch.Tensor:
    order = torch.arange(count)
    order[[2, 3]] = order[[3, 2]]
    return order


def gate_for_up(count: int) -> torch.Tensor:
    return torch.arange(count).view(-1, 2).flip(1).reshape(-1)


def halves(count: int) -> torch.Tensor:
    """The classic mistake: rows that lie interleaved are taken for two halves."""
    return torch.cat([torch.arange(0, count, 2), torch.arange(1, count, 2)])


def k_for_v(count: int) -> torch.Tensor:
    """q has twice as many rows as k and v together have in the embedded model's 4 heads and 2 key-value heads."""
    quarter = count // 4
    q, k, v = torch.arange(count).split([2 * quarter, quarter, quarter])
    return torch.cat([q, v, k])


def one_code(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[-100] ^= 0x10


def one_scale(tensors: Tensors, name: str) -> None:
    tensors[f"{name}.absmax"] = tensors[f"{name}.absmax"].clone()
    tensors[f"{name}.absmax"].view(torch.int32).view(-1)[7] ^= 1


def state_field(tensors: Tensors, name: str, old: str, new: str) -> None:
    text = bytes(tensors[name + STATE].tolist()).decode()
    assert old in text
    tensors[name + STATE] = torch.tensor(list(text.replace(old, new).encode()), dtype=torch.uint8)


W13, W2 = f"{EXPERTS}w13.weight", f"{EXPERTS}w2.weight"
QKV, O_PROJ = f"{ATTENTION}qkv_proj.weight", f"{ATTENTION}o_proj.weight"
NORMS = f"{LAYER}input_layernorm.weight", f"{LAYER}post_attention_layernorm.weight"
# name of the mutation -> (what it does, what the line must name)
OF_TENSORS: dict[str, tuple[Callable[[Tensors], None], str]] = {
    **{f"last bit of {name}": (lambda t, name=name: last_bit(t, name), name) for name in DENSE},
    **{f"noise for {name}": (lambda t, name=name: noise(t, name), name) for name in DENSE},
    **{
        f"{name} of another layer": (
            lambda t, name=name: exchange(t, name, name.replace("layers.1", "layers.0")),
            name.removeprefix(LAYER),
        )
        for name in (*DENSE[:9], *FOUR_BIT)
    },
    **{f"no {name}": (lambda t, name=name: t.pop(name), f"missing tensor in the result.*{name}") for name in DENSE},
    **{f"one code of {name}": (lambda t, name=name: one_code(t, name), f"{name}: got 1 of") for name in FOUR_BIT},
    **{f"one absmax of {name}": (lambda t, name=name: one_scale(t, name), name) for name in FOUR_BIT},
    **{f"no absmax of {name}": (lambda t, name=name: t.pop(f"{name}.absmax"), name) for name in FOUR_BIT},
    **{f"no state of {name}": (lambda t, name=name: t.pop(name + STATE), name) for name in FOUR_BIT},
    "layernorms exchanged": (lambda t: exchange(t, *NORMS), "layernorm"),
    "final norm and a layer's exchanged": (lambda t: exchange(t, NORMS[0], "model.norm.weight"), "norm"),
    "embedding and head exchanged": (lambda t: exchange(t, "model.embed_tokens.weight", "lm_head.weight"), "embed_tokens"),
    "k and v exchanged": (lambda t: rows_taken(t, QKV, k_for_v), r"qkv_proj.*k_proj"),
    "biases of k and v exchanged": (
        lambda t: t.update({f"{ATTENTION}qkv_proj.bias": t[f"{ATTENTION}qkv_proj.bias"][k_for_v(512)]}),
        r"qkv_proj\.bias.*k_proj",
    ),
    "q heads exchanged": (lambda t: rows_taken(t, QKV, lambda n: torch.arange(n).roll(64)), r"qkv_proj.*q_proj"),
    "rows of o_proj reversed": (lambda t: rows_taken(t, O_PROJ, reverse), "o_proj"),
    "experts reversed": (lambda t: [experts_taken(t, name, reverse) for name in (W13, W2)], r"w13.*gate_up_projs\.0"),
    "two experts of w2 exchanged": (lambda t: experts_taken(t, W2, two_exchanged), r"w2.*down_projs\.2"),
    "rows of w13 reversed": (lambda t: rows_taken(t, W13, reverse), "w13"),
    "two rows of w13 exchanged": (lambda t: rows_taken(t, W13, two_exchanged), "w13"),
    "gate and up exchanged": (lambda t: rows_taken(t, W13, gate_for_up), "w13"),
    "gate and up as halves": (lambda t: rows_taken(t, W13, halves), "w13"),
    "biases of gate and up as halves": (
        lambda t: t.update({f"{EXPERTS}w13.bias": t[f"{EXPERTS}w13.bias"][:, halves(640)].contiguous()}),
        r"w13\.bias",
    ),
    "two rows of w2 exchanged": (lambda t: rows_taken(t, W2, two_exchanged), "w2"),
    "router's rows reversed": (
        lambda t: t.update({f"{LAYER}mlp.router.weight": t[f"{LAYER}mlp.router.weight"].flip(0).contiguous()}),
        r"mlp\.router\.weight",
    ),
    "another codebook": (lambda t: t[f"{W2}.quant_map"].view(-1)[3:4].neg_(), r"w2\.weight\.quant_map"),
    "another blocksize in a state": (lambda t: state_field(t, W2, "64", "32"), "w2"),
    "another dtype in a state": (lambda t: state_field(t, W2, "float16", "float32"), "w2"),
    "another shape in a state": (lambda t: state_field(t, W2, "192", "190"), "w2"),
    "one tensor in another dtype": (
        lambda t: t.update({"model.norm.weight": t["model.norm.weight"].float()}),
        r"model\.norm\.weight.*float32",
    ),
    "a tensor of another shape": (lambda t: t.update({NORMS[0]: t[NORMS[0]][:-1].clone()}), r"input_layernorm.*191"),
    "one tensor more": (
        lambda t: t.update({f"{LAYER}mlp.router.scale": torch.ones(1)}),
        r"unknown tensor in the result: model\.layers\.1\.mlp\.router\.scale",
    ),
    "a layer more": (
        lambda t: t.update({"model.layers.2.self_attn.sinks": torch.ones(4)}),
        r"unknown tensor in the result: model\.layers\.2",
    ),
    "codes beside a dense tensor": (
        lambda t: t.update({"lm_head.weight.absmax": torch.ones(4)}),
        r"lm_head\.weight: got 4-bit, expected dense",
    ),
}


def turned_again(tensors: Tensors, weight: str) -> None:
    """Codes in the order in which bitsandbytes stores them, under the shape of rows of outputs."""
    codes = torch.stack((tensors[weight] >> 4, tensors[weight] & 15), -1).flatten(-2).transpose(-2, -1)
    tensors[weight] = (codes[..., 0::2] << 4 | codes[..., 1::2]).reshape(tensors[weight].shape)


def nibbles_exchanged(tensors: Tensors, weight: str) -> None:
    tensors[weight] = tensors[weight] << 4 | tensors[weight] >> 4


def inputs_exchanged(tensors: Tensors, weight: str) -> None:
    """Two inputs and their neighbours exchanged, in codes alone."""
    tensors[weight] = tensors[weight][..., two_exchanged(tensors[weight].shape[-1])].contiguous()


def scales_taken(tensors: Tensors, weight: str, dim: int) -> None:
    """absmax of two groups of outputs, or of two inputs, exchanged."""
    name = f"{weight}.absmax"
    first, second = tensors[name].select(dim, 0).clone(), tensors[name].select(dim, 1).clone()
    tensors[name] = tensors[name].clone()
    tensors[name].select(dim, 0).copy_(second)
    tensors[name].select(dim, 1).copy_(first)


def scales_as_bitsandbytes_has_them(tensors: Tensors, weight: str) -> None:
    name = f"{weight}.absmax"
    tensors[name] = tensors[name].transpose(-2, -1).reshape(tensors[name].shape)


# Those of a source with fused 4-bit experts, whose tensors have other names, and what can go wrong there alone.
OF_FUSED_TENSORS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    **{name: (change, re.sub(r"_projs\\\.(\d)", r"_proj\\[\1\\]", named)) for name, (change, named) in OF_TENSORS.items()},
    **{
        f"{what} of {name}": (lambda t, change=change, name=name: change(t, name), rf"{name}: got \d+ of")
        for name in (W13, W2)
        for what, change in {
            "codes as bitsandbytes has them": turned_again,
            "absmax as bitsandbytes has them": scales_as_bitsandbytes_has_them,
            "nibbles exchanged": nibbles_exchanged,
            "two inputs exchanged": inputs_exchanged,
            "absmax of two groups exchanged": lambda t, name: scales_taken(t, name, 1),
            "absmax of two inputs exchanged": lambda t, name: scales_taken(t, name, 2),
        }.items()
    },
}

# Values other than the embedded model's, by their keys in config.json.
FIELDS: dict[str, object] = {
    "num_experts_per_tok": 3,
    "experts_per_token": 3,
    "num_local_experts": 7,
    "num_hidden_layers": 1,
    "hidden_size": 256,
    "intermediate_size": 384,
    "head_dim": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "vocab_size": 319,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "sliding_window": 32,
    "layer_types": ["full_attention", "sliding_attention"],
    "swiglu_limit": 8.0,
    "swiglu_alpha": 1.6,
    "tie_word_embeddings": True,
    "hidden_act": "gelu",
    "attention_bias": False,
    "attention_dropout": 0.1,
    "eos_token_id": 256,
    "pad_token_id": None,
    "bos_token_id": 0,
    "initial_context_length": 128,
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "dtype": "bfloat16",
    "torch_dtype": "float16",
    "auto_map": {"AutoModel": "code.py"},
    "final_logit_softcapping": 30.0,
}
ROPE: dict[str, object] = {
    "rope_theta": 10000,
    "rope_type": "linear",
    "factor": 16.0,
    "beta_fast": 31.0,
    "beta_slow": 2.0,
    "original_max_position_embeddings": 512,
    "truncate": True,
    "attention_factor": 1.0,
    "low_freq_factor": 1.0,
}
QUANTIZATION: dict[str, object] = {
    "quant_method": "bitsandbytes",
    "format_version": 2,
    "quant_type": "fp4",
    "blocksize": 32,
    "w13_order": "concatenated",
    "requant_mode": "nf4",
    "residual_scale": 0.5,
    "modules_to_not_convert": ["model.layers.0.self_attn.o_proj"],
    "blocks_along": {"model.layers.0.mlp.experts.w13": "outputs"},
    "load_in_4bit": True,
}
