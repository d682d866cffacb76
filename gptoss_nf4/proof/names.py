"""The proof's own table of names, written from the published layouts.

The source's forms are those of Unsloth's repositories (`mlp.experts.gate_up_projs.3.weight`, and a router that is wrapped
or flat) and of transformers' `modeling_gpt_oss.py` (experts fused into one tensor). The result's names are those that
docs/developing.md gives.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from gptoss_nf4.errors import UserError

# What bitsandbytes stores beside a 4-bit weight (`QuantState.as_dict(packed=True)`).
STATES = ("quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4")
SIDECARS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", *STATES)
# What holds a model, or a part of it, adds to names: PEFT, torch.compile, FSDP, data-parallel training, Lightning. Two
# tensors whose names become one are an error.
AROUND = re.compile(r"^.*?(?=model\.(?:layers|embed_tokens|norm)\.|lm_head\.)")
WITHIN = re.compile(r"\b(_orig_mod|module|base_layer|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


@dataclass(frozen=True)
class Form:
    """Names in a source that together make one tensor, in order. `{e}` stands for each expert's number in turn.

    `fused` says that one tensor holds all experts, along its first dimension. Their weights are [in_features, out_features]
    then, as transformers has them.
    """

    names: tuple[str, ...]
    fused: bool = False


@dataclass(frozen=True)
class Entry:
    """One tensor of the result, relative to its layer; what it is; and the forms that a source may have it in.

    `four_bit` is True or False where the result's must or must not be, and None where it is if all of the source's are.
    `gate_and_up` says that its rows are those of two projections, in an order that config.json names.
    """

    kind: str
    target: str
    forms: tuple[Form, ...]
    four_bit: bool | None = False
    gate_and_up: bool = False


LAYER = (
    Entry("input_norm", "input_layernorm.weight", (Form(("input_layernorm.weight",)),)),
    Entry(
        "attention_weight",
        "self_attn.qkv_proj.weight",
        (Form(("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")),),
        four_bit=None,
    ),
    Entry(
        "attention_bias",
        "self_attn.qkv_proj.bias",
        (Form(("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")),),
    ),
    Entry("attention_weight", "self_attn.o_proj.weight", (Form(("self_attn.o_proj.weight",)),), four_bit=None),
    Entry("attention_bias", "self_attn.o_proj.bias", (Form(("self_attn.o_proj.bias",)),)),
    Entry("sinks", "self_attn.sinks", (Form(("self_attn.sinks",)),)),
    Entry("post_attention_norm", "post_attention_layernorm.weight", (Form(("post_attention_layernorm.weight",)),)),
    Entry("router_weight", "mlp.router.weight", (Form(("mlp.router.linear.weight",)), Form(("mlp.router.weight",)))),
    Entry("router_bias", "mlp.router.bias", (Form(("mlp.router.linear.bias",)), Form(("mlp.router.bias",)))),
    Entry(
        "w13_weight",
        "mlp.experts.w13.weight",
        (
            Form(("mlp.experts.gate_up_projs.{e}.weight",)),
            Form(("mlp.experts.gate_up_proj",), fused=True),
        ),
        four_bit=True,
        gate_and_up=True,
    ),
    Entry(
        "w13_bias",
        "mlp.experts.w13.bias",
        (Form(("mlp.experts.gate_up_projs.{e}.bias",)), Form(("mlp.experts.gate_up_proj_bias",), fused=True)),
        gate_and_up=True,
    ),
    Entry(
        "w2_weight",
        "mlp.experts.w2.weight",
        (Form(("mlp.experts.down_projs.{e}.weight",)), Form(("mlp.experts.down_proj",), fused=True)),
        four_bit=True,
    ),
    Entry(
        "w2_bias",
        "mlp.experts.w2.bias",
        (Form(("mlp.experts.down_projs.{e}.bias",)), Form(("mlp.experts.down_proj_bias",), fused=True)),
    ),
)
OUTSIDE = (
    Entry("embedding", "model.embed_tokens.weight", (Form(("model.embed_tokens.weight",)),)),
    Entry("final_norm", "model.norm.weight", (Form(("model.norm.weight",)),)),
    Entry("head", "lm_head.weight", (Form(("lm_head.weight",)),)),
)


@dataclass(frozen=True)
class Pair:
    """A tensor of the result, and those of the source that make it in order. Names are full and without wrappers."""

    entry: Entry
    target: str
    sources: tuple[str, ...]
    fused: bool


def published(name: str) -> str:
    """`name` without what training wraps around names."""
    return AROUND.sub("", WITHIN.sub("", name))


def with_sidecars(name: str, names: Collection[str]) -> list[str]:
    """`name`, and what `names` has of bitsandbytes' tensors beside it."""
    return [name, *(beside for kind in SIDECARS if (beside := f"{name}.{kind}") in names)]


def is_four_bit(name: str, names: Collection[str]) -> bool:
    """Whether bitsandbytes' tensors lie beside `name`."""
    return len(with_sidecars(name, names)) > 1


def pair_up(source: Collection[str], result: Collection[str], layers: int, experts: int) -> list[Pair]:
    """Every tensor of the result with what makes it. UserError where either side lacks one, or has one more."""
    pairs = list(_pairs(source, layers, experts))
    sides = (
        ("source", source, [name for pair in pairs for name in pair.sources]),
        ("result", result, [pair.target for pair in pairs]),
    )
    for side, names, needed in sides:
        if missing := [name for name in needed if name not in names]:
            raise UserError(
                f"missing tensor in the {side}",
                where=missing[0],
                got=f"no such tensor ({len(missing)} in all)",
                expected="every tensor of a gpt-oss",
                next_step="run `dvc repro -f prove`, which converts again" if side == "result" else "save the model again",
            )
        if extra := sorted(set(names).difference(*(with_sidecars(name, names) for name in needed))):
            raise UserError(
                f"unknown tensor in the {side}",
                where=extra[0],
                got=f"a tensor that nothing compares ({len(extra)} in all)",
                expected="only tensors of a gpt-oss",
                next_step="remove what does not belong to the model, and run `dvc repro -f prove`",
            )
    return pairs


def _pairs(source: Collection[str], layers: int, experts: int) -> Iterator[Pair]:
    for prefix, entries in (("", OUTSIDE), *((f"model.layers.{layer}.", LAYER) for layer in range(layers))):
        for entry in entries:
            forms = [(form, tuple(_expanded(prefix, form, experts))) for form in entry.forms]
            # The form of which most is there: where a tensor is missing, its form is still told.
            form, names = max(forms, key=lambda found: sum(name in source for name in found[1]))
            yield Pair(entry, prefix + entry.target, names, form.fused)


def _expanded(prefix: str, form: Form, experts: int) -> Iterator[str]:
    for name in form.names:
        numbers = range(experts) if "{e}" in name else range(1)
        yield from (prefix + name.format(e=e) for e in numbers)
