"""The proof: what it finds, in results that were changed and in conversions whose tables were."""

import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import edit_shard, local, make_dense
from halves import thinned
from project_imports import ROOT, direct_imports
from proof_cases import ASKED, all_tensors, config_changed, proved, require_found, rewritten
from proof_mutations import OF_FUSED_TENSORS, OF_TENSORS, last_bit
from safetensors import safe_open
from safetensors.torch import save_file

from gptoss_nf4.convert.plan import RequantOptions
from gptoss_nf4.errors import UserError
from gptoss_nf4.flow import convert
from gptoss_nf4.proof import stored
from gptoss_nf4.proof.compare import difference, places
from gptoss_nf4.proof.config import Asked
from gptoss_nf4.proof.pair import Fault
from gptoss_nf4.proof.prove import Exactness, prove, require_proved
from gptoss_nf4.proof.stored import Dense, FourBit, Matrix
from gptoss_nf4.storage.checkpoint import Checkpoint
from gptoss_nf4.storage.progress import Progress

ALLOWED = (
    "eager_bnb",
    "errors",
    "proof",
    "storage.checkpoint",
    "storage.machine",
    "storage.progress",
    "storage.reading",
    "storage.tensor_reader",
)


SOURCES, MODES, ORDERS = ("tiny", "massive"), ("exact", "nf4"), ("interleaved", "concatenated")
MOVES = [name for name in OF_TENSORS if any(word in name for word in ("exchanged", "reversed", "halves"))]
CONVERSIONS = itertools.product(SOURCES, MODES, ORDERS, ("float16", "bfloat16", "float32"))


@pytest.fixture(autouse=True)
def pieces_of_a_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As there are in a large model: what follows the first piece of a matrix is compared in another way."""
    monkeypatch.setattr(stored, "PIECE_VALUES", 1 << 12)


# What it lets pass


@pytest.mark.parametrize(("source", "mode", "order", "dtype"), thinned(CONVERSIONS, 5))
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
    assert sum(kind["compared"] for kind in report["by_kind"]) == report["compared"]
    ends = ("weight", "bias", "sinks")
    assert sum(kind["tensors"] for kind in report["by_kind"]) == sum(name.endswith(ends) for name in before)
    quantized_again = {kind["kind"] for kind in report["by_kind"] if kind["different"]}
    assert quantized_again == (set() if mode == "exact" else {"attention_weight", "w13_weight", "w2_weight"})


# What it finds in a result


@pytest.mark.parametrize("mutation", thinned(OF_TENSORS, 4))
def test_a_changed_result_is_found(tiny, converted, tmp_path, mutation):
    change, named = OF_TENSORS[mutation]
    result = rewritten(converted, tmp_path / "result", change)
    require_found(tiny, result, named)


@pytest.mark.parametrize("mutation", thinned(OF_FUSED_TENSORS, 4))
def test_a_changed_result_of_fused_experts_is_found(tiny_fused, converted_fused, tmp_path, mutation):
    change, named = OF_FUSED_TENSORS[mutation]
    require_found(tiny_fused, rewritten(converted_fused, tmp_path / "result", change), named)


@pytest.mark.parametrize(
    "change",
    [
        lambda q: q.pop("blocks_along"),
        lambda q: q.update(format_version=1),
        lambda q: q["blocks_along"].pop("model.layers.1.mlp.experts.w2"),
        lambda q: q["blocks_along"].update({"model.layers.1.mlp.experts.w2": "inputs"}),
        lambda q: q["blocks_along"].update({"model.layers.1.self_attn.o_proj": "outputs"}),
    ],
)
def test_another_direction_of_blocks_in_config_json_is_found(tiny_fused, converted_fused, tmp_path, change):
    result = config_changed(converted_fused, tmp_path / "result", lambda c: change(c["quantization_config"]))
    require_found(tiny_fused, result, r"quantization_config\.(blocks_along|format_version)")


def test_an_unchanged_one_passes(tiny, converted, tmp_path):
    """So the tests above could fail."""
    assert proved(tiny, rewritten(converted, tmp_path / "result", dict)).total.different == 0


def test_an_unchanged_one_of_fused_experts_passes(tiny_fused, converted_fused, tmp_path):
    found = proved(tiny_fused, rewritten(converted_fused, tmp_path / "result", dict))
    assert found.total.different == 0
    compared = {kind: found.kinds[kind].difference.compared for kind in ("w13_weight", "w2_weight")}
    assert compared == {"w13_weight": 2 * 8 * 640 * 192, "w2_weight": 2 * 8 * 192 * 320}


@pytest.mark.parametrize("mutation", thinned(MOVES, 4))
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


def test_a_tokenizer_that_is_no_copy_is_found(tiny, converted, tmp_path):
    shutil.copytree(converted, tmp_path / "result")
    (tmp_path / "result/tokenizer.json").write_text("{}")
    require_found(tiny, tmp_path / "result", r"file is not the source's: .*tokenizer\.json")


# Its parts


def test_rows_of_gate_and_up_lie_where_transformers_takes_them_from():
    """transformers `modeling_gpt_oss.py`: gate is gate_up[..., ::2], up is gate_up[..., 1::2]."""
    source = torch.arange(12)
    for order, laid in (("interleaved", source), ("concatenated", torch.cat([source[::2], source[1::2]]))):
        for first in (0, 4):
            rows = source[first : first + 4]
            for which, place in places(order, 12, first):
                assert torch.equal(rows[which], laid[place : place + len(rows[which])])


def test_the_first_fault_is_named_and_the_others_counted(tmp_path):
    found = Exactness(3, 3)
    require_proved(found, tmp_path)
    for count, told in ((1, "2 of 8 values"), (2, r"2 of 8 values \(2 faults in all\)"), (3, r".*\(3 faults in all\)")):
        found.faults.append(Fault(f"w{count}", "2 of 8 values"))
        with pytest.raises(UserError, match=f"the result is not the source's: {tmp_path}: w1: got {told}, expected none"):
            require_proved(found, tmp_path)


def four_bit(codes: torch.Tensor, absmax: torch.Tensor, blocksize: int = 4, quant_type: str = "nf4") -> FourBit:
    shape, taken = (1, 2 * len(codes)), codes.numpy()
    return FourBit(shape, (quant_type, blocksize), lambda: absmax, lambda first, last: taken[first:last])


def test_the_same_bytes_are_seen_and_nothing_else_is():
    codes, absmax = torch.arange(12, dtype=torch.uint8), torch.arange(1.0, 7.0)  # 6 blocks of 4 values
    moved = four_bit(torch.cat([codes[4:], codes[:4]]), torch.cat([absmax[2:], absmax[:2]]))  # by two blocks
    one = four_bit(codes, absmax)
    assert one.same_bytes(8, 24, moved, 0)
    assert one.same_bytes(8, 21, moved, 0)  # a last block, and a last byte, of which not all is asked for
    assert moved.same_bytes(0, 16, one, 8)
    assert not one.same_bytes(8, 24, moved, 4)
    assert not one.same_bytes(4, 24, moved, 0)
    for place in range(12):
        changed = codes.clone()
        changed[place] ^= 16
        assert one.same_bytes(8, 24, four_bit(changed, absmax), 8) == (place < 4)
    for place in range(6):
        changed = absmax.clone()
        changed[place] += 1e-6
        assert one.same_bytes(8, 24, four_bit(codes, changed), 8) == (place < 2)
        changed[place] = float("nan")
        assert four_bit(codes, changed).same_bytes(8, 24, four_bit(codes, changed), 8) == (place < 2)
    # In blocks that begin elsewhere, or are others, the same bytes would be other values.
    assert not one.same_bytes(2, 4, one, 2)
    assert not one.same_bytes(0, 4, one, 6)
    assert not one.same_bytes(0, 8, four_bit(codes, absmax, blocksize=8), 0)
    assert not one.same_bytes(0, 8, four_bit(codes, absmax, quant_type="fp4"), 0)


def test_only_4_bit_rows_that_lie_in_order_are_compared_by_their_bytes(tiny):
    values = four_bit(torch.arange(12, dtype=torch.uint8), torch.arange(1.0, 7.0))
    rows = Matrix("w", values, 0, (6, 4))
    assert rows.same_bytes(1, 3, Matrix("w", values, 4, (5, 4)), 0)  # which begins a row later
    assert not rows.same_bytes(1, 3, rows, 0)
    assert not Matrix("w", values, 0, (4, 6), transposed=True).same_bytes(0, 4, rows, 0)
    (norm,) = [info for info in Checkpoint(tiny).tensors.values() if info.name == "model.norm.weight"]
    dense = Matrix("n", Dense(norm), 0, (6, 4))
    assert not dense.same_bytes(0, 2, dense, 0)
    assert not dense.same_bytes(0, 2, rows, 0)
    assert not rows.same_bytes(0, 2, dense, 0)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_the_last_value_of_a_large_dense_tensor_counts(tiny, converted, tmp_path, name):
    def change(tensors):
        tensors[name] = tensors[name].clone()
        tensors[name].view(torch.int16)[-1, -1] ^= 1

    require_found(tiny, rewritten(converted, tmp_path / "result", change), f"{name}.* 1 of")


def test_only_what_follows_the_first_rows_is_compared_by_its_bytes(tiny, converted, monkeypatch):
    """And nothing that is dequantized there, or has other bytes, counts as compared by them."""
    dequantized, taken = [], []
    read, same = FourBit.read, FourBit.same_bytes
    monkeypatch.setattr(FourBit, "read", lambda self, *place: dequantized.append(place[1] - place[0]) or read(self, *place))
    monkeypatch.setattr(FourBit, "same_bytes", lambda self, *place: taken.append(place[1] - place[0]) or same(self, *place))
    found = prove(tiny, converted, ASKED)
    of_four_bits = sum(found.kinds[kind].difference.compared for kind in ("attention_weight", "w13_weight", "w2_weight"))
    assert sum(dequantized) // 2 + sum(taken) == of_four_bits  # both sides are dequantized
    assert 0 < sum(dequantized) // 2 < of_four_bits / 2


def test_differences_are_counted():
    before = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    after = torch.tensor([[1.0, 2.0, 3.5], [-4.0, 5.0, float("nan")]])
    found = difference(before, after)
    assert (found.compared, found.different, found.largest_difference, found.unrelated_rows) == (6, 3, float("inf"), 1)
    rounded = torch.tensor([[1 + 2.0**-12]])
    assert difference(rounded, rounded.half()).different == 0
    assert difference(rounded, rounded.half() + 2.0**-10).different == 1


def test_progress_ends_with_all_bytes(tiny, converted, monkeypatch):
    counts = []
    monkeypatch.setattr(Progress, "advance", lambda self, count: counts.append(count))
    totals = []
    monkeypatch.setattr(Progress, "__init__", lambda self, total, what: totals.append(total))
    monkeypatch.setattr(Progress, "__exit__", lambda *arguments: None)
    prove(tiny, converted, ASKED)
    data = sum(tensor.nbytes for directory in (tiny, converted) for tensor in all_tensors(directory).values())
    assert [sum(counts)] == totals == [data]


@pytest.mark.slow
def test_the_proof_knows_nothing_of_the_conversion():
    """Neither by its imports nor by what is in memory once it is imported: of `format`, only what reads headers."""
    for file in (ROOT / "gptoss_nf4/proof").glob("*.py"):
        ours = {name.removeprefix("gptoss_nf4.") for name in direct_imports(file) if name.startswith("gptoss_nf4.")}
        assert all(name.startswith(ALLOWED) for name in ours), file
    code = """
import sys, gptoss_nf4.proof.prove, gptoss_nf4.proof.config, torch
gptoss_nf4.proof.config.load({}, "config.json")
print(torch.compile.__module__, *sys.modules)
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM
print(GptOssForCausalLM.config_class is GptOssConfig is type(gptoss_nf4.proof.config.load({}, "config.json")))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    (compiles_as, *loaded), whole = (line.split() for line in done.stdout.splitlines())
    ours = {name.removeprefix("gptoss_nf4.") for name in loaded if name.startswith("gptoss_nf4.")}
    known = ("eager_bnb", "errors", "proof", "storage")
    assert {name for name in ours if not name.startswith(known)} == {"format", "format.dtypes"}
    # bitsandbytes and transformers' configuration came without PyTorch's compiler, which is as it was, as transformers is.
    assert {"bitsandbytes.functional", "torch", "transformers.models.gpt_oss.configuration_gpt_oss"} <= {*loaded}
    assert whole == ["True"]
    assert not {"torch._dynamo", "torch._inductor.compile_fx"} & {*loaded}
    assert compiles_as == "torch"
