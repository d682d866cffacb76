"""The proof: what it finds, in results that were changed and in conversions whose tables were."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import edit_shard, local, make_dense
from project_imports import ROOT, direct_imports
from proof_cases import ASKED, all_tensors, config_changed, proved, require_found, rewritten
from proof_mutations import OF_TENSORS, last_bit
from safetensors import safe_open
from safetensors.torch import save_file

from gptoss_nf4.convert.plan import RequantOptions
from gptoss_nf4.flow import convert
from gptoss_nf4.proof.compare import difference, places
from gptoss_nf4.proof.config import Asked
from gptoss_nf4.proof.progress import Progress
from gptoss_nf4.proof.prove import prove

ALLOWED = ("errors", "proof", "storage.checkpoint", "storage.machine", "storage.reading", "storage.tensor_reader")


# What it lets pass


@pytest.mark.parametrize("source", ["tiny", "massive"])
@pytest.mark.parametrize("mode", ["exact", "nf4"])
@pytest.mark.parametrize("order", ["interleaved", "concatenated"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_conversion_passes_and_every_tensor_is_counted(request, source, mode, order, dtype, tmp_path):
    source = request.getfixturevalue(source)
    model, artifacts = local(source, tmp_path)
    options = RequantOptions(mode=mode, w13_order=order, blocksize=64 if mode == "exact" else 32)
    report = convert(model, artifacts, options, dtype)
    names: dict[Path, dict[str, int]] = {}
    for directory in (source, artifacts.checkpoint):
        found = names[directory] = {}
        for file in directory.glob("*.safetensors"):
            with safe_open(file, "pt") as opened:
                found |= {name: torch.Size(opened.get_slice(name).get_shape()).numel() for name in opened.keys()}  # noqa: SIM118
    before, after = names.values()
    assert (report["source_tensors"], report["result_tensors"]) == (len(before), len(after))
    sidecars = ("absmax", "quant_map", "bitsandbytes__nf4")
    values = {name: size for name, size in after.items() if not name.endswith(sidecars)}
    assert report["compared"] == sum(2 * size if f"{name}.absmax" in after else size for name, size in values.items())
    assert sum(kind["compared"] for kind in report["by_kind"].values()) == report["compared"]
    ends = ("weight", "bias", "sinks")
    assert sum(kind["tensors"] for kind in report["by_kind"].values()) == sum(name.endswith(ends) for name in before)
    quantized_again = {kind for kind, counts in report["by_kind"].items() if counts["different"]}
    assert quantized_again == (set() if mode == "exact" else {"attention_weight", "w13_weight", "w2_weight"})


LAYOUTS = {
    "a flat router": lambda name: name.replace("router.linear.", "router."),
    "PEFT": lambda name: re.sub(r"(_proj(s\.\d+)?)\.", r"\1.base_layer.", f"base_model.model.{name}"),
    "torch.compile": lambda name: f"_orig_mod.{name}".replace("layers.", "layers._orig_mod."),
    "both, and data parallel": lambda name: f"module._orig_mod.base_model.model.{name}",
}


@pytest.mark.parametrize("rename", LAYOUTS.values(), ids=LAYOUTS)
def test_published_names_are_known_whatever_was_wrapped_around_them(tiny, converted, tmp_path, rename):
    def change(tensors):
        renamed = {rename(name): tensor for name, tensor in tensors.items()}
        assert renamed.keys() != tensors.keys()
        tensors.clear()
        tensors |= renamed

    source = rewritten(tiny, tmp_path / "source", change)
    assert proved(source, converted).source_tensors == len(all_tensors(tiny))


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
def test_codes_may_be_stored_as_any_dtype(tiny, converted, tmp_path, storage):
    def change(tensors):
        codes = [name for name in tensors if f"{name}.absmax" in tensors]
        tensors |= {name: tensors[name].flatten().view(storage).view(-1, 1) for name in codes}

    assert proved(rewritten(tiny, tmp_path / "source", change), converted).total.different == 0


def fused_experts(tensors: dict, make: Callable[[torch.Tensor], dict[str, torch.Tensor]]) -> None:
    """Give `tensors` transformers' fused experts: `make` gets a weight [experts, in, out], and its tensors by ending."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    for layer in range(2):
        for split, fused in (("gate_up_projs", "gate_up_proj"), ("down_projs", "down_proj")):
            weights, biases = [], []
            for expert in range(8):
                prefix = f"model.layers.{layer}.mlp.experts.{split}.{expert}."
                beside = [name for name in tensors if name.startswith(f"{prefix}weight.")]
                state = QuantState.from_dict({name: tensors.pop(name) for name in beside}, device="cpu")
                state.dtype = torch.float32
                weights.append(dequantize_4bit(tensors.pop(f"{prefix}weight"), state).T)
                biases.append(tensors.pop(f"{prefix}bias"))
            name = f"model.layers.{layer}.mlp.experts.{fused}"
            tensors[f"{name}_bias"] = torch.stack(biases)
            tensors |= {name + ending: tensor for ending, tensor in make(torch.stack(weights)).items()}


def test_fused_experts_are_compared_too(tiny, converted, tmp_path):
    """transformers' [experts, in, out], here with the values that the split source has."""
    source = rewritten(tiny, tmp_path / "source", lambda t: fused_experts(t, lambda weight: {"": weight.contiguous()}))
    assert proved(source, converted).total.different == 0
    swapped = rewritten(
        tiny, tmp_path / "swapped", lambda t: fused_experts(t, lambda weight: {"": weight.flip(0).contiguous()})
    )
    require_found(swapped, converted, r"w13\.weight: got \d+ of 122880 values .*gate_up_proj\[0\]")


def test_fused_4_bit_experts_are_compared_with_what_was_made_of_them(tiny, converted, tmp_path):
    """Blocks along the outputs, double quantization over all experts. bitsandbytes makes the result of it."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    made: dict[tuple, torch.Tensor] = {}

    def make(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        codes, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
        made[tuple(weight.shape), len(made)] = dequantize_4bit(codes, state).transpose(1, 2).contiguous()
        return {"": codes} | {f".{key}": value for key, value in state.as_dict(packed=True).items()}

    source = rewritten(tiny, tmp_path / "source", lambda t: fused_experts(t, make))
    weights = iter(made.values())

    def change(tensors):
        for layer in range(2):
            for target in ("w13", "w2"):
                name = f"model.layers.{layer}.mlp.experts.{target}.weight"
                codes, state = quantize_4bit(next(weights), quant_type="nf4")
                tensors[name] = codes.view(tensors[name].shape)
                tensors[f"{name}.absmax"] = state.absmax.view(tensors[f"{name}.absmax"].shape)

    again = Asked("nf4", "interleaved", "nf4", 64, "float16", "auto")
    result = rewritten(
        converted, tmp_path / "result", change, lambda c: c["quantization_config"].update(requant_mode="nf4")
    )
    found = proved(source, result, again)
    assert found.kinds["w13_weight"].difference.different > 0
    assert found.kinds["w13_bias"].difference.different == 0
    reversed_ = rewritten(
        result,
        tmp_path / "reversed",
        lambda t: t.update({name: t[name].flip(0).contiguous() for name in t if "w2.weight" in name and t[name].dim() > 1}),
    )
    require_found(
        source, reversed_, r"w2\.weight: got \d+ of 192 rows that have nothing in common with .*down_proj\[0\]", again
    )


# What it finds in a result


@pytest.mark.parametrize("mutation", OF_TENSORS)
def test_a_changed_result_is_found(tiny, converted, tmp_path, mutation):
    change, named = OF_TENSORS[mutation]
    result = rewritten(converted, tmp_path / "result", change)
    require_found(tiny, result, named)


def test_an_unchanged_one_passes(tiny, converted, tmp_path):
    """So the tests above could fail."""
    assert proved(tiny, rewritten(converted, tmp_path / "result", dict)).total.different == 0


@pytest.mark.parametrize("mutation", [m for m in OF_TENSORS if any(w in m for w in ("exchanged", "reversed", "halves"))])
def test_what_lies_elsewhere_is_found_in_mode_nf4_too(tiny, tmp_path, mutation, request):
    """There weights differ anyway, but a row of another place has nothing in common with the source's."""
    again = Asked("nf4", "interleaved", "nf4", 32, "float16", "auto")
    origin = request.getfixturevalue("quantized_again")
    change, named = OF_TENSORS[mutation]
    require_found(tiny, rewritten(origin, tmp_path / "result", change), named, again)


@pytest.fixture(scope="module")
def quantized_again(tiny, tmp_path_factory) -> Path:
    model, artifacts = local(tiny, tmp_path_factory.mktemp("again"))
    convert(model, artifacts, RequantOptions(mode="nf4", blocksize=32), "float16")
    return artifacts.checkpoint


def test_dense_attention_is_compared_after_rounding(source_copy, tmp_path):
    """k alone is left in 16 bit, so q, k and v are joined dense. A change of any of them, and of the list, is found."""
    k_proj, fused = "model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.qkv_proj"
    edit_shard(source_copy, 1, lambda t: make_dense(t, k_proj))
    model, artifacts = local(source_copy, tmp_path / "artifacts")
    convert(model, artifacts, RequantOptions(), "float16")
    found = proved(source_copy, artifacts.checkpoint)
    assert found.kinds["attention_weight"].difference.different == 0
    changed = rewritten(artifacts.checkpoint, tmp_path / "changed", lambda t: last_bit(t, f"{fused}.weight"))
    require_found(source_copy, changed, rf"{fused}\.weight: got 1 of")
    unlisted = config_changed(
        artifacts.checkpoint, tmp_path / "unlisted", lambda c: c["quantization_config"].update(modules_to_not_convert=[])
    )
    require_found(source_copy, unlisted, "modules_to_not_convert")


def test_a_tensor_of_the_source_that_nothing_compares_is_found(tiny, converted, tmp_path):
    name = "model.layers.0.self_attn.q_norm.weight"
    source = rewritten(tiny, tmp_path / "source", lambda t: t.update({name: torch.ones(64)}))
    require_found(source, converted, f"unknown tensor in the source: {name}")


def test_a_tensor_that_the_source_lacks_is_found(tiny, converted, tmp_path):
    name = "model.layers.1.mlp.experts.down_projs.3.bias"
    require_found(
        rewritten(tiny, tmp_path / "source", lambda t: t.pop(name)), converted, f"missing tensor in the source: {name}"
    )


def test_a_file_that_the_index_does_not_name_is_found(tiny, converted, tmp_path):
    shutil.copytree(converted, tmp_path / "result")
    save_file({"model.layers.2.self_attn.sinks": torch.ones(4)}, tmp_path / "result/layer-2.safetensors")
    require_found(tiny, tmp_path / "result", r"index does not name: .*layer-2\.safetensors")


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_a_copied_file_that_is_no_copy_is_found(tiny, converted, tmp_path, name):
    shutil.copytree(converted, tmp_path / "result")
    (tmp_path / "result" / name).write_text("{}")
    require_found(tiny, tmp_path / "result", f"file is not the source's: .*{name}")


# Its parts


def test_rows_of_gate_and_up_lie_where_transformers_takes_them_from():
    """transformers `modeling_gpt_oss.py`: gate is gate_up[..., ::2], up is gate_up[..., 1::2]."""
    source = torch.arange(12)
    for order, stored in (("interleaved", source), ("concatenated", torch.cat([source[::2], source[1::2]]))):
        for first in (0, 4):
            rows = source[first : first + 4]
            for which, place in places(order, 12, first):
                assert torch.equal(rows[which], stored[place : place + len(rows[which])])


def test_differences_are_counted():
    before = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    after = torch.tensor([[1.0, 2.0, 3.5], [-4.0, 5.0, float("nan")]])
    found = difference(before, after)
    assert (found.compared, found.different, found.largest_difference, found.unrelated_rows) == (6, 3, float("inf"), 1)
    rounded = torch.tensor([[1 + 2.0**-12]])
    assert difference(rounded, rounded.half()).different == 0
    assert difference(rounded, rounded.half() + 2.0**-10).different == 1


def test_progress_says_how_many_bytes_are_done(monkeypatch):
    monkeypatch.setattr("gptoss_nf4.proof.progress.SECONDS_BETWEEN_LINES", 0)
    lines = []
    with Progress(4_000_000_000, lines.append) as progress:
        progress.advance(1_000_000_000)
        progress.advance(3_000_000_000)
    assert [line.split(",")[0] for line in lines] == ["1.0 of 4.0 GB", "4.0 of 4.0 GB"]


def test_progress_ends_with_all_bytes(tiny, converted, monkeypatch):
    counts = []
    monkeypatch.setattr(Progress, "advance", lambda self, count: counts.append(count))
    totals = []
    monkeypatch.setattr(Progress, "__init__", lambda self, total, say: totals.append(total))
    monkeypatch.setattr(Progress, "__exit__", lambda *arguments: None)
    prove(tiny, converted, ASKED)
    data = sum(tensor.nbytes for directory in (tiny, converted) for tensor in all_tensors(directory).values())
    assert [sum(counts)] == totals == [data]


def test_the_proof_knows_nothing_of_the_conversion():
    """Neither by its imports nor by what is in memory once it is imported: of `format`, only what reads headers."""
    for file in (ROOT / "gptoss_nf4/proof").glob("*.py"):
        ours = {name.removeprefix("gptoss_nf4.") for name in direct_imports(file) if name.startswith("gptoss_nf4.")}
        assert all(name.startswith(ALLOWED) for name in ours), file
    code = "import sys, gptoss_nf4.proof.prove; print(*(m for m in sys.modules if m.startswith('gptoss_nf4.')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.removeprefix("gptoss_nf4.") for name in done.stdout.split()}
    assert {name for name in loaded if not name.startswith(("errors", "proof", "storage"))} == {"format", "format.dtypes"}
