"""Killed, interrupted, out of room, not permitted, damaged on disk, two at once: the right bytes or one clear line."""

import ctypes
import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import warm_python

from benchmarks.conversion import checkout
from gptoss_nf4.storage.tensor_reader import read_header

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent
ENVIRONMENT = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
KILLS, SEED = int(os.environ.get("KILLS", "12")), 20260102
FUSED_KILLS = KILLS // 3
LAYER_STAGES = [[name, f"layer={layer}"] for name in ("dequant", "requant") for layer in (0, 1)]
VLLM_STAGES = [["smoke"], ["benchmark"]]
STAGES = [["fetch"], *LAYER_STAGES, ["normalize"], ["assemble"], ["prove"]]


def start(project: Path, name: str, *arguments: str, warm: bool = True, **options) -> subprocess.Popen:
    """Not warm: what gets signals, or options that are of the process itself."""
    environment = warm_python.environment() if warm else ENVIRONMENT
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    command = ["python", f"stages/{name}.py", *arguments]
    return subprocess.Popen(command, cwd=project, env=environment, text=True, **pipes)


def repro(project: Path) -> None:
    command, environment = ["dvc", "repro", "prove"], warm_python.environment()
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def run_to_its_end(project: Path, stage: list[str]) -> None:
    process = start(project, *stage)
    _, error = process.communicate()
    assert process.returncode == 0, error


def to_kill(project: Path, stage: list[str]) -> warm_python.Process:
    """A stage that is killed, in a warm Python: so a random moment is one of its own work, and not of an import."""
    name, *arguments = stage
    return warm_python.start(project, f"stages/{name}.py", *arguments)


def checkpoint(project: Path, model: str = "tiny") -> dict[str, bytes]:
    directory = project / f"artifacts/{model}/checkpoint"
    return {file.name: file.read_bytes() for file in directory.iterdir() if not file.name.startswith(".")}


def cache_is_whole(project: Path) -> None:
    """Every object of DVC's cache still has the MD5 that it is named by."""
    objects = [p for p in (project / ".dvc/cache/files/md5").rglob("*") if p.is_file() and not p.name.endswith(".dir")]
    assert objects
    for path in objects:
        assert hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() == path.parent.name + path.name


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    """A project whose pipeline ran undisturbed up to prove, and its checkpoint."""
    project = checkout(tmp_path_factory.mktemp("interrupted") / "checkout")
    repro(project)
    return project, checkpoint(project)


@pytest.fixture
def finished(converted) -> tuple[Path, dict[str, bytes]]:
    """What `converted` is, also after a test that failed midway."""
    project, undisturbed = converted
    if not (project / "artifacts/tiny/checkpoint/config.json").exists():
        repro(project)
    return project, undisturbed


def test_sigkill_at_random_moments(finished, capsys):
    """Stages are killed while they run, each several times; what `dvc repro` then makes is what it made undisturbed."""
    project, undisturbed = finished
    rng = random.Random(SEED)
    killed, attempts = killed_at_random(project, rng, KILLS)
    # These write one file, at their end: killed on their way there, which a fast machine goes in less than six seconds.
    assert all(any(killed_within(project, stage, rng.uniform(0.5, most)) for most in (6, 3, 1)) for stage in VLLM_STAGES)
    require_undisturbed(project, undisturbed)
    with capsys.disabled():
        print(f"\n{sum(killed.values())} kills of {attempts} tries: {killed}")


def test_sigkill_while_fused_experts_are_converted(tmp_path, capsys):
    project = checkout(tmp_path / "checkout")
    run_to_its_end(project, ["configure", "model=tiny_fused"])
    repro(project)
    undisturbed = checkpoint(project, "tiny_fused")
    killed, attempts = killed_at_random(project, random.Random(SEED), FUSED_KILLS)
    require_undisturbed(project, undisturbed, "tiny_fused")
    with capsys.disabled():
        print(f"\n{sum(killed.values())} kills of {attempts} tries: {killed}")


def killed_within(project: Path, stage: list[str], seconds: float) -> bool:
    """Whether a stage was killed while it ran, after so long."""
    process = to_kill(project, stage)
    time.sleep(seconds)
    process.kill(group=True)  # vLLM's engine too, which else would stay for a while
    return process.wait() == -signal.SIGKILL


def killed_at_random(project: Path, rng: random.Random, kills: int) -> tuple[dict[str, int], int]:
    """(how often each stage was killed while it ran, number of attempts)."""
    killed = dict.fromkeys((" ".join(stage) for stage in STAGES), 0)
    durations = {}
    for stage in STAGES:
        started = time.monotonic()
        assert to_kill(project, stage).wait() == 0
        durations[" ".join(stage)] = time.monotonic() - started
    attempts = 0
    while sum(killed.values()) < kills or not all(killed[" ".join(stage)] for stage in STAGES):
        running = []
        for _ in range(2):  # two stages at once: as many as the cores of the smallest machine
            attempts += 1
            stage = STAGES[attempts % (len(STAGES) - 1)] if attempts % 12 else ["prove"]  # prove takes seconds
            end = time.monotonic() + rng.uniform(0.3, 1) * durations[" ".join(stage)]
            running.append((end, stage, to_kill(project, stage)))
        assert attempts < 10 * kills
        for end, stage, process in sorted(running, key=lambda each: each[0]):
            time.sleep(max(0.0, end - time.monotonic()))
            process.kill()
            killed[" ".join(stage)] += process.wait() == -signal.SIGKILL
    return killed, attempts


def require_undisturbed(project: Path, undisturbed: dict[str, bytes], model: str = "tiny") -> None:
    """What `dvc repro` makes now is what it made undisturbed, and nothing else is left."""
    repro(project)
    for stage in STAGES:  # what DVC found unchanged was never run again: run it, so that it clears up too
        run_to_its_end(project, stage)
    repro(project)
    assert checkpoint(project, model) == undisturbed
    assert not list(project.rglob("*.part"))
    cache_is_whole(project)


def heed_ctrl_c() -> None:
    """A shell's background jobs are started with SIGINT ignored, and so would what these tests start be."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_ends_within_a_second_with_one_line(finished):
    project, _ = finished
    for stage, delay in ((["requant", "layer=0"], 0.05), (["requant", "layer=1"], 0.25), (["prove"], 1.5)):
        seconds = []
        while not seconds or (min(seconds) >= 1 and len(seconds) < 8):  # a busy machine may delay some
            process = start(project, *stage, warm=False, preexec_fn=heed_ctrl_c)
            time.sleep(delay)
            process.send_signal(signal.SIGINT)
            started = time.monotonic()
            _, error = process.communicate(timeout=30)
            seconds.append(time.monotonic() - started)
            if process.returncode == -signal.SIGINT or "init_import_site" in error:  # Python itself was still starting
                continue
            if process.returncode:  # else it was through already
                assert process.returncode == 130
                assert "Traceback" not in error
                assert len([line for line in error.splitlines() if "kernels" not in line]) <= 1, error
        assert min(seconds) < 1, (stage, seconds, process.returncode, error)


def test_ctrl_c_while_every_core_works(finished):
    """stages/parallel.py, interrupted as a terminal does it: the whole process group.

    A DVC that is still being imported shows where; nothing of ours shows a traceback, but in the first milliseconds of a
    process, before its first import is done. Such a try is no answer.
    """
    project, undisturbed = finished
    shutil.rmtree(project / "artifacts/tiny/checkpoint")
    shutil.rmtree(project / "artifacts/tiny/absmax")
    for delay in (1.0, 2.5, 3.5):
        tracebacks = []
        for _ in range(3):
            process = start(project, "parallel", warm=False, start_new_session=True, preexec_fn=heed_ctrl_c)
            time.sleep(delay)
            os.killpg(process.pid, signal.SIGINT)
            started = time.monotonic()
            _, error = process.communicate(timeout=30)
            assert time.monotonic() - started < 3  # several processes
            assert process.returncode in (130, 255, 0)  # 255 is what DVC ends with, where it was DVC that worked
            if not re.search(r'File ".*(stages|gptoss_nf4)/', error):
                break
            tracebacks.append(error)
        assert len(tracebacks) < 3, tracebacks
    repro(project)
    assert checkpoint(project) == undisturbed
    assert not list(project.rglob("*.part"))


def one_line(process: subprocess.Popen, *words: str) -> None:
    _, error = process.communicate(timeout=120)
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert process.returncode == 1, error
    assert "Traceback" not in error
    assert len(lines) == 1
    for word in words:
        assert word in lines[0]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_and_room_made(finished, tmp_path):
    project, undisturbed = finished
    target = project / "artifacts/tiny/checkpoint"
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "none", str(small)], capture_output=True).returncode:
        pytest.skip("this machine does not let us mount a tmpfs")
    try:
        shutil.move(target, tmp_path / "aside")
        target.symlink_to(small)
        one_line(start(project, "requant", "layer=0"), "cannot write", "layer-0.safetensors", "No space left", "make room")
        assert not list(small.iterdir())
    finally:
        target.unlink(missing_ok=True)
        shutil.move(tmp_path / "aside", target)
        subprocess.run(["umount", str(small)], check=True)
    repro(project)
    assert checkpoint(project) == undisturbed


def test_a_directory_in_the_way(finished):
    project, undisturbed = finished
    weights = project / "artifacts/tiny/checkpoint/layer-0.safetensors"
    weights.unlink()
    weights.mkdir()
    one_line(start(project, "requant", "layer=0"), "cannot write", "layer-0.safetensors")
    weights.rmdir()
    repro(project)
    assert checkpoint(project) == undisturbed


def without_rights_of_root() -> None:
    """Root may read and write whatever the permission bits say: in a child, give up that alone (capabilities(7))."""
    drop_from_bounding_set, dac_override, dac_read_search = 24, 1, 2
    for capability in (dac_override, dac_read_search):
        ctypes.CDLL(None).prctl(drop_from_bounding_set, capability, 0, 0, 0)  # fails for others than root, who lack it


def test_permission_denied(finished):
    project, undisturbed = finished
    source, target = project / "artifacts/tiny/source", project / "artifacts/tiny/checkpoint"
    shard = next(source.glob("model-00001-of-*.safetensors"))
    for path, bits, stage, words in (
        (target, 0o555, ["requant", "layer=0"], ["cannot write", "layer-0.safetensors", "make room or give permission"]),
        (shard, 0o000, ["requant", "layer=0"], ["cannot read", shard.name, "make it readable"]),
        (source, 0o000, ["normalize"], ["cannot read", "source"]),
        (source / "tokenizer.json", 0o000, ["assemble"], ["cannot read", "tokenizer.json"]),
        (project / "artifacts/tiny/absmax/layer-1.safetensors", 0o000, ["requant", "layer=1"], ["cannot read", "absmax"]),
    ):
        before = path.stat().st_mode
        path.chmod(bits)
        try:
            one_line(start(project, *stage, warm=False, preexec_fn=without_rights_of_root), *words, "Permission denied")
        finally:
            path.chmod(before)
    repro(project)
    assert checkpoint(project) == undisturbed


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file that gives read errors needs root")
def test_a_read_error(finished):
    """The first page of this process's memory, mounted in the shard's place: reading it is EIO, as from a broken disk."""
    project, undisturbed = finished
    shard = next((project / "artifacts/tiny/source").glob("model-00001-of-*.safetensors"))
    if subprocess.run(["mount", "--bind", f"/proc/{os.getpid()}/mem", str(shard)], capture_output=True).returncode:
        pytest.skip("this machine does not let us mount")
    try:
        for stage in (["dequant", "layer=0"], ["requant", "layer=0"], ["normalize"]):
            one_line(start(project, *stage), "cannot read", shard.name, "Input/output error", "check the disk")
    finally:
        subprocess.run(["umount", str(shard)], check=True)
    repro(project)
    assert checkpoint(project) == undisturbed


def test_two_runs_at_once_tear_no_file(finished):
    project, undisturbed = finished
    dtypes, orders = ("float16", "bfloat16", "float32", "float16"), ("interleaved", "concatenated")
    for _ in range(3):
        processes = [start(project, "normalize", f"dtype={dtype}") for dtype in dtypes]
        processes += [start(project, "requant", "layer=1", f"requant.w13_order={order}") for order in orders]
        assert [process.wait() for process in processes] == [0] * len(processes)
        for file in (project / "artifacts/tiny/checkpoint").glob("*.safetensors"):
            assert read_header(file)
    cache_is_whole(project)
    repro(project)
    assert checkpoint(project) == undisturbed


def test_two_repros_at_once_wait_or_refuse(finished, capsys):
    """DVC locks what a stage reads and writes: the second run waits, or ends with a line that names the first."""
    project, undisturbed = finished
    command = ["dvc", "repro", "-s", "-f", "dequant@0", "requant@0", "normalize", "assemble"]
    outcomes, pipes = {"done": 0, "refused": 0}, {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, cwd=project, env=warm_python.environment(), **pipes) for _ in range(2)]
    for process in processes:
        _, error = process.communicate(timeout=120)
        assert "Traceback" not in error
        if process.returncode:
            assert "busy" in error or "lock" in error, error
        outcomes["refused" if process.returncode else "done"] += 1
    assert outcomes["done"] >= 1
    cache_is_whole(project)
    repro(project)
    assert checkpoint(project) == undisturbed
    with capsys.disabled():
        print(f"\ntwo dvc repro at once: {outcomes}")


def test_an_edited_checkpoint_is_caught_by_its_digests(finished):
    project, _ = finished
    assert start(project, "verify").wait() == 0
    file = project / "artifacts/tiny/checkpoint/dense.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.unlink()  # it is a link into DVC's cache
    file.write_bytes(data)
    one_line(start(project, "verify"), "checkpoint changed", "dense.safetensors", "dvc repro prove")
    repro(project)
    assert start(project, "verify").wait() == 0
