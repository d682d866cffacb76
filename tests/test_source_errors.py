"""Bad input gets one line: what, where, got, expected, what next; and leaves nothing half-written."""

import json
import struct
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from conftest import edit_shard, local
from project_imports import ROOT

from gptoss_nf4.errors import UserError
from gptoss_nf4.fetch.fetch import fetch
from gptoss_nf4.source.packed import Packed
from gptoss_nf4.storage.checkpoint import Checkpoint
from gptoss_nf4.storage.tensor_reader import read_header

EXPERT = "model.layers.1.mlp.experts.down_projs.2"


def remove(name):
    return lambda tensors: tensors.pop(name)


def put(name, value):
    return lambda tensors: tensors.__setitem__(name, value)


def state_with(**fields):
    def change(tensors):
        key = f"{EXPERT}.weight.quant_state.bitsandbytes__nf4"
        changed = json.loads(bytes(tensors[key].numpy())) | fields
        tensors[key] = torch.frombuffer(bytearray(json.dumps(changed).encode()), dtype=torch.uint8)

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (state_with(group_size=64), "the field 'group_size'"),
        (remove(f"{EXPERT}.weight.nested_absmax"), f"{EXPERT}.weight.nested_absmax"),
        (remove(f"{EXPERT}.bias"), f"{EXPERT}.bias"),
        (remove("model.layers.1.self_attn.sinks"), "model.layers.1.self_attn.sinks"),
        (remove(f"{EXPERT}.weight.quant_state.bitsandbytes__nf4"), "without a quantization state"),
        (put(f"{EXPERT}.weight.absmax", torch.zeros(5, dtype=torch.uint8)), "expected U8 with 960 elements"),
        (put(f"{EXPERT}.weight.nested_quant_map", torch.linspace(-1, 1, 255)), "expected F32 with 256 elements"),
        (put(f"{EXPERT}.weight.nested_quant_map", torch.linspace(1, -1, 256)), "expected rising values from -1 to 1"),
        (put(f"{EXPERT}.weight.nested_quant_map", torch.linspace(-1, 1.1, 256)), "expected rising values from -1 to 1"),
        (put(f"{EXPERT}.weight.nested_absmax", torch.tensor([0.1, 0.1, 0.1, -0.1])), "bad absmax.*nested_absmax"),
        (put(f"{EXPERT}.weight.nested_absmax", torch.full((4,), 65_505.0)), "bad absmax.*nested_absmax"),
        (put(f"{EXPERT}.weight.nested_absmax", torch.ones(3)), "expected F32 with 4 elements"),
        (put(f"{EXPERT}.weight.quant_map", torch.linspace(-1, 1, 16)), "foreign codebook"),
        (put("model.layers.1.input_layernorm.weight", torch.ones(7)), "input_layernorm"),
        (put("model.layers.1.rogue", torch.ones(7)), "unknown tensor"),
        (put("model.layers.1.self_attn.q_proj.lora_A.weight", torch.ones(7)), "LoRA"),
    ],
)
def test_damaged_tensors_are_named_before_anything_is_written(source_copy, tmp_path, change, named):
    edit_shard(source_copy, 1, change)
    model, artifacts = local(source_copy, tmp_path / "artifacts")
    with pytest.raises(UserError, match=named) as caught:
        fetch(model, artifacts)
    assert all(word in str(caught.value) for word in (": got ", ", expected ", "; "))
    assert "\n" not in str(caught.value)
    assert not artifacts.root.exists()


@pytest.mark.parametrize(("below", "told"), [(0.019, None), (0.021, "bad absmax"), (0.5, "bad absmax")])
def test_rounding_alone_may_bring_an_absmax_below_zero(source_copy, below, told):
    """Neighbours in bitsandbytes' map for bytes are 0.02 of the nested absmax apart at most."""
    from bitsandbytes.functional import create_dynamic_map

    assert create_dynamic_map().diff().max() < 0.02
    packed = Packed.find(Checkpoint(source_copy), f"{EXPERT}.weight")
    largest = float(Checkpoint(source_copy).torch(f"{EXPERT}.weight.nested_absmax").max())
    offset = packed.state.nested.offset - float(packed.absmax().min()) - below * largest
    edit_shard(source_copy, 1, state_with(nested_offset=offset))
    packed = Packed.find(Checkpoint(source_copy), f"{EXPERT}.weight")
    assert float(packed.absmax().min()) == pytest.approx(-below * largest, rel=1e-3)
    with pytest.raises(UserError, match=told) if told else nullcontext():
        packed.validate(packed.state.shape)


def test_a_state_that_is_too_long_is_not_read(source_copy):
    """bitsandbytes writes some two hundred bytes; 64 KiB are the limit, spaces included."""
    key = f"{EXPERT}.weight.quant_state.bitsandbytes__nf4"

    def filled(length: int):
        def change(tensors):
            text = bytes(tensors[key].numpy()).strip()
            tensors[key] = torch.frombuffer(bytearray(text.ljust(length)), dtype=torch.uint8)

        return change

    edit_shard(source_copy, 1, filled(1 << 16))
    assert Packed.find(Checkpoint(source_copy), f"{EXPERT}.weight").state.quant_type == "nf4"
    edit_shard(source_copy, 1, filled((1 << 16) + 1))
    with pytest.raises(UserError, match=rf"bad quantization state: {key}: got 65537 bytes"):
        Packed.find(Checkpoint(source_copy), f"{EXPERT}.weight")


@pytest.mark.parametrize(
    "entry",
    [
        {"data_offsets": [0, 8.0]},
        {"data_offsets": [0.0, 8]},
        {"data_offsets": [False, 8]},
        {"data_offsets": [-8, 0]},
        {"shape": [8.0]},
        {"shape": [-2, -4]},
    ],
)
def test_a_header_whose_numbers_are_not_whole_is_refused_before_data_is_read(tmp_path, entry):
    """JSON's 8.0 equals 8 and its false equals 0, so comparing alone lets them pass."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]} | entry}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(UserError, match=r"damaged shard.*tensor w with header"):
        read_header(file)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "llama"),
        ("rms_norm_eps", 1e-6),
        ("swiglu_limit", 5.0),
        ("hidden_size", -3),
        ("head_dim", "many"),
        ("layer_types", ["full_attention", "full_attention"]),
        ("num_local_experts", 9),
    ],
)
def test_a_config_that_vllm_would_serve_wrongly_is_refused(source_copy, tmp_path, key, value):
    path = source_copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    model, artifacts = local(source_copy, tmp_path / "artifacts")
    with pytest.raises(UserError):
        fetch(model, artifacts)
    assert not artifacts.root.exists()


@pytest.mark.parametrize(
    ("tensors", "named"), [(("model.embed_tokens", "lm_head"), "set vocab_size to 336"), (("lm_head",), "resize both")]
)
def test_padded_embeddings_say_which_vocab_size_config_json_needs(source_copy, tmp_path, tensors, named):
    def pad(stored):
        for name in tensors:
            stored[f"{name}.weight"] = torch.nn.functional.pad(stored[f"{name}.weight"], (0, 0, 0, 16))

    edit_shard(source_copy, 2, pad)
    model, artifacts = local(source_copy, tmp_path / "artifacts")
    with pytest.raises(UserError, match=f"vocab_size.*{named}"):
        fetch(model, artifacts)
    assert not artifacts.root.exists()


def test_what_config_json_has_beside_settings_is_told(source_copy, tmp_path):
    path = source_copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"owner": "me", "unsloth_version": "2025.9"}))
    said = []
    fetch(*local(source_copy, tmp_path / "artifacts"), say=said.append)
    assert any(line.startswith("config.json has owner, which") for line in said)


def test_only_damaged_bytes_are_to_be_copied_or_downloaded_again(source_copy, tmp_path):
    """A config.json that fits no weights is no damage: no copy and no download would mend it."""
    path, model = source_copy / "config.json", local(source_copy, tmp_path / "artifacts")
    text = path.read_text()
    path.write_text(json.dumps(json.loads(text) | {"intermediate_size": 512}))
    with pytest.raises(UserError, match=r"not of one model: put the config\.json there") as caught:
        fetch(*model)
    assert "download" not in str(caught.value)
    path.write_text(text[:-9])
    with pytest.raises(UserError, match=r"not JSON.*copy or download it again"):
        fetch(*model)


def test_a_truncated_shard_and_a_missing_shard(source_copy, tmp_path):
    model, artifacts = local(source_copy, tmp_path / "artifacts")
    shard = source_copy / "model-00002-of-00003.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="damaged shard"):
        fetch(model, artifacts)
    shard.unlink()
    with pytest.raises(UserError, match="missing shard"):
        fetch(model, artifacts)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["stages/configure.py", "model=local", "model.path=/nowhere"], "/nowhere"),
        (["stages/configure.py", "model=local", "model.path=unsloth/gpt-oss-20b"], "model=hub"),
        (["stages/configure.py", "model=local", "model.path=stages"], "neither config.json nor *.safetensors"),
        (["stages/configure.py", "model=local"], "model.path"),
        (["stages/configure.py", "model=gpt_oss_7b"], "gpt_oss_7b"),
        (["stages/fetch.py", "model.kind=zip"], "model.kind"),
        (["stages/fetch.py", "model.kind=local"], "model.path"),
        (["stages/fetch.py", "model.kind=hub"], "model.repository"),
        (["stages/dequant.py", "layer=99"], "layer=99"),
        (["stages/requant.py", "layer=0", "requant.mode=fast"], "requant.mode"),
        (["stages/normalize.py", "dtype=int8", "model.name=absent"], "dtype"),
        (["stages/normalize.py", "model.name=absent"], "fetch"),
        (["stages/normalize.py", "dtyp=bfloat16"], "dtyp"),
    ],
)
def test_stage_scripts_end_in_one_line(arguments, named):
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert named in done.stderr
    assert "Traceback" not in done.stderr
