"""`dvc repro` on every core: python stages/parallel.py [targets of dvc repro, assemble by default]

DVC runs one stage after another, and reads and writes the whole of dvc.lock after each. Layers do not depend on each
other, so this runs the commands of the stages that `dvc status` calls changed, as many at a time as there are cores, and
has `dvc commit` record each kind of stage at once. It ends in a plain `dvc repro`, which runs what is left and finds the
rest done: same commands, same bytes, same dvc.lock.
"""

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import connection
from pathlib import Path

import yaml

# What dvc.yaml calls the stages that run side by side, of whatever layer; a layer's kinds one after the other.
LAYER_KINDS, NORMALIZE = ("dequant", "requant"), "normalize"
KINDS = (*LAYER_KINDS, NORMALIZE)
DVC = [sys.executable, "-m", "dvc"]


def dvc(*arguments: str) -> str:
    """Run DVC and return what it prints; where it fails, end with its message and status."""
    done = subprocess.run([*DVC, *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def kinds_of_stages(layers: list[int], changed: set[str]) -> dict[str, list[str]]:
    """Kind -> the stages of it to run."""
    # A layer that is de-nested again is fused again: its absmax may have changed.
    needed = changed | {f"requant@{layer}" for layer in layers if f"dequant@{layer}" in changed}
    found = {kind: [f"{kind}@{layer}" for layer in layers] for kind in KINDS} | {NORMALIZE: [NORMALIZE]}
    return {kind: run for kind, stages in found.items() if (run := [stage for stage in stages if stage in needed])}


def run_script(arguments: list[str]) -> None:
    """What `python script arguments` does, in a process that has imported most of it already."""
    sys.argv = arguments
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())  # the script's own: one line


class Scripts:
    """Runs the stages' scripts, `workers` at a time; none starts once one has failed."""

    def __init__(self, workers: int) -> None:
        self._pool = ThreadPoolExecutor(workers)
        self._failed, self._lock = threading.Event(), threading.Lock()
        # Imports take as long as a layer: a server does them once, and forks for each command.
        self._server = multiprocessing.get_context("forkserver")
        self._server.set_forkserver_preload(["common", "gptoss_nf4.convert.requant"])

    def start(self, stage: str) -> Future:
        """A future of whether the stage ran and succeeded."""
        return self._pool.submit(self._run, stage)

    def _run(self, stage: str) -> bool:
        if self._failed.is_set():
            return False
        kind, _, layer = stage.partition("@")
        command = [f"stages/{kind}.py", *([f"layer={layer}"] if layer else [])]
        process = self._server.Process(target=run_script, args=(command,))
        # Starting a process looks whether others have ended, which must not happen while their thread does (it reads 255).
        with self._lock:
            process.start()
        connection.wait([process.sentinel])
        with self._lock:
            process.join()
        if process.exitcode:
            self._failed.set()
        return process.exitcode == 0


def run_stages(kinds: dict[str, list[str]], workers: int) -> None:
    """Run and record them. `dvc commit` replaces a file by a link to the cache, and for a moment there is none: so a kind
    is recorded when nothing that reads its files runs any more, and normalize, which reads none of them, runs meanwhile.
    """
    scripts = Scripts(workers)
    done: dict[str, list[str]] = {}

    def wait(kind: str, started: dict[str, Future]) -> None:
        done[kind] = [stage for stage, future in started.items() if future.result()]

    def start(kind: str) -> dict[str, Future]:
        return {stage: scripts.start(stage) for stage in kinds.get(kind, [])}

    for kind in LAYER_KINDS:
        wait(kind, start(kind))
    normalize = start(NORMALIZE)
    record({kind: done[kind] for kind in LAYER_KINDS}, kinds)
    wait(NORMALIZE, normalize)
    record({NORMALIZE: done[NORMALIZE]}, kinds)
    if done != {kind: kinds.get(kind, []) for kind in KINDS}:
        sys.exit("error: parallel: a stage failed, see above; what others made is kept, run the command again")


def record(done: dict[str, list[str]], kinds: dict[str, list[str]]) -> None:
    """Have DVC record the stages that are done: a kind's name stands for all of its stages, and writes dvc.lock once.

    The others of that kind did not change.
    """
    targets: list[str] = []
    for kind, stages in done.items():
        targets += [kind] if stages and stages == kinds[kind] else stages
    if targets:
        dvc("commit", "--quiet", "--force", *targets)


def repro(targets: list[str]) -> int:
    """Run what is out of date, and the status of the `dvc repro` that it ends in."""
    layers = yaml.safe_load(Path("params.yaml").read_text())["model"]["layers"]
    print(dvc("repro", "--single-item", "fetch"), end="", flush=True)
    changed = set(json.loads(dvc("status", "--json", *KINDS) or "{}"))  # by kind: DVC looks at all for each target
    if kinds := kinds_of_stages(layers, changed):
        run_stages(kinds, len(os.sched_getaffinity(0)))
    return subprocess.run([*DVC, "repro", *targets]).returncode


def main() -> None:
    try:
        sys.exit(repro(sys.argv[1:] or ["assemble"]))
    except KeyboardInterrupt:
        print("parallel: interrupted; run the command again to go on", file=sys.stderr, flush=True)
        os._exit(130)  # without waiting for threads


if __name__ == "__main__":
    main()
