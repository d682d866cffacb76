"""A source that means harm: nothing outside its directory is read or written, no code runs, memory stays bounded."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import local
from mutations import header_of
from project_imports import ROOT

from gptoss_nf4.convert.plan import RequantOptions
from gptoss_nf4.errors import UserError, printable
from gptoss_nf4.fetch.fetch import fetch
from gptoss_nf4.flow import convert
from gptoss_nf4.storage.checkpoint import INDEX_FILE, Checkpoint
from gptoss_nf4.storage.tensor_reader import MAX_HEADER_BYTES

SHARD = "model-00001-of-00003.safetensors"
MEMORY_BOUND = 2 << 30
ONE_FETCH = r"""
import re, sys
from pathlib import Path
from gptoss_nf4.storage.artifacts import Artifacts
from gptoss_nf4.errors import UserError
from gptoss_nf4.fetch.fetch import fetch
from gptoss_nf4.source.model import Model
try:
    fetch(Model(name="m", kind="local", path=sys.argv[1]), Artifacts(Path(sys.argv[2])))
except UserError as error:
    print(error)
print(int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10)
"""


@pytest.fixture(params=["tiny", "tiny_fused"])
def source_copy(request, tmp_path) -> Path:
    """A copy of the embedded checkpoint, in either layout, to do harm to."""
    return Path(shutil.copytree(request.getfixturevalue(request.param), tmp_path / "source"))


def refused(directory: Path, root: Path) -> str:
    model, artifacts = local(directory, root)
    with pytest.raises(UserError) as caught:
        fetch(model, artifacts)
    assert not root.exists()
    return str(caught.value)


def test_an_index_that_leaves_the_directory_is_refused(source_copy, tmp_path):
    index = source_copy / INDEX_FILE
    data = json.loads(index.read_text())
    data["weight_map"]["lm_head.weight"] = "../outside.safetensors"
    index.write_text(json.dumps(data))
    assert "plain file name" in refused(source_copy, tmp_path / "artifacts")


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "chat_template.jinja", SHARD])
def test_a_link_out_of_the_directory_is_refused(source_copy, tmp_path, name):
    outside = tmp_path / "outside"
    (source_copy / name).rename(outside)
    (source_copy / name).symlink_to(outside)
    message = refused(source_copy, tmp_path / "artifacts")
    assert "link out of the checkpoint" in message
    assert name in message


def test_a_link_to_itself_is_no_link_out_of_the_directory(source_copy, tmp_path):
    (source_copy / "loop").symlink_to("loop")
    fetch(*local(source_copy, tmp_path / "artifacts"))


def test_an_index_with_a_name_that_no_file_has_is_refused(source_copy, tmp_path):
    (source_copy / INDEX_FILE).write_text(json.dumps({"weight_map": {"lm_head.weight": "x" * 300}}))
    assert "File name too long" in refused(source_copy, tmp_path / "artifacts")


def test_half_a_character_is_refused_before_it_has_to_be_written(source_copy, tmp_path):
    (source_copy / "tokenizer_config.json").write_text('{"eos_token": "\\ud800"}')
    assert "surrogates not allowed" in refused(source_copy, tmp_path / "artifacts")
    (source_copy / "tokenizer_config.json").write_text('{"note": "\\ud83d\\ude00"}')
    fetch(*local(source_copy, tmp_path / "artifacts"))


def test_the_links_of_the_hubs_cache_are_followed(source_copy, tmp_path):
    """models--x/snapshots/commit/name -> ../../blobs/digest, and the directory itself may be reached by a link."""
    snapshot, blobs = tmp_path / "models--x/snapshots/abc", tmp_path / "models--x/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(source_copy.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (tmp_path / "link").symlink_to(snapshot)
    assert fetch(*local(tmp_path / "link", tmp_path / "artifacts"))["tensors"] > 0


def test_a_pipe_is_refused_and_not_waited_for(source_copy, tmp_path):
    os.mkfifo(source_copy / "model-00009-of-00003.safetensors")
    (source_copy / INDEX_FILE).unlink()
    assert "a device, pipe or socket" in refused(source_copy, tmp_path / "artifacts")


def test_code_and_pickles_of_a_source_are_left_alone(source_copy, tmp_path):
    """Pickled weights and code beside the shards are not opened, and the result does not ask for them."""
    marker = tmp_path / "ran"
    payload = f"import pathlib; pathlib.Path({str(marker)!r}).touch()\n"
    (source_copy / "modeling_evil.py").write_text(payload)
    (source_copy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR.")
    for name in ("config.json", "tokenizer_config.json"):
        fields = json.loads((source_copy / name).read_text())
        fields["auto_map"] = {"AutoConfig": "modeling_evil.Config", "AutoTokenizer": ["modeling_evil.Tokenizer", None]}
        (source_copy / name).write_text(json.dumps(fields))
    model, artifacts = local(source_copy, tmp_path / "artifacts")
    convert(model, artifacts, RequantOptions(), "float16")
    assert not marker.exists()
    assert {file.suffix for file in artifacts.checkpoint.iterdir()} == {".safetensors", ".json"}
    for file in artifacts.checkpoint.glob("*.json"):
        assert "evil" not in file.read_text()


def test_control_characters_are_shown_escaped():
    assert printable("a\x1b[2Jb\nc") == "a\\x1b[2Jb\\nc"


def a_shard_of_terabytes(directory: Path) -> None:
    """Two, and a file that really has that length: it is sparse."""
    size = 2 << 40
    header = json.dumps({"model.norm.weight": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with (directory / "model-00009.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)


def a_state_of_gigabytes(directory: Path) -> None:
    """Quantization states are read before anything is compared."""
    name, size = "model.layers.0.self_attn.q_proj.weight.quant_state.bitsandbytes__nf4", 64 << 30
    file = Checkpoint(directory).tensors[name].file
    length, header = header_of(file)
    data = file.read_bytes()
    place = len(data) - 8 - length
    header["model.filler"] = header[name]  # the file's other tensors keep their places
    header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [place, place + size]}
    text = json.dumps(header).encode()
    with file.open("wb") as shard:
        shard.write(struct.pack("<Q", len(text)) + text + data[8 + length :])
        shard.truncate(8 + len(text) + place + size)


def a_header_of_empty_lists(directory: Path) -> None:
    text = b"[" + b"[]," * (MAX_HEADER_BYTES // 3 - 2) + b"[]]"
    (directory / "model-00009.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)


def a_header_beyond_the_limit(directory: Path) -> None:
    with (directory / "model-00009.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        file.truncate(1 << 40)


def absurd_dimensions(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config |= {"num_hidden_layers": 1000, "num_local_experts": 4096, "hidden_size": 1 << 24, "vocab_size": 1 << 24}
    config["layer_types"] = None
    (directory / "config.json").write_text(json.dumps(config))


def a_tokenizer_of_terabytes(directory: Path) -> None:
    with (directory / "tokenizer.json").open("r+b") as file:
        file.truncate(1 << 40)


@pytest.mark.parametrize(
    "make",
    [
        a_shard_of_terabytes,
        a_state_of_gigabytes,
        a_header_of_empty_lists,
        a_header_beyond_the_limit,
        absurd_dimensions,
        a_tokenizer_of_terabytes,
    ],
)
def test_memory_stays_bounded(source_copy, tmp_path, capsys, make):
    make(source_copy)
    (source_copy / INDEX_FILE).unlink()
    command = [sys.executable, "-c", ONE_FETCH, str(source_copy), str(tmp_path / "artifacts")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    message, peak = done.stdout.splitlines()
    assert ": got " in message
    assert int(peak) < MEMORY_BOUND
    assert not (tmp_path / "artifacts").exists()
    with capsys.disabled():
        print(f"\n{make.__name__}: {int(peak) / 2**20:.0f} MiB, {message[:110]}")
