"""Adapters in every order that their factors may have, on small models that hypothesis draws, in float64.

What a factor means is written here once more, an element at a time: PEFT 0.21 `ParamWrapper.get_delta_weight` has rank j of
expert e in row e * r + j of lora_A and in column j * E + e of lora_B.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_nf4.adapters.adapter import Adapter
from gptoss_nf4.adapters.canonical import deltas
from gptoss_nf4.adapters.config import AdapterConfig
from gptoss_nf4.adapters.peft_form import write_peft_form
from gptoss_nf4.format.dimensions import Dimensions

PREFIX = "base_model.model.model.layers.0."
HALF = settings(max_examples=settings().max_examples // 2)


@dataclass
class Drawn:
    """An adapter of one layer, and what it adds to each weight of the base: float64 [out, in], of experts [E, out, in]."""

    d: Dimensions
    config: dict
    tensors: dict[str, torch.Tensor]
    added: dict[str, torch.Tensor]


@st.composite
def adapters(draw: st.DrawFn) -> Drawn:
    heads, head_dim = draw(st.integers(1, 2)) * 2, draw(st.sampled_from([2, 4, 6]))
    sizes = draw(st.lists(st.integers(2, 11), min_size=2, max_size=2, unique=True))
    hidden, intermediate = (2 * size + 1 for size in sizes)  # odd, so no size of q, k, v or w13 equals theirs
    d = Dimensions(
        layers=1, hidden=hidden, intermediate=intermediate, experts=draw(st.integers(1, 4)), experts_per_token=1,
        heads=heads, kv_heads=heads // 2, head_dim=head_dim, vocabulary=8,
    )  # fmt: skip
    rank, alpha = draw(st.integers(1, 4)), draw(st.sampled_from([1, 3, 16]))
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "use_rslora": draw(st.booleans()), "rank_pattern": {}}
    drawn = Drawn(d, config, {}, {})
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    modules = draw(st.sets(st.sampled_from(["q_proj", "k_proj", "v_proj", "o_proj"])))
    for module in sorted(modules):
        out, columns = {"q_proj": (d.q_rows, hidden), "o_proj": (hidden, d.q_rows)}.get(module, (d.kv_rows, hidden))
        a, b = _pair(drawn, f"self_attn.{module}", draw(st.integers(1, 4)), columns, out, generator)
        drawn.added[f"model.layers.0.self_attn.{module}"] = _product(a, b) * _scale(config, a.shape[0])
    form = draw(st.sampled_from(["none", "fused", "split"] if modules else ["fused", "split"]))
    if form == "fused":
        config["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        swapped, grouped = draw(st.booleans()), draw(st.booleans())
        if grouped:
            config["lora_B_layout"] = "grouped_by_expert"
        _fused(drawn, "experts.w13", "mlp.experts.base_layer", (2 * intermediate, hidden), swapped, grouped, generator)
        _fused(drawn, "experts.w2", "mlp.experts", (hidden, intermediate), swapped, grouped, generator)
    elif form == "split":
        shapes = {"gate_up_projs": ("w13", 2 * intermediate, hidden), "down_projs": ("w2", hidden, intermediate)}
        for module in sorted(draw(st.sets(st.sampled_from(sorted(shapes)), min_size=1))):
            target, out, columns = shapes[module]
            total = torch.zeros(d.experts, out, columns, dtype=torch.float64)
            for expert in draw(st.sets(st.integers(0, d.experts - 1), min_size=1)):
                key = f"mlp.experts.{module}.{expert}"
                a, b = _pair(drawn, key, draw(st.integers(1, 4)), columns, out, generator)
                total[expert] = _product(a, b) * _scale(config, a.shape[0])
            drawn.added[f"model.layers.0.mlp.experts.{target}"] = total
    return drawn


def _pair(drawn: Drawn, module: str, rank: int, columns: int, out: int, generator: torch.Generator):
    """Random lora_A [rank, columns] and lora_B [out, rank] of `module`, put into the adapter."""
    a, b = torch.randn(rank, columns, generator=generator), torch.randn(out, rank, generator=generator)
    drawn.tensors |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
    drawn.config["rank_pattern"][f"model.layers.0.{module}"] = rank
    return a, b


def _fused(drawn, target, module, shape, swapped, grouped, generator) -> None:
    experts, rank = drawn.d.experts, drawn.config["r"]
    out, columns = shape[::-1] if swapped else shape
    a, b = _pair(drawn, module, experts * rank, columns, out, generator)
    del drawn.config["rank_pattern"][f"model.layers.0.{module}"]
    total = torch.zeros(experts, out, columns, dtype=torch.float64)
    for e in range(experts):
        for j in range(rank):
            column = b[:, e * rank + j if grouped else j * experts + e]
            total[e] += column.double()[:, None] * a[e * rank + j].double()[None, :]
    total = total.mT if swapped else total
    drawn.added[f"model.layers.0.mlp.{target}"] = total * _scale(drawn.config, rank)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return sum(b[:, j].double()[:, None] * a[j].double()[None, :] for j in range(a.shape[0]))


def _scale(config: dict, rank: int) -> float:
    return config["lora_alpha"] / (rank**0.5 if config["use_rslora"] else rank)


@HALF
@given(adapters())
def test_deltas_are_the_products_that_peft_defines(drawn):
    config = AdapterConfig.from_dict(drawn.config, "drawn")
    found = {delta.name: delta for delta in deltas(config, drawn.tensors, drawn.d)}
    assert found.keys() == drawn.added.keys()
    with tempfile.TemporaryDirectory() as directory:  # what PEFT reads, of the same product
        write_peft_form(found, drawn.d, Path(directory))
        again = Adapter(Path(directory)).layer(drawn.d, 0)
    for name, delta in found.items():
        expected = drawn.added[name]
        for one in (delta, again[name]):
            assert (one.b.double() @ one.a.double() - expected).norm() <= 1e-6 * expected.norm()
        norm = expected.norm()
        assert abs(delta.frobenius_norm() - norm) <= 1e-6 * norm
    assert all(name in drawn.added or not delta.b.any() for name, delta in again.items())
