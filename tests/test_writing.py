"""storage/writing.py: what is written is on the disk, under its name, before anything says so."""

import contextlib
import errno
import fcntl
import multiprocessing
import os
import stat
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file

from gptoss_nf4.errors import UserError
from gptoss_nf4.storage import machine, writing
from gptoss_nf4.storage.machine import require_disk
from gptoss_nf4.storage.tensor_writer import Declared, writing_tensors

DATA = b"0123456789"


class Recorder:
    """Notes each fsync and rename, by inode, and what was in a file at that moment."""

    def __init__(self, monkeypatch) -> None:
        self.events: list[tuple] = []
        self._fsync, self._replace = os.fsync, os.replace
        monkeypatch.setattr(os, "fsync", self.fsync)
        monkeypatch.setattr(os, "replace", self.replace)
        monkeypatch.setattr(Path, "replace", lambda path, target: self.replace(path, target))
        monkeypatch.setattr(Path, "rename", lambda path, target: self.replace(path, target))

    def fsync(self, number: int) -> None:
        found = os.fstat(number)
        if stat.S_ISDIR(found.st_mode):
            self.events.append(("fsync directory", found.st_ino))
        else:
            self.events.append(("fsync file", found.st_ino, os.pread(number, 1 << 20, 0)))
        self._fsync(number)

    def replace(self, path, target) -> None:
        self.events.append(("rename", os.stat(path).st_ino, Path(target)))
        self._replace(path, target)


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    return Recorder(monkeypatch)


def write_whole(target: Path) -> None:
    writing.write_bytes(target, DATA)


def write_tensors(target: Path) -> None:
    with writing_tensors(target, [Declared("w", "U8", (10,))]) as out:
        out.append("w", np.arange(10, dtype=np.uint8))


@pytest.mark.parametrize("write", [write_whole, write_tensors])
@pytest.mark.parametrize("there", [True, False])
def test_a_file_is_flushed_then_renamed_then_its_name_is_flushed(tmp_path, recorder, write, there):
    """The same inode in each step, whole when it is flushed; then the directory that has the name."""
    target = tmp_path / "file"
    if there:
        target.write_bytes(b"old")
    write(target)
    inode, data = target.stat().st_ino, target.read_bytes()
    assert len(data) >= 10
    assert recorder.events == [
        ("fsync file", inode, data),
        ("rename", inode, target),
        ("fsync directory", tmp_path.stat().st_ino),
    ]


def test_the_names_of_new_directories_are_flushed_too(tmp_path, recorder):
    write_whole(tmp_path / "a/b/c/file")
    flushed = [event[1] for event in recorder.events if event[0] == "fsync directory"]
    assert set(flushed) == {path.stat().st_ino for path in (tmp_path, tmp_path / "a", tmp_path / "a/b", tmp_path / "a/b/c")}


def test_an_error_leaves_the_old_file_and_no_other(tmp_path, recorder):
    target = tmp_path / "file"
    target.write_bytes(b"old")
    with contextlib.suppress(RuntimeError), writing.replacing(target) as file:
        file.write(DATA)
        raise RuntimeError
    assert recorder.events == []
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert target.read_bytes() == b"old"


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("failing", ["file", "directory"])
def test_a_disk_that_does_not_take_it_is_one_line(tmp_path, monkeypatch, number, failing):
    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == (failing == "directory"):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match=f"cannot write.*{os.strerror(number)}"):
        write_whole(tmp_path / "file")
    assert (tmp_path / "file").exists() == (failing == "directory")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_flushes_no_directory_is_enough(tmp_path, monkeypatch, number):
    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, "")

    monkeypatch.setattr(os, "fsync", fsync)
    write_whole(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == DATA


def test_a_file_that_is_removed_before_it_is_locked_is_opened_again(tmp_path, monkeypatch, recorder):
    """By another writer of the same target, which takes it for abandoned: nobody holds its lock yet."""
    target, flock, removed = tmp_path / "file", fcntl.flock, []

    def slow(file, operation) -> None:
        if operation == fcntl.LOCK_EX and len(removed) < 2:
            removed.append(file.name)
            writing._remove_abandoned(target)
            if len(removed) == 2:  # and another file has its name
                Path(file.name).write_bytes(b"another's")
        flock(file, operation)

    monkeypatch.setattr(writing.fcntl, "flock", slow)
    write_whole(target)
    assert len(removed) == 2
    assert target.read_bytes() == DATA
    assert recorder.events[0][1] == recorder.events[1][1] == target.stat().st_ino
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_only_what_is_abandoned_of_the_same_target_is_removed(tmp_path):
    """A name may hold what a pattern of files means by another."""
    left = [tmp_path / f".{name}.1.2.part" for name in ("[ab].json", "a.json", "x[ab].json", "[ab].json.bak")]
    for path in left:
        path.touch()
    writing.write_bytes(tmp_path / "[ab].json", DATA)
    assert {path.name for path in tmp_path.iterdir()} == {"[ab].json", *(path.name for path in left[1:3])}


def test_json_is_written_for_people_too(tmp_path):
    writing.write_json(tmp_path / "x", {"b": "ü→", "a": [1, None]})
    assert (tmp_path / "x").read_bytes() == '{\n  "b": "ü→",\n  "a": [\n    1,\n    null\n  ]\n}\n'.encode()


def write_often(target: str, number: int) -> None:
    for _ in range(60):
        writing.write_bytes(Path(target), bytes([number]) * 50_000)


def test_writers_at_once_remove_nothing_of_each_other(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=write_often, args=(str(tmp_path / "file"), n)) for n in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    data = (tmp_path / "file").read_bytes()
    assert len(data) == 50_000
    assert len(set(data)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_is_too_small_by_a_byte_is_refused(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        machine.shutil, "disk_usage", lambda path: asked.append(path) or SimpleNamespace(free=5_000_000_000)
    )
    require_disk(5_000_000_000, tmp_path / "not/yet/there", "the result")
    assert asked == [tmp_path]
    with pytest.raises(UserError, match=r"disk too small: .*5\.0 GB free, expected 5\.0 GB for the result; make room"):
        require_disk(5_000_000_001, tmp_path, "the result")
    assert set(asked) == {tmp_path}, "the directory itself may be a disk's"


def test_a_conversion_asks_for_its_room_before_it_hashes(source_copy, tmp_path, monkeypatch):
    from conftest import local

    from gptoss_nf4.fetch.fetch import fetch

    model, artifacts = local(source_copy, tmp_path / "artifacts")
    size = sum(file.stat().st_size for file in source_copy.glob("*.safetensors"))
    free = SimpleNamespace(free=size // 2)  # a result is about as large as its source
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: free)
    with pytest.raises(UserError, match=r"disk too small.*the converted checkpoint"):
        fetch(model, artifacts)
    assert not artifacts.root.exists()
    free.free = 2 * size
    assert fetch(model, artifacts)["tensors"] > 0


def test_only_the_declared_bytes_are_taken_and_all_of_them(tmp_path):
    """Whoever writes a tensor file has to bring what its header says, in that order."""
    declared = [Declared("codes", "U8", (2, 4)), Declared("absmax", "F32", (2,))]
    codes, absmax = np.zeros((2, 4), np.uint8), np.ones(2, np.float32)

    def written(*appended: tuple[str, np.ndarray]) -> None:
        with writing_tensors(tmp_path / "x.safetensors", declared) as out:
            for name, piece in appended:
                out.append(name, piece)

    for appended, told in (
        ([("absmax", absmax)], "8 bytes of absmax appended, but 8 bytes of codes come next"),
        ([("codes", codes), ("codes", codes)], "8 bytes of codes appended, but 8 bytes of absmax come next"),
        ([("codes", codes[:1]), ("codes", codes)], "8 bytes of codes appended, but 4 bytes of codes come next"),
        ([("codes", codes), ("absmax", absmax), ("more", codes)], "8 bytes of more appended, but all is written"),
        ([("codes", codes)], "the file is not whole: 8 bytes of absmax come next"),
        ([("codes", codes), ("absmax", absmax[:1])], "the file is not whole: 4 bytes of absmax come next"),
    ):
        with pytest.raises(ValueError, match=f"^{told}$"):
            written(*appended)
        assert list(tmp_path.iterdir()) == []
    written(("codes", codes[:1]), ("codes", codes[1:]), ("absmax", absmax))
    assert load_file(tmp_path / "x.safetensors")["absmax"].tolist() == [1, 1]
