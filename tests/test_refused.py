"""What cannot be converted is told apart, named, and told what to do."""

import json
import re
import shutil
from pathlib import Path

import layout_makers as makers
import pytest
import torch
from conftest import local
from safetensors.torch import load_file, save_file

from gptoss_nf4.errors import UserError
from gptoss_nf4.fetch.fetch import fetch
from gptoss_nf4.samples import embedded
from gptoss_nf4.source.refused import _checkpoints_below, require_checkpoint, require_directory

EXPERTS = "model.layers.0.mlp.experts"


def refused(directory: Path, tmp_path: Path) -> str:
    with pytest.raises(UserError) as caught:
        fetch(*local(directory, tmp_path / "artifacts"))
    assert not (tmp_path / "artifacts").exists()
    return str(caught.value)


def checkpoint_of(directory: Path, tensors: dict, **config) -> Path:
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(embedded.model_config(embedded.TINY) | config))
    return directory


def quantized_by(method: str) -> dict:
    return {"quantization_config": {"quant_method": method}}


@pytest.mark.parametrize(
    ("names", "dtype", "config", "found"),
    [
        (["gate_up_proj_blocks", "gate_up_proj_scales"], "uint8", {}, "stock MXFP4.*vLLM serves this checkpoint as it is"),
        (["gate_up_projs.0.weight"], "float8_e4m3fn", {}, r"fp8 \(.*weight, F8_E4M3"),
        (["gate_up_proj"], "float8_e5m2", quantized_by("fp8"), "fp8.*'fp8' in config.json"),
        (["gate_up_projs.0.weight", "gate_up_projs.0.weight.SCB"], "int8", {}, "int8 of bitsandbytes"),
        (["gate_up_projs.0.weight"], "int8", {}, "int8"),
        (["gate_up_projs.0.qweight", "gate_up_projs.0.g_idx"], "int32", quantized_by("gptq"), "GPTQ.*'gptq'"),
        (["gate_up_projs.0.qweight", "gate_up_projs.0.qzeros"], "int32", quantized_by("awq"), "AWQ.*'awq'"),
        (["gate_up_projs.0.weight_packed"], "int32", quantized_by("compressed-tensors"), "compressed-tensors"),
        (["gate_up_projs.0.W_q"], "uint8", quantized_by("hqq"), "unknown layout.*'hqq'"),
        (["gate_up_projs.0.lora_A.weight"], "float32", {}, "a LoRA adapter that is not merged"),
        (["something.else"], "float32", {}, "unknown layout, with tensors like .*something.else"),
    ],
)
def test_quantizations_that_are_not_read_are_named(tmp_path, names, dtype, config, found):
    tensors = {f"{EXPERTS}.{name}": torch.zeros(4).to(getattr(torch, dtype)) for name in names}
    message = refused(checkpoint_of(tmp_path / "source", tensors, **config), tmp_path)
    assert re.search(found, message), message


@pytest.mark.parametrize("quantization", [None, {}, {"quant_method": None}, []])
def test_no_quantization_is_named_where_there_is_none(tmp_path, quantization):
    tensors = {f"{EXPERTS}.gate_up_projs.0.weight": torch.zeros(4, dtype=torch.int8)}
    message = refused(checkpoint_of(tmp_path / "source", tensors, quantization_config=quantization), tmp_path)
    assert "int8" in message
    assert "quant_method" not in message


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("lost", [f"{EXPERTS}.gate_up_projs.1.weight", f"{EXPERTS}.gate_up_proj"])
def test_4_bit_codes_without_their_state_are_named(tmp_path, lost, storage):
    source = tmp_path / "source"
    (makers.split if "projs" in lost else makers.fused_4_bit)(source)
    tensors = load_file(source / "model.safetensors")
    for key in [key for key in tensors if key.startswith(f"{lost}.")]:
        del tensors[key]
    tensors[lost] = tensors[lost].reshape(-1).view(storage).reshape(-1, 1)
    makers.write(source, tensors)
    message = refused(source, tmp_path)
    assert f"4-bit codes without a quantization state: {lost}: got" in message
    assert "cannot be recovered" in message


def test_only_the_files_that_transformers_would_load_count(source_copy, tmp_path):
    expected = fetch(*local(source_copy, tmp_path / "plain"))["tensors"]
    for name in ("adapter_model", "consolidated", "consolidated.00", "optimizer"):
        save_file({"x.lora_A.weight": torch.zeros(2)}, source_copy / f"{name}.safetensors")
    assert fetch(*local(source_copy, tmp_path / "with-index"))["tensors"] == expected
    (source_copy / "model.safetensors.index.json").unlink()
    assert fetch(*local(source_copy, tmp_path / "without"))["tensors"] == expected


def test_what_is_no_file_of_weights_does_not_count(source_copy, tmp_path):
    """A directory of the single file's name; what macOS puts beside files that it copies."""
    expected = fetch(*local(source_copy, tmp_path / "plain"))["tensors"]
    (source_copy / "model.safetensors").mkdir()
    assert fetch(*local(source_copy, tmp_path / "with-index"))["tensors"] == expected
    (source_copy / "model.safetensors.index.json").unlink()
    for number, file in enumerate(list(source_copy.glob("model-*.safetensors"))):
        file.rename(source_copy / f"weights-{number}.safetensors")
        (source_copy / f"._weights-{number}.safetensors").write_bytes(b"\x00\x05\x16\x07")
    assert fetch(*local(source_copy, tmp_path / "without"))["tensors"] == expected


def test_an_index_beside_a_single_file_is_left_over(source_copy, tmp_path):
    tensors = {}
    for file in source_copy.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    save_file(tensors, source_copy / "model.safetensors", metadata={"format": "pt"})
    assert fetch(*local(source_copy, tmp_path / "artifacts"))["tensors"] == len(tensors)


def test_a_dtype_that_is_not_known_is_named(tmp_path):
    source = checkpoint_of(tmp_path / "source", {"x": torch.zeros(4)})
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"F4" '))
    assert "unknown dtype" in refused(source, tmp_path)


def touch(*names: str):
    def make(directory: Path) -> Path:
        for name in names:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_text("{}")
        return directory

    return make


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (touch("model-Q4_K_M.gguf"), ("GGUF", "convert the checkpoint in safetensors")),
        (touch("config.json", "model-Q4_K_M.gguf"), ("GGUF", "convert the checkpoint in safetensors")),
        (touch("adapter_config.json", "adapter_model.safetensors"), ("LoRA adapter", "model=local model.path=")),
        (
            touch("adapter_config.json", "adapter_model.safetensors", "config.json", "optimizer.bin"),
            ("a LoRA adapter,", "both"),
        ),
        (
            touch(*(f"checkpoint-{n}/{file}.json" for n in (60, 500) for file in ("config", "adapter_config"))),
            ("2 checkpoints below it", "checkpoint-500"),
        ),
        (touch("snapshots/abc/config.json"), ("1 checkpoint below it", "snapshots/abc")),
        (touch("model.safetensors"), ("no config.json", "copy the base model's config.json")),
        (touch("config.json", "pytorch_model.bin"), ("pickled", "save_pretrained")),
        (touch("global_step500/x.txt", "latest"), ("sharded training state", "save_pretrained")),
        (touch("notes.txt"), ("neither config.json nor *.safetensors", "check the path")),
        (touch("config.json"), ("no *.safetensors", "check the path")),
        (touch("model.safetensors", "checkpoint-60/config.json"), ("no config.json", "copy the base model's config.json")),
    ],
)
def test_directories_that_hold_no_checkpoint_are_told_apart(tmp_path, make, told):
    (tmp_path / "given").mkdir()
    directory = make(tmp_path / "given")
    message = refused(directory, tmp_path)
    assert all(text in message for text in told), message
    with pytest.raises(UserError):
        require_checkpoint(directory)


def test_of_many_checkpoints_below_the_one_of_the_last_step_is_proposed(tmp_path):
    steps = (9, 60, 70, 500, 600, 1000, 1100, 20_000)
    touch(*(f"run/checkpoint-{step}/config.json" for step in steps))(tmp_path)
    assert [each.name for each in _checkpoints_below(tmp_path)] == [f"checkpoint-{step}" for step in steps]
    with pytest.raises(UserError, match=rf"8 checkpoints below it.* such as {tmp_path}/run/checkpoint-20000$"):
        require_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("unsloth/gpt-oss-20b", "model=hub model.repository=unsloth/gpt-oss-20b"),
        ("https://huggingface.co/unsloth/gpt-oss-20b", "model=hub model.repository=unsloth/gpt-oss-20b"),
        ("{tmp}/my-finetun", "there is {tmp}/my-finetune"),
        ("{tmp}/nothing/like/it", "{tmp} has no 'nothing'"),
        ("{tmp}/model.gguf", "a GGUF file"),
        ("{tmp}/link", "a link to /nowhere/at/all, which is not there"),
        ("{tmp}/model.zip", "unpack it"),
        ("{tmp}/my-finetune/model.safetensors", "pass the directory that it is in: {tmp}/my-finetune"),
        ("{tmp}/" + "x" * 300, "cannot read"),
    ],
)
def test_paths_that_are_no_directory_are_told_apart(tmp_path, monkeypatch, given, told):
    monkeypatch.chdir(tmp_path)
    touch("my-finetune/model.safetensors", "model.gguf", "model.zip")(tmp_path)
    (tmp_path / "link").symlink_to("/nowhere/at/all")
    with pytest.raises(UserError) as caught:
        require_directory(given.format(tmp=tmp_path))
    assert told.format(tmp=tmp_path) in str(caught.value)
    assert require_directory(str(tmp_path / "my-finetune")) == tmp_path / "my-finetune"


def test_a_tilde_is_the_users_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    assert require_directory("~/mine") == tmp_path / "mine"
    with pytest.raises(UserError, match=r"no such directory: .* has no '~nobody-at-all'"):
        require_directory("~nobody-at-all/mine")


def test_a_path_that_is_there_is_no_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/my-finetune").mkdir(parents=True)
    assert require_directory("models/my-finetune").is_dir()
    with pytest.raises(UserError, match=r"there is .*models/my-finetune"):
        require_directory("models/my-finetun")
    shutil.rmtree(tmp_path / "models")
    with pytest.raises(UserError, match="form of a Hub repository"):
        require_directory("models/my-finetune")
