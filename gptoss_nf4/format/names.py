"""The one table of names: what the tensors of a gpt-oss are called here, and which of them make which fused tensor.

Three kinds of names meet in a conversion:

- *canonical* names, used by everything between reading and writing. They are those of the published split layout, with
  the router where transformers has it now: `mlp.experts.gate_up_projs.3`, `self_attn.q_proj`, `mlp.router.weight`.
- *stored* names, under which a source keeps these tensors. Only the reader of that layout knows them (`source/`).
- *fused* names, under which the converted checkpoint keeps them: `mlp.experts.w13`, `self_attn.qkv_proj`.

Names in this table are relative to `model.layers.{layer}.`; `{e}` stands for an expert's number.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gptoss_nf4.format.dimensions import Dimensions

# What bitsandbytes stores beside a 4-bit weight. The nested ones exist with double quantization only.
SIDECARS = ("absmax", "quant_map")
NESTED_SIDECARS = ("nested_absmax", "nested_quant_map")
STATE_PREFIX = "quant_state.bitsandbytes__"


@dataclass(frozen=True)
class Fusion:
    """`sources` become `target`: stacked along a new first dimension (experts), or joined along rows (q, k, v)."""

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


def prefix(layer: int) -> str:
    return f"model.layers.{layer}."


def layer_of(name: str) -> int | None:
    """The number of the layer that a tensor belongs to. None for a tensor outside the layers."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] and parts[2:3] and parts[2].isdecimal() else None


def parts_of(fusion: Fusion, layer: int, experts: int) -> list[str]:
    """Canonical names of the modules that make `fusion` in `layer`, in order."""
    if fusion.stacked:
        return [prefix(layer) + fusion.sources[0].format(e=e) for e in range(experts)]
    return [prefix(layer) + source for source in fusion.sources]


def target_of(fusion: Fusion, layer: int) -> str:
    """Full fused name of the module that `fusion` makes in `layer`."""
    return prefix(layer) + fusion.target


def weight_shapes(d: Dimensions) -> dict[str, tuple[int, int]]:
    """Logical [out_features, in_features] of every module that a fusion takes, by its name in `Fusion.sources`."""
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


def kept_shapes(d: Dimensions) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's tensors that no fusion takes, by name relative to the layer: router, sinks and norms."""
    return {
        "mlp.router.weight": (d.experts, d.hidden),
        "mlp.router.bias": (d.experts,),
        "self_attn.sinks": (d.heads,),
        "input_layernorm.weight": (d.hidden,),
        "post_attention_layernorm.weight": (d.hidden,),
    }


VOCABULARY_WEIGHTS = ("model.embed_tokens.weight", "lm_head.weight")  # [vocabulary, hidden]


def outside_shapes(d: Dimensions) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors outside the layers, by full name."""
    return {
        "model.embed_tokens.weight": (d.vocabulary, d.hidden),
        "model.norm.weight": (d.hidden,),
        "lm_head.weight": (d.vocabulary, d.hidden),
    }


def modules_of(d: Dimensions, layer: int) -> Iterator[tuple[Fusion, str, tuple[int, int]]]:
    """(fusion, full canonical name, logical shape) of every module of one layer that a fusion takes."""
    shapes = weight_shapes(d)
    for fusion in FUSIONS:
        for number, name in enumerate(parts_of(fusion, layer, d.experts)):
            yield fusion, name, shapes[fusion.sources[0 if fusion.stacked else number]]
