"""The conversion on the embedded model: exact, readable by bitsandbytes, and equal to transformers' experts."""

import bitsandbytes.functional as bnb
import pytest
import torch
from conftest import edit_shard, local, make_dense
from safetensors.torch import load_file
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from whole_model import whole_model

from gptoss_nf4.check.weights import stored_weight
from gptoss_nf4.convert.assemble import assemble
from gptoss_nf4.convert.dequant import dequant
from gptoss_nf4.convert.plan import NF4, RequantOptions, require_plan
from gptoss_nf4.convert.requant import requant
from gptoss_nf4.errors import UserError
from gptoss_nf4.flow import convert
from gptoss_nf4.format.dimensions import Dimensions
from gptoss_nf4.format.rows import CONCATENATED, INTERLEAVED, interleaved_rows, w13_rows
from gptoss_nf4.samples import embedded
from gptoss_nf4.source.layouts import open_checkpoint
from gptoss_nf4.storage.artifacts import Artifacts
from gptoss_nf4.storage.checkpoint import INDEX_FILE, Checkpoint
from gptoss_nf4.storage.reading import read_json_object
from gptoss_nf4.vllm.experts import run_used_experts


def result_of(directory, tmp_path, dtype="float16", **options) -> tuple[Checkpoint, dict]:
    model, artifacts = local(directory, tmp_path / "artifacts")
    report = convert(model, artifacts, RequantOptions(**options), dtype)
    return Checkpoint(artifacts.checkpoint), report


@pytest.mark.parametrize("order", [INTERLEAVED, CONCATENATED])
def test_exact_changes_no_weight(tiny, tmp_path, order):
    result, report = result_of(tiny, tmp_path, w13_order=order)
    d = open_checkpoint(tiny).dimensions
    weights = d.layers * d.hidden * (2 * d.q_rows + 2 * d.kv_rows + 3 * d.intermediate * d.experts)
    four_bit = ("attention_weight", "w13_weight", "w2_weight")
    assert sum(each["compared"] for each in report["by_kind"] if each["kind"] in four_bit) == weights
    assert report["different"] == 0
    assert report["floating_tensors"].keys() == {"F16"}
    assert read_json_object(result.directory / "config.json")["quantization_config"]["w13_order"] == order


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_bitsandbytes_reads_every_weight_of_the_result(tiny, tmp_path, dtype):
    """QuantState.from_dict and dequantize_4bit on the tensors as they lie in the result, whole stacks at once."""
    result, _ = result_of(tiny, tmp_path, dtype)
    marker = ".quant_state.bitsandbytes__nf4"
    weights = sorted(name.removesuffix(marker) for name in result.tensors if name.endswith(marker))
    assert len(weights) == 4 * 2
    source = whole_model(tiny).state_dict()
    for weight in weights:
        sidecars = {name: result.torch(name) for name in result.tensors if name.startswith(f"{weight}.")}
        state = bnb.QuantState.from_dict(dict(sidecars), device=torch.device("cpu"))
        assert state.dtype == getattr(torch, dtype)
        values = bnb.dequantize_4bit(result.torch(weight), state)
        assert values.dtype == state.dtype
        if ".experts." in weight:
            name = weight.replace("w13.weight", "gate_up_proj").replace("w2.weight", "down_proj")
            expected = source[name].transpose(1, 2)
        elif weight.endswith("qkv_proj.weight"):
            expected = torch.cat([source[weight.replace("qkv", each)] for each in "qkv"])
        else:
            expected = source[weight]
        assert torch.equal(values, expected.to(values.dtype)), weight


@pytest.mark.parametrize("order", [INTERLEAVED, CONCATENATED])
def test_fused_experts_equal_transformers_experts(tiny, tmp_path, order):
    """The result's w13 and w2, read by bitsandbytes, in the plugin's expert forward, against transformers' own."""
    result, _ = result_of(tiny, tmp_path, "float32", w13_order=order)
    d = embedded.TINY
    theirs = GptOssExperts(
        GptOssConfig(
            hidden_size=d.hidden,
            intermediate_size=d.intermediate,
            num_local_experts=d.experts,
            num_experts_per_tok=d.experts_per_token,
        )
    )
    prefix = "model.layers.1.mlp.experts."
    stored = whole_model(tiny).state_dict()
    theirs.load_state_dict({key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)})

    x = torch.randn(7, d.hidden)
    weights, ids = torch.rand(7, d.experts).softmax(-1).topk(d.experts_per_token)
    w13, w2 = stored_weight(result, f"{prefix}w13.weight"), stored_weight(result, f"{prefix}w2.weight")
    b13, b2 = result.torch(f"{prefix}w13.bias"), result.torch(f"{prefix}w2.bias")
    rows = torch.from_numpy(interleaved_rows(order, w13.shape[1]))
    got = run_used_experts(x, weights, ids, None, lambda e: w13[e][rows], b13[:, rows], lambda e: w2[e], b2)
    with torch.no_grad():
        expected = theirs(x, router_indices=ids, routing_weights=weights)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)

    # The classic mistake, the stored halves taken for gate and up, is far off: this test would see it.
    halves = torch.from_numpy(interleaved_rows(CONCATENATED if order == INTERLEAVED else INTERLEAVED, w13.shape[1]))
    wrong = run_used_experts(x, weights, ids, None, lambda e: w13[e][halves], b13[:, halves], lambda e: w2[e], b2)
    assert (wrong - expected).norm() > 0.5 * expected.norm()


def test_row_orders():
    assert w13_rows(CONCATENATED, 6).tolist() == [0, 2, 4, 1, 3, 5]
    assert w13_rows(INTERLEAVED, 4).tolist() == [0, 1, 2, 3]
    stored = torch.arange(6)[w13_rows(CONCATENATED, 6)]
    assert stored[interleaved_rows(CONCATENATED, 6)].tolist() == list(range(6))


@pytest.mark.parametrize(("quant_type", "blocksize"), [("nf4", 64), ("nf4", 32), ("fp4", 64)])
def test_mode_nf4_quantizes_as_bitsandbytes_and_reports_the_error(tiny, tmp_path, quant_type, blocksize):
    result, report = result_of(tiny, tmp_path, mode=NF4, quant_type=quant_type, blocksize=blocksize)
    source, weight = Checkpoint(tiny), "model.layers.0.mlp.experts.gate_up_projs.3.weight"
    before = stored_weight(source, weight)
    packed, state = bnb.quantize_4bit(before, blocksize=blocksize, quant_type=quant_type)
    fused = "model.layers.0.mlp.experts.w13.weight"
    assert torch.equal(result.torch(fused)[3].flatten(), packed.flatten())
    assert torch.equal(result.torch(f"{fused}.absmax")[3].flatten(), state.absmax)
    layer = read_json_object(tmp_path / "artifacts/reports/layer-0.json")
    error = layer["targets"]["model.layers.0.mlp.experts.w13"]["added_error"]
    all_before = torch.stack([stored_weight(source, weight.replace(".3.", f".{e}.")) for e in range(8)])
    after = stored_weight(result, fused)
    expected = ((after - all_before).double().norm() / all_before.double().norm()).item()
    assert error["relative_rms_error"] == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert error["largest_error"] == pytest.approx(float((after - all_before).abs().max()), rel=1e-6, abs=1e-12)
    assert error["weights"] == all_before.numel()
    assert report["different"] > 0 if (quant_type, blocksize) != ("nf4", 64) else error["relative_rms_error"] < 1e-6


def test_index_and_reports_tell_what_the_files_hold(converted):
    """Of each 4-bit module the absmax of all its parts, which differ in size in q, k and v."""
    stored = {file.name: load_file(file) for file in converted.glob("*.safetensors")}
    index = read_json_object(converted / INDEX_FILE)
    assert index["weight_map"] == {name: file for file, tensors in stored.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in stored.values() for t in tensors.values())
    for layer in range(2):
        told = read_json_object(converted.parent / f"reports/layer-{layer}.json")["targets"]
        ending = ".weight.absmax"
        tensors = stored[f"layer-{layer}.safetensors"]
        found = {name.removesuffix(ending): tensor for name, tensor in tensors.items() if name.endswith(ending)}
        assert told.keys() == found.keys()
        for name, absmax in found.items():
            about = told[name]["absmax"]
            assert (about["smallest"], about["largest"]) == (float(absmax.min()), float(absmax.max()))
            assert about["mean"] == pytest.approx(float(absmax.double().mean()), rel=1e-9)


def test_a_layer_of_the_source_is_forgotten_when_it_is_converted(tiny, tmp_path, monkeypatch):
    """Source and result together are larger than many machines' memory."""
    forgotten: list[list[str]] = []
    monkeypatch.setattr(Checkpoint, "forget", lambda checkpoint, names: forgotten.append(names))
    source, artifacts = open_checkpoint(tiny), Artifacts(tmp_path)
    dequant(source, artifacts, 1)
    assert forgotten == []
    requant(source, artifacts, 1, RequantOptions(), "cpu")
    assert forgotten == [sorted(name for name in Checkpoint(tiny).tensors if ".layers.1." in name)]


def test_no_dtype_but_ours_is_assembled(tiny, tmp_path):
    with pytest.raises(UserError, match="int8"):
        assemble(open_checkpoint(tiny), Artifacts(tmp_path), RequantOptions(), "int8")
    assert list(tmp_path.iterdir()) == []


def test_a_dense_attention_module_is_carried_dense(source_copy, tmp_path):
    edit_shard(source_copy, 0, lambda t: make_dense(t, "model.layers.0.self_attn.o_proj"))
    result, report = result_of(source_copy, tmp_path)
    name = "model.layers.0.self_attn.o_proj"
    assert torch.equal(result.torch(f"{name}.weight"), Checkpoint(source_copy).torch(f"{name}.weight").half())
    assert f"{name}.weight.absmax" not in result.tensors
    assert result.config["quantization_config"]["modules_to_not_convert"] == [name]
    assert report["different"] == 0


def test_q_k_v_that_differ_are_joined_dense_and_reported(source_copy, tmp_path):
    edit_shard(source_copy, 1, lambda t: make_dense(t, "model.layers.1.self_attn.k_proj"))
    result, report = result_of(source_copy, tmp_path)
    source, prefix = Checkpoint(source_copy), "model.layers.1.self_attn."
    expected = torch.cat([stored_weight(source, f"{prefix}{x}_proj.weight") for x in "qkv"])
    assert torch.equal(result.torch(f"{prefix}qkv_proj.weight"), expected.half())
    layer = read_json_object(tmp_path / "artifacts/reports/layer-1.json")
    assert layer["targets"][f"{prefix}qkv_proj"]["joined_dense"] is True
    assert report["different"] == 0


def test_a_dense_expert_is_refused_in_mode_exact_and_taken_in_mode_nf4(source_copy, tmp_path):
    expert = "model.layers.1.mlp.experts.down_projs.5"
    edit_shard(source_copy, 1, lambda t: make_dense(t, expert))
    with pytest.raises(UserError, match=r"requant\.mode=nf4") as caught:
        result_of(source_copy, tmp_path)
    assert expert in str(caught.value)
    result, _ = result_of(source_copy, tmp_path, mode=NF4)
    packed, _ = bnb.quantize_4bit(Checkpoint(source_copy).torch(f"{expert}.weight").float(), blocksize=64, quant_type="nf4")
    assert torch.equal(result.torch("model.layers.1.mlp.experts.w2.weight")[5].flatten(), packed.flatten())


@pytest.mark.parametrize("module", ["self_attn.o_proj", "mlp.experts.gate_up_projs.7", "mlp.experts.down_projs.0"])
def test_another_blocksize_in_one_module_is_refused_in_mode_exact(source_copy, module):
    """A module of attention, which is alone in its target, and experts beside others."""
    name = f"model.layers.1.{module}.weight"

    def quantize_again(tensors):
        weight = stored_weight(Checkpoint(source_copy), name)
        for key in [key for key in tensors if key == name or key.startswith(f"{name}.")]:
            del tensors[key]
        tensors.update(embedded.quantized(name, weight, blocksize=32))

    edit_shard(source_copy, 1, quantize_again)
    source = open_checkpoint(source_copy)
    with pytest.raises(UserError, match=r"mixed quantization.*requant\.mode=nf4"):
        require_plan(source, RequantOptions())
    require_plan(source, RequantOptions(mode=NF4))


def test_the_largest_blocksize_that_divides_every_row_is_proposed(tiny):
    """Rows of 192, 256 and 320 weights."""
    with pytest.raises(UserError, match=r"not whole blocks: .*in_features 192 and blocksize 128.*requant\.blocksize=64,"):
        require_plan(open_checkpoint(tiny), RequantOptions(mode=NF4, blocksize=128))


def test_rows_that_are_not_whole_blocks_name_the_mode_that_works(tmp_path):
    d = Dimensions(
        1, hidden=96, intermediate=160, experts=2, experts_per_token=1, heads=2, kv_heads=1, head_dim=64, vocabulary=300
    )
    embedded.write_checkpoint(tmp_path / "source", d)
    with pytest.raises(UserError, match=r"not whole blocks.*requant\.mode=nf4 requant\.blocksize=32"):
        result_of(tmp_path / "source", tmp_path)
    result, _ = result_of(tmp_path / "source", tmp_path, mode=NF4, blocksize=32)
    # Against the weights that the model was drawn with: two quantizations, no more.
    name = "model.layers.0.mlp.experts.gate_up_projs.1.weight"
    drawn = embedded.random_tensor(name, (320, 96), std=2.0 / 96**0.5)
    converted = stored_weight(result, "model.layers.0.mlp.experts.w13.weight")[1]
    assert (converted - drawn).norm() < 0.15 * drawn.norm()
