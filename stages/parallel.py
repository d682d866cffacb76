"""`dvc repro` on every core: python stages/parallel.py [targets of dvc repro, assemble by default]

DVC runs one stage after another, and reads and writes the whole of dvc.lock after each. But layers do not depend on each
other. So this asks `dvc status` which stages changed and runs their commands, as many at a time as there are cores. Then
`dvc commit` records all stages of a kind at once. A plain `dvc repro` comes last: it runs what is left and finds the rest
done. Commands, bytes and dvc.lock are the same as without this script.
"""

import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import connection, forkserver
from pathlib import Path

import yaml

# Kinds of stages, by their names in dvc.yaml. Those of LAYER_KINDS run in this order, each for all layers side by side.
LAYER_KINDS, NORMALIZE = ("dequant", "requant"), "normalize"
KINDS = (*LAYER_KINDS, NORMALIZE)
DVC = [sys.executable, "-m", "dvc"]


def dvc(*arguments: str) -> str:
    """Run DVC and return what it prints. Where it fails, exit with its status; it has printed why."""
    done = subprocess.run([*DVC, *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def kinds_of_stages(layers: list[int], changed: set[str]) -> dict[str, list[str]]:
    """The stages to run, by kind, of a model with `layers`. `changed` has the stages that `dvc status` names."""
    # Where dequant runs again, requant does: absmax may change.
    needed = changed | {f"requant@{layer}" for layer in layers if f"dequant@{layer}" in changed}
    found = {kind: [f"{kind}@{layer}" for layer in layers] for kind in KINDS} | {NORMALIZE: [NORMALIZE]}
    return {kind: run for kind, stages in found.items() if (run := [stage for stage in stages if stage in needed])}


def run_script(arguments: list[str]) -> None:
    """Do what `python SCRIPT ARGUMENTS` does, in a process that has imported most modules already."""
    sys.argv = arguments
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the server, of which this is a fork, ignores it
        runpy.run_path(arguments[0], run_name="__main__")
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())  # the script has set it: one line


class Scripts:
    """Runs the scripts of stages, `workers` at a time. Once one has failed, no other starts."""

    def __init__(self, workers: int) -> None:
        self._pool = ThreadPoolExecutor(workers)
        self._failed, self._lock = threading.Event(), threading.Lock()
        # Imports take as long as a layer. A server does them once and forks for each command.
        self._server = multiprocessing.get_context("forkserver")
        self._server.set_forkserver_preload(["common", "gptoss_nf4.convert.requant"])
        # While the server imports, Ctrl-C would end it with a traceback. It inherits that it is to ignore it.
        heeded = signal.signal(signal.SIGINT, signal.SIG_IGN)
        forkserver.ensure_running()
        signal.signal(signal.SIGINT, heeded)

    def start(self, stage: str) -> Future:
        """Queue `stage`. The future tells whether it ran and succeeded."""
        return self._pool.submit(self._run, stage)

    def _run(self, stage: str) -> bool:
        if self._failed.is_set():
            return False
        kind, _, layer = stage.partition("@")
        command = [f"stages/{kind}.py", *([f"layer={layer}"] if layer else [])]
        process = self._server.Process(target=run_script, args=(command,))
        # start() also reaps processes that have ended. Meanwhile join() in another thread would miss one, and report 255.
        with self._lock:
            process.start()
        connection.wait([process.sentinel])
        with self._lock:
            process.join()
        if process.exitcode:
            self._failed.set()
        return process.exitcode == 0


def run_stages(kinds: dict[str, list[str]], workers: int) -> None:
    """Run the stages of `kinds`, and record those that are done.

    `dvc commit` replaces each file by a link to the cache, and for a moment there is none. So a kind is recorded only when
    no stage that reads its files is running. normalize reads none of the layers' files, so it runs meanwhile.
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
    """Have DVC record the stages that are `done`.

    Where all stages of a kind that had to run are done, the kind's name is given: it stands for all layers, of which the
    others have not changed, and DVC then writes dvc.lock once.
    """
    targets: list[str] = []
    for kind, stages in done.items():
        targets += [kind] if stages and stages == kinds[kind] else stages
    if targets:
        dvc("commit", "--quiet", "--force", *targets)


def repro(targets: list[str]) -> int:
    """Run what is out of date. Returns the status of the `dvc repro` at the end."""
    print(dvc("repro", "--single-item", "fetch"), end="", flush=True)  # also says what is wrong with params.yaml
    params = yaml.safe_load(Path("params.yaml").read_text())
    layers, merge = params["model"]["layers"], params["requant"]["merge"]
    if merge:  # the layers need it
        print(dvc("repro", "--single-item", f"adapter@{merge}"), end="", flush=True)
    # By kind, not by stage: DVC looks at all stages again for each target.
    changed = set(json.loads(dvc("status", "--json", *KINDS) or "{}"))
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
