"""Every layout that is read, written by the library that people have it from, against what that library reads."""

import json
import re
from pathlib import Path

import bitsandbytes.functional as bnb
import layout_makers as makers
import pytest
import torch
from conftest import local
from halves import thinned
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gptoss_nf4.check.weights import stored_weight
from gptoss_nf4.convert.plan import NF4, RequantOptions
from gptoss_nf4.errors import UserError
from gptoss_nf4.fetch.fetch import fetch
from gptoss_nf4.flow import convert
from gptoss_nf4.format import names
from gptoss_nf4.source.interface import Source
from gptoss_nf4.source.layouts import open_checkpoint
from gptoss_nf4.source.wrappers import unwrapped
from gptoss_nf4.storage.checkpoint import Checkpoint
from gptoss_nf4.storage.tensor_reader import TensorInfo

EXPERTS = {"gate_up_proj": "w13", "down_proj": "w2"}


def converted(directory: Path, root: Path, dtype: str = "float32", **options) -> tuple[Checkpoint, dict]:
    model, artifacts = local(directory, root)
    report = convert(model, artifacts, RequantOptions(**options), dtype)
    return Checkpoint(artifacts.checkpoint), report


def value_of(source: Source, name: str) -> torch.Tensor:
    """The tensor of that canonical name, float32, dequantized if it is 4-bit."""
    module, layer = name.removesuffix(".weight"), names.layer_of(name)
    for _, other, shape in names.modules_of(source.dimensions, layer) if layer is not None else ():
        if other == module and source.module(module, shape).state:
            return torch.from_numpy(source.dequantized(source.module(module, shape)))
    return source.floating(name).tensor().float()


def fused_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    return f"{stem}.{EXPERTS[kind]}.weight"


@pytest.mark.parametrize("layout", thinned(makers.EXACT, 3))
def test_a_4_bit_layout_is_converted_without_changing_a_weight(tmp_path, layout):
    experts = makers.EXACT[layout](tmp_path / "source")
    result, report = converted(tmp_path / "source", tmp_path / "artifacts")
    assert report["different"] == 0
    assert len(experts) == 2 * makers.D.layers
    directions = result.config["quantization_config"].get("blocks_along", {})
    assert set(directions.values()) <= {"outputs"}
    assert len(directions) == (len(experts) if layout.startswith("fused") else 2 if layout == "partly fused" else 0)
    for name, expected in experts.items():
        assert torch.equal(stored_weight(result, fused_name(name)), expected.transpose(1, 2))


@pytest.mark.parametrize("layout", makers.REQUANTIZED)
def test_other_layouts_are_quantized_by_mode_nf4_and_refused_by_mode_exact(tmp_path, layout):
    experts = makers.REQUANTIZED[layout](tmp_path / "source")
    with pytest.raises(UserError, match=r"requant\.mode=nf4"):
        converted(tmp_path / "source", tmp_path / "exact")
    assert not (tmp_path / "exact/absmax").exists()  # refused before the first layer
    result, _ = converted(tmp_path / "source", tmp_path / "artifacts", mode=NF4)
    for name, values in experts.items():
        fused = fused_name(name)
        for expert, weight in enumerate(values.transpose(1, 2)):
            packed, state = bnb.quantize_4bit(weight.contiguous(), blocksize=64, quant_type="nf4")
            assert torch.equal(result.torch(fused)[expert].reshape(-1), packed.reshape(-1))
            assert torch.equal(result.torch(f"{fused}.absmax")[expert].reshape(-1), state.absmax)


@pytest.mark.parametrize("layout", ["fused, 16 bit", "mixture of transformers 5"])
def test_a_layout_that_transformers_loads_is_read_as_transformers_loads_it(tmp_path, layout):
    source = tmp_path / "source"
    makers.REQUANTIZED[layout](source)
    opened = open_checkpoint(source)
    plain = source.with_name("before-mixture") if layout.startswith("mixture") else source
    theirs = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).state_dict()
    assert len(theirs) == 3 + makers.D.layers * 17
    for name, expected in theirs.items():
        if layout.startswith("mixture") and name.endswith("_proj.weight"):
            expected = makers.read(load_file(source / "model.safetensors"), name)
        stem, _, kind = name.rpartition(".experts.")
        if not stem:
            assert torch.equal(value_of(opened, name), expected), name
            continue
        part, suffix = kind.removesuffix("_bias"), "bias" if kind.endswith("_bias") else "weight"
        for expert, each in enumerate(expected):
            assert torch.equal(
                value_of(opened, f"{stem}.experts.{part}s.{expert}.{suffix}"), each.T if each.dim() == 2 else each
            )


def test_the_dtype_of_storage_makes_no_difference(tmp_path):
    """bnb_4bit_quant_storage, which FSDP needs: the same bytes under another name."""
    makers.split(tmp_path / "uint8")
    expected, _ = converted(tmp_path / "uint8", tmp_path / "expected")
    for dtype in ("bfloat16", "float16", "float32", "int8"):
        makers.stored_as(getattr(torch, dtype))(tmp_path / dtype)
        result, _ = converted(tmp_path / dtype, tmp_path / f"artifacts-{dtype}")
        for file in result.weight_files:
            assert file.read_bytes() == (expected.directory / file.name).read_bytes()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_router_head_and_embeddings_in_4_bit_are_dequantized_and_reported(tmp_path, dtype):
    makers.router_head_and_embeddings_in_4_bit(tmp_path / "source")
    result, _ = converted(tmp_path / "source", tmp_path / "artifacts", dtype)
    tensors = load_file(tmp_path / "source/model.safetensors")
    for name in makers.ALSO:
        assert torch.equal(result.torch(name), makers.read(tensors, name).to(getattr(torch, dtype)))
    notes = json.loads((tmp_path / "artifacts/manifest.json").read_text())["notes"]
    assert any("lm_head.weight" in note and "router" in note for note in notes)


def test_wrapped_names_give_the_same_bytes_and_are_reported(tmp_path):
    makers.split(tmp_path / "plain")
    makers.wrapped_names(tmp_path / "wrapped")
    expected, _ = converted(tmp_path / "plain", tmp_path / "expected")
    result, _ = converted(tmp_path / "wrapped", tmp_path / "artifacts")
    for file in expected.directory.iterdir():
        assert file.read_bytes() == (result.directory / file.name).read_bytes()
    told = []
    fetch(*local(tmp_path / "wrapped", tmp_path / "again"), say=told.append)
    for wrapper in ("base_model.model.", "_orig_mod", "base_layer", "_fsdp_wrapped_module"):
        assert any(f"'{wrapper}' is removed from" in line for line in told)


PLAIN = ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight.absmax", "lm_head.weight")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"base_model.model.{name}",  # PEFT
        lambda name: f"module.{name}",  # DistributedDataParallel, DeepSpeed
        lambda name: f"_orig_mod.module.{name}",
        lambda name: f"pretrained_model.{name}",  # TRL's model with a value head
        lambda name: f"model.{name}",  # Lightning
        lambda name: f"base_model.model.{name}".replace("q_proj.", "q_proj.base_layer."),
        lambda name: name.replace("layers.0.", "layers.0._orig_mod."),  # one layer compiled
        lambda name: name.replace("layers.0.", "_fsdp_wrapped_module.layers.0._checkpoint_wrapped_module."),
        lambda name: name,
    ],
)
def test_what_wrappers_add_to_names_is_removed(wrap):
    tensors = {wrap(name): TensorInfo(wrap(name), "F32", (1,), Path("x"), 0, 4) for name in PLAIN}
    found, removed = unwrapped(tensors)
    assert {name: info.name for name, info in found.items()} == {name: wrap(name) for name in PLAIN}
    assert bool(removed) == (list(tensors) != list(PLAIN))


def test_a_prefix_that_some_names_lack_is_none(tmp_path):
    names = ("base_model.model.embed_tokens.weight", "lm_head.weight")
    tensors = {name: TensorInfo(name, "F32", (1,), Path("x"), 0, 4) for name in names}
    assert unwrapped(tensors) == (tensors, {})


def test_two_tensors_of_one_name_are_refused(tmp_path):
    makers.split(tmp_path / "source")
    file = tmp_path / "source/model.safetensors"
    tensors = load_file(file)
    makers.write(tmp_path / "source", tensors | {"_orig_mod.model.norm.weight": tensors["model.norm.weight"] * 2})
    with pytest.raises(UserError, match=r"two tensors of one name.*_orig_mod\.model\.norm\.weight"):
        open_checkpoint(tmp_path / "source")


@pytest.mark.parametrize(
    ("make", "rename", "config", "told"),
    [
        (
            makers.split,
            lambda n: f"transformer.{n.removeprefix('model.')}",
            {},
            "there is transformer.layers.0.self_attn.q_",
        ),
        (
            makers.split,
            lambda n: n.replace("model.", "model.language_model.", 1),
            {},
            "there is model.language_model.layers.0",
        ),
        (
            makers.fused_16_bit,
            lambda n: n.replace("_proj_bias", "_proj.bias"),
            {},
            "there is .*experts.gate_up_proj.bias: re",
        ),
        (makers.split, str, {"num_local_experts": 5}, "correct num_local_experts.*gate_up_projs.4"),
        (makers.split, str, {"num_hidden_layers": 3, "layer_types": None}, "correct num_hidden_layers.*model.layers.2"),
    ],
)
def test_a_missing_tensor_that_has_another_name_or_was_counted_too_often_is_told(tmp_path, make, rename, config, told):
    make(tmp_path / "source")
    tensors = load_file(tmp_path / "source/model.safetensors")
    makers.write(tmp_path / "source", {rename(name): value for name, value in tensors.items()})
    file = tmp_path / "source/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    with pytest.raises(UserError, match=told):
        fetch(*local(tmp_path / "source", tmp_path / "artifacts"))


def test_padded_embeddings_say_which_number_config_json_needs(tmp_path):
    makers.split(tmp_path / "source")
    file = tmp_path / "source/model.safetensors"
    tensors = load_file(file)
    padding = torch.zeros(64, makers.D.hidden, dtype=torch.bfloat16)
    for name, told in (("lm_head.weight", "resize both"), ("model.embed_tokens.weight", "set vocab_size to 384")):
        tensors[name] = torch.cat([tensors[name], padding])
        makers.write(tmp_path / "source", tensors)
        with pytest.raises(UserError, match=told):
            fetch(*local(tmp_path / "source", tmp_path / "artifacts"))


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 1e6])
@pytest.mark.parametrize("layout", ["split, 16 bit", "fused, 16 bit"])
def test_experts_in_16_bit_with_values_that_no_absmax_holds_are_refused(tmp_path, layout, value):
    makers.REQUANTIZED[layout](tmp_path / "source")
    tensors = load_file(tmp_path / "source/model.safetensors")
    damaged = next(name for name in tensors if "layers.1" in name and "experts.down_proj" in name and "bias" not in name)
    tensors[damaged].view(-1)[77] = value
    makers.write(tmp_path / "source", tensors)
    with pytest.raises(UserError, match=r"cannot be quantized: model\.layers\.1\.mlp\.experts\.down_projs"):
        converted(tmp_path / "source", tmp_path / "artifacts", mode=NF4)


def test_rows_of_outputs_that_are_not_whole_blocks_are_refused_in_mode_exact(tmp_path):
    makers.fused_with_blocks_across_rows(tmp_path / "source")
    with pytest.raises(UserError, match=r"columns are not whole blocks: .* got out_features 192 and blocksize 128,"):
        converted(tmp_path / "source", tmp_path / "artifacts", mode="exact")


def test_the_sample_names_its_tensors_as_transformers_does(tiny_fused):
    """But for what bitsandbytes adds to a name."""
    stored = {name for name in Checkpoint(tiny_fused).tensors if not re.search(r"absmax|quant_", name)}
    assert stored == makers.model().state_dict().keys()


def test_experts_that_a_blocksize_does_not_divide_are_refused(tmp_path, monkeypatch):
    """A block would belong to two experts. At real widths every blocksize divides."""
    makers.fused_4_bit(tmp_path / "source", blocksize=4096)  # 192 * 256 = 12 * 4096; 128 * 192 = 6 * 4096
    converted(tmp_path / "source", tmp_path / "artifacts", mode=NF4)
    config = tmp_path / "source/config.json"
    fields = json.loads(config.read_text())
    tensors = load_file(tmp_path / "source/model.safetensors")
    narrow = {"intermediate_size": 32}
    for layer in range(makers.D.layers):
        for kind, shape in (("gate_up", (4, 192, 64)), ("down", (4, 32, 192))):
            name = f"model.layers.{layer}.mlp.experts.{kind}_proj"
            for key in [key for key in tensors if key.startswith(f"{name}.")]:
                del tensors[key]
            tensors |= makers.quantized(torch.randn(shape), name, blocksize=4096)
        tensors[f"model.layers.{layer}.mlp.experts.gate_up_proj_bias"] = torch.zeros(4, 64)
    makers.write(tmp_path / "source", tensors)
    config.write_text(json.dumps(fields | narrow))
    with pytest.raises(UserError, match=r"blocks run across experts.*down_proj"):
        fetch(*local(tmp_path / "source", tmp_path / "refused"))


@pytest.mark.parametrize("mode", ["exact", "nf4"])
def test_gate_and_up_rows_of_one_block_stay_together(tiny_fused, tmp_path, mode):
    """In the order `concatenated` a block of 64 outputs would be torn apart. Mode nf4 makes blocks of its own."""
    if mode == NF4:
        result, _ = converted(tiny_fused, tmp_path / "artifacts", mode=mode, w13_order="concatenated")
        assert "blocks_along" not in result.config["quantization_config"]
        assert result.config["quantization_config"]["format_version"] == 1
        return
    with pytest.raises(UserError, match=r"gate and up share blocks: .*w13: .*pass requant\.w13_order=interleaved"):
        converted(tiny_fused, tmp_path / "artifacts", mode=mode, w13_order="concatenated")
