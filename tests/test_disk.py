"""Room on disks: what is too small is refused before the first byte is written."""

from types import SimpleNamespace

import pytest
from conftest import local

from gptoss_nf4.errors import UserError
from gptoss_nf4.fetch.budget import budget
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


def test_a_synthetic_source_needs_room_for_itself(disk, tmp_path):
    disk.free = 1000
    with pytest.raises(UserError, match=r"disk too small.*for the synthetic source"):
        fetch(Model(name="s", kind="synthetic", dimensions=embedded.TINY), Artifacts(tmp_path / "artifacts"))
    assert not (tmp_path / "artifacts").exists()
