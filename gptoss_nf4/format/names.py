"""The one table of names: which modules of the split layout make which module of the fused checkpoint.

Every name here is relative to `model.layers.{layer}.`; `{e}` stands for an expert's number.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gptoss_nf4.format.dimensions import Dimensions

SIDECARS = ("absmax", "quant_map")
NESTED_SIDECARS = ("nested_absmax", "nested_quant_map")
STATE_PREFIX = "quant_state.bitsandbytes__"


@dataclass(frozen=True)
class Fusion:
    """`sources` become `target`: stacked along a new first dimension (experts) or joined along rows (q, k, v)."""

    target: str
    sources: tuple[str, ...]
    stacked: bool


W13 = Fusion("mlp.experts.w13", ("mlp.experts.gate_up_projs.{e}",), stacked=True)
W2 = Fusion("mlp.experts.w2", ("mlp.experts.down_projs.{e}",), stacked=True)
FUSIONS = (
    Fusion("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), stacked=False),
    Fusion("self_attn.o_proj", ("self_attn.o_proj",), stacked=False),
    W13,
    W2,
)

# Floating tensors that keep their shape: source name -> name in the fused checkpoint.
RENAMED = {
    "mlp.router.linear.weight": "mlp.router.weight",
    "mlp.router.linear.bias": "mlp.router.bias",
    "self_attn.sinks": "self_attn.sinks",
    "input_layernorm.weight": "input_layernorm.weight",
    "post_attention_layernorm.weight": "post_attention_layernorm.weight",
}
OUTSIDE_LAYERS = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")


def prefix(layer: int) -> str:
    return f"model.layers.{layer}."


def layer_of(name: str) -> int | None:
    """The layer that a tensor belongs to, None for those outside the layers."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] and parts[2:3] and parts[2].isdecimal() else None


def parts_of(fusion: Fusion, layer: int, experts: int) -> list[str]:
    """Full names of the source modules that make `fusion` in `layer`, in order."""
    if fusion.stacked:
        return [prefix(layer) + fusion.sources[0].format(e=e) for e in range(experts)]
    return [prefix(layer) + source for source in fusion.sources]


def target_of(fusion: Fusion, layer: int) -> str:
    return prefix(layer) + fusion.target


def weight_shapes(d: Dimensions) -> dict[str, tuple[int, int]]:
    """Logical [out_features, in_features] of every source module that a fusion takes."""
    return {
        "self_attn.q_proj": (d.q_rows, d.hidden),
        "self_attn.k_proj": (d.kv_rows, d.hidden),
        "self_attn.v_proj": (d.kv_rows, d.hidden),
        "self_attn.o_proj": (d.hidden, d.q_rows),
        "mlp.experts.gate_up_projs.{e}": (2 * d.intermediate, d.hidden),
        "mlp.experts.down_projs.{e}": (d.hidden, d.intermediate),
    }


def fused_shape(fusion: Fusion, shapes: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """Logical [experts, rows, in_features] or [rows, in_features] of what `fusion` makes of modules with these shapes."""
    rows, columns = shapes[0]
    return (len(shapes), rows, columns) if fusion.stacked else (sum(rows for rows, _ in shapes), columns)


def renamed_shapes(d: Dimensions) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in RENAMED, by source name."""
    return {
        "mlp.router.linear.weight": (d.experts, d.hidden),
        "mlp.router.linear.bias": (d.experts,),
        "self_attn.sinks": (d.heads,),
        "input_layernorm.weight": (d.hidden,),
        "post_attention_layernorm.weight": (d.hidden,),
    }


def outside_shapes(d: Dimensions) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in OUTSIDE_LAYERS."""
    return {
        "model.embed_tokens.weight": (d.vocabulary, d.hidden),
        "model.norm.weight": (d.hidden,),
        "lm_head.weight": (d.vocabulary, d.hidden),
    }


def source_modules(d: Dimensions, layer: int) -> Iterator[tuple[Fusion, str, tuple[int, int]]]:
    """(fusion, full source module name, logical shape) of one layer."""
    shapes = weight_shapes(d)
    for fusion in FUSIONS:
        for number, name in enumerate(parts_of(fusion, layer, d.experts)):
            yield fusion, name, shapes[fusion.sources[0 if fusion.stacked else number]]
