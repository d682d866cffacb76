"""Opening a checkpoint and reading parts of it, against the safetensors library; what small files may be."""

import io
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gptoss_nf4.errors import UserError
from gptoss_nf4.storage import checkpoint as module
from gptoss_nf4.storage import machine, tensor_reader
from gptoss_nf4.storage.checkpoint import Checkpoint
from gptoss_nf4.storage.reading import MAX_SIDE_FILE_BYTES, read_text, require_plain_files
from gptoss_nf4.storage.tensor_reader import read_header, read_range
from gptoss_nf4.storage.tensor_writer import Declared, writing_tensors

TENSORS = {
    "stack": torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1)),
    "half": torch.arange(33).to(torch.bfloat16),
    "bytes": torch.arange(17, dtype=torch.uint8),
    "none": torch.zeros(0, 4),
}


@pytest.fixture
def saved(tmp_path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_tensors_rows_and_bytes_are_those_that_were_saved(saved):
    found = Checkpoint(saved)
    assert found.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensor.numel() == 0 or torch.equal(found.torch(name), tensor)
        assert (found.tensors[name].shape, found.tensors[name].bytes) == (tuple(tensor.shape), tensor.nbytes)
    assert np.array_equal(found.numpy("stack"), TENSORS["stack"].numpy())
    for number in range(3):
        assert torch.equal(found.torch_row("stack", number), TENSORS["stack"][number])
    assert found.raw("bytes").tolist() == list(range(17))
    assert found.raw("bytes", 3).tolist() == list(range(3, 17))
    assert found.raw("bytes", 3, 9).tolist() == [3, 4, 5, 6, 7, 8]
    assert found.raw("bytes", 0, 0).tolist() == []


@pytest.mark.parametrize("size", [16, 32, 64, 1024])
def test_pieces_are_the_whole_tensor_to_its_last_byte(saved, monkeypatch, size):
    monkeypatch.setattr(module, "PIECE_BYTES", size)
    found = Checkpoint(saved)
    for name, tensor in TENSORS.items():
        pieces = list(found.pieces(name))
        assert all(0 < len(piece) <= size for piece in pieces)
        assert b"".join(piece.tobytes() for piece in pieces) == found.raw(name).tobytes()
        values = list(found.torch_pieces(name))
        assert torch.equal(torch.cat([tensor.new_zeros(0), *values]), tensor.flatten())


def test_what_is_forgotten_are_the_bytes_of_these_tensors_in_their_files(saved, monkeypatch):
    (saved / "model.safetensors").unlink()
    for number, name in enumerate(("stack", "half", "bytes")):
        save_file({name: TENSORS[name]}, saved / f"model-{number}.safetensors")
    found, told = Checkpoint(saved), []

    def advised(descriptor: int, start: int, length: int, advice: int) -> None:
        told.append((os.readlink(f"/proc/self/fd/{descriptor}"), os.pread(descriptor, length, start), advice))

    monkeypatch.setattr(os, "posix_fadvise", advised)
    found.forget(["bytes", "stack"])
    expected = {
        str(saved / f"model-{n}.safetensors"): found.raw(name).tobytes() for n, name in ((0, "stack"), (2, "bytes"))
    }
    assert {path: data for path, data, _ in told} == expected
    assert [advice for *_, advice in told] == [os.POSIX_FADV_DONTNEED] * 2


class Slow(io.FileIO):
    """Gives a few bytes at a time, as Linux gives 2 GB of a larger read."""

    def readinto(self, buffer) -> int | None:
        return super().readinto(memoryview(buffer)[:3])


def test_a_read_that_comes_in_parts_is_whole(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_bytes(bytes(range(50)))
    monkeypatch.setattr(Path, "open", lambda path, mode, buffering=-1: Slow(path, mode))
    assert read_range(file, 5, 45).tolist() == list(range(5, 45))
    with pytest.raises(UserError, match=r"damaged shard.*the end of the file at byte 50, expected at least 60 bytes"):
        read_range(file, 5, 60)


def test_only_files_with_other_names_count_where_none_is_named_like_a_model(saved):
    (saved / "model.safetensors").rename(saved / "consolidated.safetensors")
    assert Checkpoint(saved).weight_files == [saved / "consolidated.safetensors"]
    save_file({"x": torch.zeros(1)}, saved / "weights.safetensors")
    assert Checkpoint(saved).weight_files == [saved / "weights.safetensors"]
    save_file({"x": torch.zeros(1)}, saved / "model-1.safetensors")
    assert Checkpoint(saved).weight_files == [saved / "model-1.safetensors"]


def header_of(file: Path, tensors: dict[str, tuple[int, int]], size: int) -> Path:
    """A file of U8 tensors by their places, in this order."""
    entries = {n: {"dtype": "U8", "shape": [e - s], "data_offsets": [s, e]} for n, (s, e) in tensors.items()}
    text = json.dumps(entries).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    return file


def test_empty_tensors_may_lie_between_others_as_in_the_safetensors_library(tmp_path):
    """At the place of the next one, which its header may name first."""
    file = header_of(tmp_path / "x", {"w": (0, 8), "empty": (0, 0), "v": (8, 9), "last": (9, 9)}, 9)
    with safe_open(file, "pt") as theirs:
        assert set(theirs.keys()) == read_header(file).keys() == {"w", "empty", "v", "last"}
    assert read_header(header_of(tmp_path / "y", {}, 0)) == {}


def test_a_header_may_be_as_long_as_its_limit_and_no_longer(tmp_path, monkeypatch):
    """Files of zeros: what is not refused for its length is no JSON."""
    monkeypatch.setattr(tensor_reader, "MAX_HEADER_BYTES", 1000)
    for length, told in ((1000, "not JSON"), (1001, "header of 1001 bytes")):
        with (tmp_path / "x").open("wb") as file:
            file.write(struct.pack("<Q", length))
            file.truncate(8 + length)
        with pytest.raises(UserError, match=f"damaged shard.*{told}"):
            read_header(tmp_path / "x")


@pytest.mark.parametrize("name", ["w" * length for length in range(1, 9)])
def test_data_begin_at_a_multiple_of_eight_bytes(tmp_path, name):
    with writing_tensors(tmp_path / "x", [Declared(name, "F32", (2,)), Declared("tail", "U8", (3,))]) as out:
        out.append(name, np.float32([1, 2]))
        out.append("tail", np.uint8([3, 4, 5]))
    assert load_file(tmp_path / "x")[name].tolist() == [1, 2]
    assert read_header(tmp_path / "x")[name].start % 8 == 0
    assert out.size == (tmp_path / "x").stat().st_size


def test_a_tensor_that_would_not_be_aligned_is_a_fault_of_ours(tmp_path):
    with (
        pytest.raises(ValueError, match="w would not be aligned at byte 3"),
        writing_tensors(tmp_path / "x", [Declared("odd", "U8", (3,)), Declared("w", "F32", (1,))]),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "templates/other.jinja"])
def test_a_file_that_is_read_whole_has_a_limit(tmp_path, name):
    """Weights, and what nobody reads, may be larger."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    os.truncate(tmp_path / name, MAX_SIDE_FILE_BYTES)
    (tmp_path / "model.safetensors").touch()
    os.truncate(tmp_path / "model.safetensors", 1 << 40)
    require_plain_files(tmp_path, "templates")
    os.truncate(tmp_path / name, MAX_SIDE_FILE_BYTES + 1)
    with pytest.raises(UserError, match=f"file too large: {tmp_path}/{name}: got {MAX_SIDE_FILE_BYTES + 1} bytes"):
        require_plain_files(tmp_path, "templates")


@pytest.mark.parametrize(("parent", "allowed"), [("snapshots", True), ("versions", False)])
def test_blobs_may_be_linked_to_from_a_snapshot_of_the_hubs_cache_alone(tmp_path, parent, allowed):
    directory, blobs = tmp_path / "model" / parent / "abc", tmp_path / "model/blobs"
    directory.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1").write_text("{}")
    (directory / "config.json").symlink_to("../../blobs/1")
    if allowed:
        require_plain_files(directory)
    else:
        with pytest.raises(UserError, match=r"link out of the checkpoint.*config\.json"):
            require_plain_files(directory)


def test_lines_end_as_pythons_own_reading_ends_them(tmp_path):
    (tmp_path / "x").write_bytes("a\r\nb\rc\n\r\nü\r".encode())
    assert read_text(tmp_path / "x") == (tmp_path / "x").read_text("utf-8") == "a\nb\nc\n\nü\n"


def test_the_cores_are_those_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 7})
    assert machine.cores() == 3
