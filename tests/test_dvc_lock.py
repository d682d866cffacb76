"""stages/dvc_lock.py: DVC's list of running processes is mended where it is broken and no DVC runs, and never else."""

import fcntl
import json
import os
import subprocess
import sys

import pytest
import warm_python
from project_imports import ROOT

sys.path.insert(0, str(ROOT / "stages"))
BROKEN = [
    b"",
    b'{"write": {"a": {"pid": 1, "cmd"',
    b"\0\0\0",
    b"\xff",
    b"[]",
    b'{"read": 5}',
    b'{"read": {"a": [1]}}',
    b"null",
]
WHOLE = [b"{}", b'{"write": {}, "read": {}}', b'{"write": {"a": {"pid": 999999, "cmd": "dvc repro"}}, "read": {}}']


@pytest.fixture
def rwlock(tmp_path, monkeypatch):
    """Where the file is, in a project that is the working directory."""
    (tmp_path / ".dvc/tmp").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / ".dvc/tmp/rwlock"


def dvc_says(project) -> str:
    """What DVC itself says about the file."""
    script = project / "ask.py"
    script.write_text(
        "import sys; from dvc.fs import localfs; from dvc.rwlock import rwlock\n"
        "with rwlock('.dvc/tmp', localfs, 'x', [], ['y'], False): pass"
    )
    done = subprocess.run(["python", script], cwd=project, env=warm_python.environment(), capture_output=True, text=True)
    return done.stderr if done.returncode else ""


@pytest.mark.slow
@pytest.mark.parametrize("content", BROKEN)
def test_what_dvc_cannot_read_is_deleted(rwlock, tmp_path, content):
    from dvc_lock import mend

    rwlock.write_bytes(content)
    assert dvc_says(tmp_path)
    rwlock.write_bytes(content)
    assert mend()
    assert not rwlock.exists()
    assert dvc_says(tmp_path) == ""


@pytest.mark.parametrize("content", WHOLE)
def test_what_dvc_reads_stays(rwlock, tmp_path, content):
    from dvc_lock import mend

    rwlock.write_bytes(content)
    assert not mend()
    assert rwlock.read_bytes() == content
    assert dvc_says(tmp_path) == ""


@pytest.mark.slow
def test_zombies_are_no_processes_at_work(rwlock, tmp_path):
    """DVC waits for them: they end, and whoever started them has not asked how."""
    from dvc_lock import mend

    with subprocess.Popen([sys.executable, "-c", ""]) as zombie, subprocess.Popen(["sleep", "60"]) as at_work:
        os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)  # ended, and not waited for
        for others, expected in ((), True), ((999999,), True), ((at_work.pid,), False):
            infos = [{"pid": pid, "cmd": "dvc repro"} for pid in (zombie.pid, *others)]
            content = json.dumps({"read": {"y": infos}, "write": {}})
            rwlock.write_text(content)
            assert "busy" in dvc_says(tmp_path)
            rwlock.write_text(content)
            assert mend() == expected
            assert rwlock.exists() != expected
        at_work.kill()


def test_nothing_to_mend(rwlock, tmp_path, monkeypatch):
    from dvc_lock import mend

    assert not mend()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert not mend()
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("guard", ["lock", "rwlock.lock"])
def test_a_lock_that_dvc_holds_keeps_the_file(rwlock, guard):
    from dvc_lock import mend

    rwlock.write_bytes(b"")
    with (rwlock.parent / guard).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert not mend()
        assert rwlock.exists()
    assert mend()


@pytest.mark.parametrize("name", ["dvc", "quiet_dvc.py"])
@pytest.mark.parametrize("place", [".", "below"])
def test_a_dvc_that_waits_for_a_stage_keeps_the_file(rwlock, tmp_path, name, place):
    """It holds no lock then. One of another project does not count."""
    from dvc_lock import mend

    rwlock.write_bytes(b"")
    (tmp_path / name).write_text("import time\nprint('up', flush=True)\ntime.sleep(60)\n")
    (tmp_path / "below").mkdir()
    command = [sys.executable, str(tmp_path / name), "repro"]
    for project, expected in ((tmp_path / place, False), (tmp_path.parent, True)):
        with subprocess.Popen(command, cwd=project, stdout=subprocess.PIPE) as process:
            assert process.stdout.readline()
            assert mend() == expected
            assert rwlock.exists() != expected
            process.kill()


@pytest.mark.slow
def test_a_run_after_a_kill_mends_it(tmp_path):
    from benchmarks.conversion import checkout

    project = checkout(tmp_path / "checkout")
    (project / ".dvc/tmp").mkdir(parents=True, exist_ok=True)
    (project / ".dvc/tmp/rwlock").write_bytes(b"")
    done = subprocess.run(
        ["python", "stages/parallel.py", "fetch"],
        cwd=project,
        env=warm_python.environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "in the way; it is deleted" in done.stdout
