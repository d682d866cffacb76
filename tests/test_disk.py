"""Room on disks: what is too small is refused before the first byte is written."""

from types import SimpleNamespace

import layout_makers as makers
import pytest
from conftest import edit_shard, local, make_dense

from gptoss_nf4.errors import UserError
from gptoss_nf4.fetch.budget import budget, stage_bytes
from gptoss_nf4.fetch.fetch import fetch
from gptoss_nf4.samples import embedded
from gptoss_nf4.source.layouts import open_checkpoint
from gptoss_nf4.source.model import Model
from gptoss_nf4.storage import machine
from gptoss_nf4.storage.artifacts import Artifacts


@pytest.fixture
def disk(monkeypatch) -> SimpleNamespace:
    """The disk as this project sees it; a test sets how much of it is free."""
    state = SimpleNamespace(free=0)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: state)
    return state


def test_one_byte_less_than_needed_is_too_little(disk, tmp_path):
    disk.free = 1_000_000
    machine.require_disk(1_000_000, tmp_path / "not/there", "x")
    with pytest.raises(UserError) as caught:
        machine.require_disk(1_000_001, tmp_path / "not/there", "the result")
    assert f"disk too small: {tmp_path}: got 0.0 GB free, expected 0.0 GB for the result" in str(caught.value)
    assert machine.free_disk(tmp_path / "not") == 1_000_000


def test_a_conversion_needs_room_for_what_it_will_write(disk, tiny, tmp_path, converted):
    """Within a tenth of what it wrote; counted anew where a part is there already."""
    model, artifacts = local(tiny, tmp_path / "artifacts")
    wrote = sum(file.stat().st_size for file in (*converted.glob("*.safetensors"), *converted.parent.glob("absmax/*")))
    needed = budget(open_checkpoint(tiny), artifacts).disk_bytes
    assert needed == pytest.approx(wrote, rel=0.1)
    disk.free = needed - 1
    with pytest.raises(UserError, match=r"disk too small.*for the converted checkpoint"):
        fetch(model, artifacts)
    assert not artifacts.root.exists()
    disk.free = needed
    fetch(model, artifacts)

    for file in ("layer-0.safetensors", "dense.safetensors"):
        artifacts.checkpoint.mkdir(exist_ok=True)
        (artifacts.checkpoint / file).touch()
        wrote -= (converted / file).stat().st_size
        assert budget(open_checkpoint(tiny), artifacts).disk_bytes == pytest.approx(wrote, rel=0.1)


def test_a_layer_that_is_dense_in_part_is_counted_by_hand(source_copy, tmp_path):
    """o_proj of layer 1 in 16 bit: 2 bytes a weight for normalize, no codes and no absmax for the layer's stages."""
    artifacts = Artifacts(tmp_path / "artifacts")
    before = open_checkpoint(source_copy)
    stages = ("dequant@1", "requant@1", "normalize")
    dequant, requant, normalize = (stage_bytes(before, stage, "float16") for stage in stages)
    disk, weights = budget(before, artifacts).disk_bytes, 192 * 256
    edit_shard(source_copy, 1, lambda tensors: make_dense(tensors, "model.layers.1.self_attn.o_proj"))
    after = open_checkpoint(source_copy)
    assert [stage_bytes(after, stage, "float16") for stage in stages] == [
        dequant - 4 * weights // 64,
        requant - weights // 2 - 4 * weights // 64,
        normalize + 2 * weights,
    ]
    more = 2 * weights - weights // 2 - 2 * 4 * weights // 64
    assert budget(after, artifacts).disk_bytes - disk == pytest.approx(more, rel=0.05)


def test_the_memory_of_the_largest_process_is_counted_by_hand(tiny, tmp_path):
    """Twice a layer's absmax, float32 for 64 weights; or an expert's gate and up at 44 bytes a weight."""
    makers.split_16_bit(tmp_path / "dense")
    weights = 192 * (2 * 256 + 2 * 128 + 8 * 3 * 320)  # q and o, k and v, 8 experts
    for directory, expected in ((tiny, 2 * 4 * weights // 64), (tmp_path / "dense", 44 * 256 * 192)):
        found = budget(open_checkpoint(directory), Artifacts(tmp_path / "artifacts")).memory_bytes
        assert found == expected + (400 << 20)


def test_a_synthetic_source_needs_room_for_itself(disk, tmp_path):
    disk.free = 1000
    with pytest.raises(UserError, match=r"disk too small.*for the synthetic source"):
        fetch(Model(name="s", kind="synthetic", dimensions=embedded.TINY), Artifacts(tmp_path / "artifacts"))
    assert not (tmp_path / "artifacts").exists()
