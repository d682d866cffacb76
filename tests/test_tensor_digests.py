"""Digests of a source's tensors, and what is remembered of them."""

from dataclasses import replace
from unittest.mock import ANY

from gptoss_nf4.fetch.tensor_digests import describe
from gptoss_nf4.storage.checkpoint import Checkpoint


def test_only_files_that_changed_are_hashed_again(source_copy, tmp_path, monkeypatch):
    """By size, times and inode; a memory that is damaged, or too fresh to tell, counts for nothing."""
    memory, source = tmp_path / "seen.json", Checkpoint(source_copy)
    groups = [sorted(source.tensors)]
    total = sum(info.bytes for info in source.tensors.values())
    first = describe(source, groups, memory)
    assert first.hashed_bytes == total
    assert describe(source, groups, memory) == replace(first, seconds=ANY)  # just written: not trusted yet
    monkeypatch.setattr("gptoss_nf4.fetch.tensor_digests.SETTLED_SECONDS", -1)
    describe(source, groups, memory)
    again = describe(source, groups, memory)
    assert again.hashed_bytes == 0
    assert again.groups == first.groups
    info = source.tensors["model.layers.1.mlp.experts.down_projs.2.weight"]
    data = bytearray(info.file.read_bytes())
    data[info.start] ^= 1
    info.file.write_bytes(data)
    changed = describe(source, groups, memory)
    assert changed.hashed_bytes == sum(other.bytes for other in source.tensors.values() if other.file == info.file)
    assert [n for n in groups[0] if changed.groups[0][n] != first.groups[0][n]] == [info.name]
    for damage in ("{", "[]", '{"model-00001-of-00003.safetensors": 5}', '{"model-00001-of-00003.safetensors": {}}'):
        memory.write_text(damage)
        assert describe(source, groups, memory).hashed_bytes == total
