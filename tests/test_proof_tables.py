"""Conversions with a wrong table: consistent in themselves, so that only a proof with tables of its own can find them."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import local
from halves import thinned

from gptoss_nf4.convert import assemble, dequant, normalize, plan, requant
from gptoss_nf4.convert.plan import RequantOptions, Target
from gptoss_nf4.errors import UserError
from gptoss_nf4.fetch import fetch
from gptoss_nf4.flow import convert
from gptoss_nf4.format import names, residual
from gptoss_nf4.format.cast import cast
from gptoss_nf4.source.split import SplitSource

Patch = Callable[[pytest.MonkeyPatch], None]


def joined(*sources: str) -> Patch:
    """q, k and v joined in another order."""

    def patch(monkeypatch):
        qkv = replace(names.FUSIONS[0], sources=tuple(f"self_attn.{source}_proj" for source in sources))
        for module in (names, dequant, fetch):
            monkeypatch.setattr(module, "FUSIONS", (qkv, *names.FUSIONS[1:]))

    return patch


def experts_ordered(order: Callable[[list[str]], list[str]]) -> Patch:
    def patch(monkeypatch):
        original = names.parts_of

        def parts_of(fusion, layer, experts):
            parts = original(fusion, layer, experts)
            return order(parts) if fusion.stacked else parts

        monkeypatch.setattr(names, "parts_of", parts_of)

    return patch


def rows_ordered(order: Callable[[int], np.ndarray], only: str) -> Patch:
    """Rows of each expert's weight, and of its bias, in another order."""

    def patch(monkeypatch):
        def row_order(self, w13_order):
            return order(self.parts[0].shape[0]) if self.name.endswith(only) else slice(None)

        monkeypatch.setattr(Target, "row_order", row_order)

    return patch


def renamed(one: str, other: str) -> Patch:
    """The source's reader takes one tensor for the other, and the other for the one."""

    def patch(monkeypatch):
        original = SplitSource.floating

        def floating(self, name):
            return original(self, name.replace(one, other) if one in name else name.replace(other, one))

        monkeypatch.setattr(SplitSource, "floating", floating)

    return patch


def set_to(module: object, name: str, value: object) -> Patch:
    return lambda monkeypatch: monkeypatch.setattr(module, name, value)


def config_with(change: Callable[[dict], object]) -> Patch:
    def patch(monkeypatch):
        original = assemble.build_config

        def build_config(*arguments):
            config = original(*arguments)
            change(config)
            return config

        monkeypatch.setattr(assemble, "build_config", build_config)

    return patch


def scaled_wrongly(monkeypatch):
    """Double quantization undone a little wrongly."""
    original = SplitSource.absmax
    monkeypatch.setattr(SplitSource, "absmax", lambda *arguments: original(*arguments) * np.float32(1.0001))


def nibbles_exchanged(monkeypatch):
    original = requant.rows_of_blocks
    monkeypatch.setattr(
        requant, "rows_of_blocks", lambda codes, *others: original((codes >> 4) | (codes << 4).astype(np.uint8), *others)
    )


def turned(change: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]) -> Patch:
    """What requant makes of codes and absmax whose blocks run along the outputs, changed."""

    def patch(monkeypatch):
        original = requant.rows_of_outputs
        monkeypatch.setattr(requant, "rows_of_outputs", lambda *arguments: change(*original(*arguments)))

    return patch


def rounded_towards_zero(monkeypatch):
    def truncated(tensor, dtype):
        values, counts = cast(tensor, dtype)
        too_far = values.float().abs() > tensor.float().abs()
        values.view(torch.int16)[too_far] -= 1
        return values, counts

    monkeypatch.setattr(normalize, "cast", truncated)


def dtypes_exchanged(monkeypatch):
    """Values of bfloat16 under the name of float16, whose size is the same."""
    monkeypatch.setattr(normalize, "getattr", lambda module, name: torch.bfloat16, raising=False)


def gate_rows_last(rows: int) -> np.ndarray:
    return np.concatenate([np.arange(1, rows, 2), np.arange(0, rows, 2)])


def swapped_pairs(rows: int) -> np.ndarray:
    return np.arange(rows).reshape(-1, 2)[:, ::-1].reshape(-1)


# name of the mutation -> (what it does to the converter, what the line must name)
TABLES: dict[str, tuple[Patch, str]] = {
    "v before k": (joined("q", "v", "k"), r"qkv_proj\.weight.*k_proj"),
    "v and k before q": (joined("v", "k", "q"), "qkv_proj"),
    "experts reversed": (experts_ordered(lambda parts: parts[::-1]), r"w13\.weight.*gate_up_projs\.0"),
    "experts by the alphabet": (experts_ordered(lambda parts: [*parts[1:], parts[0]]), r"w13\.weight"),
    "rows reversed": (rows_ordered(lambda rows: np.arange(rows)[::-1].copy(), "w2"), "w2"),
    "rows of w13 as two halves": (rows_ordered(lambda rows: np.arange(rows).reshape(2, -1).T.reshape(-1), "w13"), "w13"),
    "up before gate": (rows_ordered(swapped_pairs, "w13"), "w13"),
    "two rows of w2 exchanged": (rows_ordered(lambda rows: np.r_[1, 0, 2:rows], "w2"), "w2"),
    "nibbles exchanged": (nibbles_exchanged, "qkv_proj"),
    "absmax a little larger": (scaled_wrongly, "qkv_proj"),
    "layernorms exchanged": (renamed("input_layernorm", "post_attention_layernorm"), "layernorm"),
    "embedding and head exchanged": (renamed("model.embed_tokens", "lm_head"), "embed_tokens"),
    "biases of k and v exchanged": (renamed("k_proj.bias", "v_proj.bias"), r"qkv_proj\.bias.*k_proj"),
    "a bias of another expert": (renamed("down_projs.3.bias", "down_projs.4.bias"), r"w2\.bias.*down_projs\.3"),
    "a bias for a norm": (renamed("self_attn.o_proj.bias", "input_layernorm.weight"), "input_layernorm"),
    "a norm of another layer": (renamed("layers.0.input_layernorm", "layers.1.input_layernorm"), "input_layernorm"),
    "sinks of another layer": (renamed("layers.0.self_attn.sinks", "layers.1.self_attn.sinks"), "sinks"),
    "a router of another layer": (renamed("layers.0.mlp.router.weight", "layers.1.mlp.router.weight"), r"router\.weight"),
    "a router's bias of another layer": (renamed("layers.0.mlp.router.bias", "layers.1.mlp.router.bias"), r"router\.bias"),
    "final norm from a layer": (renamed("model.norm.weight", "model.layers.0.input_layernorm.weight"), "norm"),
    "rounded towards zero": (rounded_towards_zero, "values that differ from"),
    "another dtype under the name": (dtypes_exchanged, "values that differ from"),
    "another automatic scale": (set_to(residual, "AUTO_FLOAT16", 2.0**-5), "residual_scale"),
    "another scale recorded": (
        config_with(lambda c: c["quantization_config"].update(residual_scale=0.5)),
        "residual_scale",
    ),
    "another method": (set_to(assemble, "QUANT_METHOD", "bitsandbytes"), "quant_method"),
    "another version": (set_to(assemble, "format_version", lambda blocks: 2), "format_version"),
    "another order recorded": (
        config_with(lambda c: c["quantization_config"].update(w13_order="concatenated")),
        "w13_order",
    ),
    "another codebook recorded": (
        config_with(lambda c: c["quantization_config"].update(quant_type="fp4")),
        "qkv_proj.*fp4",
    ),
    **{
        f"{key} not carried": (config_with(lambda c, key=key: c.pop(key)), key)
        for key in ("sliding_window", "hidden_size", "eos_token_id", "num_local_experts")
    },
    **{
        f"{key} changed": (config_with(lambda c, key=key, value=value: c.update({key: value})), key)
        for key, value in {
            "num_experts_per_tok": 2,
            "rms_norm_eps": 2e-5,
            "sliding_window": None,
            "dtype": "bfloat16",
        }.items()
    },
}


# The same for a source with fused 4-bit experts.
FUSED_TABLES: dict[str, tuple[Patch, str]] = {
    "the second of two inputs in the high nibble": (
        turned(lambda codes, absmax: ((codes >> 4) | (codes << 4).astype(np.uint8), absmax)),
        r"w13\.weight.*gate_up_proj\[0\]",
    ),
    "not turned": (
        set_to(requant, "rows_of_outputs", lambda codes, absmax, shape: (codes.reshape(shape[0], -1), absmax)),
        "w1",
    ),
    "absmax not turned": (
        turned(lambda codes, absmax: (codes, np.ascontiguousarray(absmax.T).reshape(absmax.shape))),
        r"w13\.weight",
    ),
    "inputs reversed": (turned(lambda codes, absmax: (codes[:, ::-1].copy(), absmax)), r"w13\.weight"),
    "gate for up": (turned(lambda codes, absmax: (codes[swapped_pairs(len(codes))], absmax)), r"w13\.weight"),
    "groups shifted": (turned(lambda codes, absmax: (codes, np.roll(absmax, 1, 0))), r"w13\.weight"),
    "experts reversed": (experts_ordered(lambda parts: parts[::-1]), r"w13\.weight.*gate_up_proj\[0\]"),
    "direction not recorded": (config_with(lambda c: c["quantization_config"].pop("blocks_along")), "blocks_along"),
    "another version": (set_to(assemble, "format_version", lambda blocks: 1), "format_version"),
    "attention in that direction too": (
        config_with(
            lambda c: c["quantization_config"]["blocks_along"].update({"model.layers.0.self_attn.o_proj": "outputs"})
        ),
        "blocks_along",
    ),
}


@pytest.fixture(autouse=True)
def proof_alone(monkeypatch):
    """The audit before the proof would find some of these too."""
    monkeypatch.setattr("gptoss_nf4.flow.audit", lambda *arguments: {})


@pytest.mark.parametrize("mutation", thinned(TABLES, 4))
def test_a_wrong_table_of_the_converter_is_found(tiny, tmp_path, monkeypatch, mutation):
    patch, named = TABLES[mutation]
    patch(monkeypatch)
    model, artifacts = local(tiny, tmp_path)
    with pytest.raises(UserError, match=named):
        convert(model, artifacts, RequantOptions(), "float16")
    assert artifacts.dense_weights.exists(), "found before the proof, which this test is about"


@pytest.mark.parametrize("mutation", thinned(FUSED_TABLES, 3))
def test_a_wrong_table_of_the_other_direction_is_found(tiny_fused, tmp_path, monkeypatch, mutation):
    patch, named = FUSED_TABLES[mutation]
    patch(monkeypatch)
    model, artifacts = local(tiny_fused, tmp_path)
    with pytest.raises(UserError, match=named):
        convert(model, artifacts, RequantOptions(), "float16")
    assert artifacts.dense_weights.exists(), "found before the proof, which this test is about"


@pytest.mark.parametrize(
    ("mutation", "patch"),
    [
        ("the order is taken for the other one", set_to(plan, "INTERLEAVED", "concatenated")),
        ("up rows first", set_to(plan, "w13_rows", lambda order, rows: gate_rows_last(rows))),
        ("rows stay interleaved", set_to(plan, "w13_rows", lambda order, rows: np.arange(rows))),
    ],
)
def test_a_wrong_order_of_gate_and_up_is_found(tiny, tmp_path, monkeypatch, mutation, patch):
    patch(monkeypatch)
    model, artifacts = local(tiny, tmp_path)
    with pytest.raises(UserError, match=r"the result is not the source's.*w13\.weight"):
        convert(model, artifacts, RequantOptions(w13_order="concatenated"), "float16")


@pytest.mark.parametrize("mutation", thinned(["v before k", "experts reversed", "rows reversed", "up before gate"], 4))
def test_a_wrong_table_is_found_in_mode_nf4_too(tiny, tmp_path, monkeypatch, mutation):
    patch, named = TABLES[mutation]
    patch(monkeypatch)
    model, artifacts = local(tiny, tmp_path)
    with pytest.raises(UserError, match=rf"(?=.*{named}).*rows that have nothing in common with"):
        convert(model, artifacts, RequantOptions(mode="nf4", blocksize=32), "float16")
