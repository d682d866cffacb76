"""Digests of a source's tensors, and what is remembered of them."""

import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import torch
from conftest import local
from safetensors.torch import load_file

from gptoss_nf4.fetch import fetch as fetching
from gptoss_nf4.fetch import tensor_digests
from gptoss_nf4.fetch.tensor_digests import bytes_to_hash, describe, hashing_speed
from gptoss_nf4.storage.checkpoint import Checkpoint
from gptoss_nf4.storage.repository import digests


def test_only_files_that_changed_are_hashed_again(source_copy, tmp_path, monkeypatch):
    """By size, times and inode; a memory that is damaged, or too fresh to tell, counts for nothing."""
    memory, source = tmp_path / "seen.json", Checkpoint(source_copy)
    groups = [sorted(source.tensors)]
    total = sum(info.bytes for info in source.tensors.values())
    read = hashed_bytes(monkeypatch)

    def described(expected: int) -> list[dict]:
        """What `describe` finds, having hashed `expected` bytes, which it also says beforehand."""
        assert bytes_to_hash(source, memory) == expected
        read.clear()
        found = describe(source, groups, memory)
        assert sum(read) == expected
        return found

    first = described(total)
    assert described(total) == first  # just written: not trusted yet
    monkeypatch.setattr("gptoss_nf4.fetch.tensor_digests.SETTLED_SECONDS", -1)
    described(total)
    assert described(0) == first
    info = source.tensors["model.layers.1.mlp.experts.down_projs.2.weight"]
    data = bytearray(info.file.read_bytes())
    data[info.start] ^= 1
    info.file.write_bytes(data)
    changed = described(sum(other.bytes for other in source.tensors.values() if other.file == info.file))
    assert [name for name in groups[0] if changed[0][name] != first[0][name]] == [info.name]
    for damage in ("{", "[]", '{"model-00001-of-00003.safetensors": 5}', '{"model-00001-of-00003.safetensors": {}}'):
        memory.write_text(damage)
        described(total)


def test_a_tensor_is_described_by_dtype_shape_and_content(source_copy, tmp_path):
    source = Checkpoint(source_copy)
    groups = [["model.norm.weight", "lm_head.weight"], [], ["model.layers.0.mlp.experts.down_projs.2.weight.absmax"]]
    stored = {name: tensor for file in source.weight_files for name, tensor in load_file(file).items()}
    dtypes = {torch.bfloat16: "BF16", torch.uint8: "U8"}
    assert json.loads(json.dumps(describe(source, groups, tmp_path / "seen.json"))) == [
        {
            name: {
                "dtype": dtypes[stored[name].dtype],
                "shape": list(stored[name].shape),
                "sha256": hashlib.sha256(stored[name].view(torch.uint8).numpy().tobytes()).hexdigest(),
            }
            for name in group
        }
        for group in groups
    ]


def test_a_change_that_leaves_size_and_time_alone_is_seen(source_copy, tmp_path, monkeypatch):
    """`touch -r` and some copies set the time of a file back. The system's own time of its last change they cannot."""
    memory, source = tmp_path / "seen.json", Checkpoint(source_copy)
    monkeypatch.setattr(tensor_digests, "SETTLED_SECONDS", -1)
    describe(source, [sorted(source.tensors)], memory)
    file = source.weight_files[0]
    before = file.stat()
    with file.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"x")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert bytes_to_hash(source, memory) == sum(info.bytes for info in source.tensors.values() if info.file == file)


def test_a_file_that_changes_while_it_is_hashed_is_not_remembered(source_copy, tmp_path, monkeypatch):
    memory, source = tmp_path / "seen.json", Checkpoint(source_copy)
    monkeypatch.setattr(tensor_digests, "SETTLED_SECONDS", -1)
    file, plain = source.weight_files[1], tensor_digests._sha256

    def meanwhile(pieces, *advance) -> str:
        os.utime(file)
        return plain(pieces, *advance)

    monkeypatch.setattr(tensor_digests, "_sha256", meanwhile)
    describe(source, [sorted(source.tensors)], memory)
    assert bytes_to_hash(source, memory) == sum(info.bytes for info in source.tensors.values() if info.file == file)


def test_the_plan_says_how_long_it_takes_where_most_is_new(source_copy, tmp_path, monkeypatch):
    model, artifacts = local(source_copy, tmp_path / "artifacts")
    half = sum(file.stat().st_size for file in source_copy.glob("*.safetensors")) // 2
    for new, told in ((half, 0), (half + 1, 1)):
        said: list[str] = []
        monkeypatch.setattr(fetching, "bytes_to_hash", lambda checkpoint, memory, new=new: new)
        fetching.fetch(model, artifacts, said.append)
        assert sum("about" in line and " cores, " in line for line in said) == told
        assert sum(line.startswith("to convert and prove ") for line in said) == 1


def test_what_is_described_are_the_layers_that_are_there_and_what_normalize_reads(source_copy, tmp_path):
    """Of a 4-bit weight normalize reads its state alone, which says what the result's has to say."""
    model, artifacts = local(source_copy, tmp_path / "artifacts")
    artifacts.digests.mkdir(parents=True)
    (artifacts.digests / "layer-2.json").write_text("{}")  # of a longer model of the same name
    fetching.fetch(model, artifacts)
    assert sorted(path.name for path in artifacts.digests.iterdir()) == ["layer-0.json", "layer-1.json", "outside.json"]
    tensors = Checkpoint(source_copy).tensors
    four_bit = {name.partition(".quant_state")[0] for name in tensors if ".quant_state." in name}
    parts = {f"{name}{part}" for name in four_bit for part in ("", ".absmax", ".quant_map", *NESTED)}
    assert len(four_bit) == 2 * (4 + 2 * 8)
    assert json.loads(artifacts.dense_digests.read_text()).keys() == tensors.keys() - parts


NESTED = (".nested_absmax", ".nested_quant_map")


def hashed_bytes(monkeypatch) -> list[int]:
    """A list that gets the size of each piece that is hashed."""
    sizes: list[int] = []
    plain = tensor_digests._sha256

    def counted(pieces, *advance):
        return plain((sizes.append(piece.nbytes) or piece for piece in pieces), *advance)

    monkeypatch.setattr(tensor_digests, "_sha256", counted)
    return sizes


def test_the_speed_is_measured_on_a_sample(tiny: Path, monkeypatch):
    source, read = Checkpoint(tiny), hashed_bytes(monkeypatch)
    monkeypatch.setattr(tensor_digests, "SAMPLE_BYTES", 1000)
    monkeypatch.setattr(tensor_digests, "cores", lambda: 2)
    assert hashing_speed(source) > 0
    largest = max(info.bytes for info in source.tensors.values())
    assert 2 * 1000 <= sum(read) < 2 * (1000 + largest)


def test_hashing_tells_how_far_it_is(source_copy, tmp_path, monkeypatch):
    """Of a checkpoint's files too: 13 GB take a minute."""
    from gptoss_nf4.storage import progress
    from gptoss_nf4.storage.digests import verify, write_digests

    told: list[int] = []
    monkeypatch.setattr(progress, "_shown_elsewhere", told.append)
    files = [path for path in source_copy.iterdir() if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    write_digests(source_copy, tmp_path / "digests")
    assert sum(told) == size
    assert verify(source_copy, tmp_path / "digests", "x") == len(files)
    assert sum(told) == 2 * size
    (source_copy / ".gitignore").write_text("/source\n")  # as DVC puts it beside its outputs
    assert verify(source_copy, tmp_path / "digests", "x") == len(files)


def test_digests_of_a_hubs_files_tell_how_far_they_are(tmp_path):
    """Git's blob id hashes the length too (git-hash-object(1)); in LFS it is SHA-256."""
    data = b"x" * 100_000
    (tmp_path / "file").write_bytes(data)
    sha256 = hashlib.sha256(data).hexdigest()
    blob = hashlib.sha1(b"blob 100000\0" + data, usedforsecurity=False).hexdigest()
    for there, expected in (
        (SimpleNamespace(lfs=SimpleNamespace(sha256="a"), blob_id="b"), ("a", sha256)),
        (SimpleNamespace(lfs=None, blob_id="b"), ("b", blob)),
        (SimpleNamespace(lfs=None, blob_id=None), (None, blob)),
    ):
        told: list[int] = []
        assert digests(there, tmp_path / "file", told.append) == digests(there, tmp_path / "file") == expected
        assert sum(told) == len(data)
