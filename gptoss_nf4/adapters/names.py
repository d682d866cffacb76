"""The one table of the forms that keys have: which key stands for lora_A or lora_B of which module.

A key is [base_model.model.]model.layers.{layer}.{form}.lora_{A or B}[.default].weight. The prefix is PEFT's; vLLM removes
it. `default` is the adapter's name, which a training loop that saves its raw state leaves in.

A *target* is a module of the base that an adapter changes. Experts have their fused names, as in the converted checkpoint
(`mlp.experts.w13`). q, k and v are apart, as in the source.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from gptoss_nf4.errors import UserError
from gptoss_nf4.format import names
from gptoss_nf4.format.dimensions import Dimensions

ROUTER = "mlp.router"
W13 = names.W13.target
W2 = names.W2.target
# PEFT wraps the whole experts module once for each parameter. So the name does not tell which parameter it is; shapes do.
FUSED = "gate_up_proj or down_proj"

# Form, relative to the layer -> target. `{e}` is an expert's number.
FORMS = {
    "self_attn.q_proj": "self_attn.q_proj",
    "self_attn.k_proj": "self_attn.k_proj",
    "self_attn.v_proj": "self_attn.v_proj",
    "self_attn.o_proj": "self_attn.o_proj",
    "mlp.router": ROUTER,
    "mlp.router.linear": ROUTER,  # Unsloth's 4-bit model, whose router keeps its weight in a module of its own
    "mlp.experts.gate_up_projs.{e}": W13,  # Unsloth's 4-bit model: a module for each expert
    "mlp.experts.down_projs.{e}": W2,
    "mlp.experts": FUSED,  # PEFT's target_parameters: the outer wrapper, or the only one
    "mlp.experts.base_layer": FUSED,  # the inner one of two
}
# The fused parameters by PEFT's names.
PARAMETERS = {"gate_up_proj": W13, "down_proj": W2}
INNER = "mlp.experts.base_layer"

# torch.compile, FSDP and activation checkpointing put these into names.
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<module>model\.layers\.(?P<layer>\d{1,6})\.(?P<form>[\w.]+?))"
    r"\.lora_(?P<side>[AB])(?:\.default)?\.weight"
)
EXPERT = re.compile(r"(?<=projs\.)\d{1,6}$")

# Part of a key of something that is not served -> what that is.
FOREIGN = {
    "lora_magnitude_vector": "DoRA",
    "lora_embedding_": "an embedding",
    "embed_tokens": "an embedding",
    "lm_head": "the head",
    "modules_to_save": "a module trained as a whole",
    "lora_B.bias": "a bias of lora_B",
    "lora_diag": "KaSA",
    "lora_monteclora": "MonteCLoRA",
}


@dataclass(frozen=True)
class Place:
    """The module that a pair of lora_A and lora_B belongs to."""

    layer: int
    module: str
    """Its full name in the model that was trained, as PEFT's patterns see it."""
    form: str
    """A key of FORMS."""
    expert: int | None
    """The expert's number where the module is one expert's, as Unsloth has them. Else None."""


@dataclass(frozen=True)
class Pair:
    """The keys of lora_A and lora_B of one place."""

    place: Place
    a: str
    b: str


def target_shapes(d: Dimensions) -> dict[str, tuple[int, int]]:
    """[out, in] of every target, in the order of reports. For w13 and w2 it is that of one expert."""
    shapes = names.weight_shapes(d)
    attention = {name: shape for name, shape in shapes.items() if name in FORMS and "experts" not in name}
    experts = {fusion.target: shapes[fusion.sources[0]] for fusion in (names.W13, names.W2)}
    return attention | {ROUTER: (d.experts, d.hidden)} | experts


def pair_keys(keys: Iterable[str], d: Dimensions, where: object) -> list[Pair]:
    """All keys in pairs of lora_A and lora_B, sorted by layer. UserError for an unknown key and for one alone."""
    found: dict[Place, dict[str, str]] = {}
    for key in keys:
        place, side = _parse(key, d, where)
        sides = found.setdefault(place, {})
        if side in sides:
            raise UserError(
                "duplicated tensor",
                where=where,
                got=f"{sides[side][:200]} and {key[:200]}",
                expected=f"one lora_{side} of {place.module}",
                next_step="save the adapter again",
            )
        sides[side] = key
    for place, sides in found.items():
        if len(sides) == 1:
            (present,) = sides
            raise UserError(
                "missing tensor",
                where=where,
                got=f"lora_{present} of {place.module} alone",
                expected="lora_A and lora_B",
                next_step="save the adapter again",
            )
    if not found:
        raise UserError(
            "no adapter", where=where, got="no tensors", expected="lora_A and lora_B", next_step="save the adapter again"
        )
    pairs = [Pair(place, sides["A"], sides["B"]) for place, sides in found.items()]
    return sorted(pairs, key=lambda pair: (pair.place.layer, pair.place.form, pair.place.expert or 0))


def _parse(key: str, d: Dimensions, where: object) -> tuple[Place, str]:
    """(place, "A" or "B") that a key names. UserError for a key that cannot be served."""

    def refuse(what: str, expected: str, next_step: str) -> UserError:
        return UserError(what, where=where, got=key[:200], expected=expected, next_step=next_step)

    plain = key
    for wrapper in WRAPPERS:
        plain = plain.replace(wrapper, "")
    foreign = next((what for part, what in FOREIGN.items() if part in plain), None)
    if foreign:
        raise refuse(f"adapter not supported ({foreign})", "attention, router and experts only", "train without it")
    match = KEY.fullmatch(plain)
    form = EXPERT.sub("{e}", match["form"]) if match else ""
    if match is None or form not in FORMS:
        modules = ", ".join(FORMS)
        raise refuse("unknown adapter key", f"lora_A or lora_B of {modules}", "train these modules only")
    number = EXPERT.search(match["form"])
    layer, expert = int(match["layer"]), int(number[0]) if number else None
    if layer >= d.layers:
        raise refuse("unknown layer", f"layers 0 to {d.layers - 1}", "use the base that the adapter was trained on")
    if expert is not None and expert >= d.experts:
        raise refuse("unknown expert", f"experts 0 to {d.experts - 1}", "use the base that the adapter was trained on")
    return Place(layer, match["module"], form, expert), match["side"]
