"""`dvc repro` on every core: python stages/parallel.py [targets of dvc repro, assemble by default]

DVC runs one stage after another, and rewrites dvc.lock after each. Layers do not depend on each other, so this runs the
commands of the stages that `dvc status` calls changed, as many at a time as there are cores, and has `dvc commit` record
those that are done while others still run. It ends in a plain `dvc repro`, which runs what is left and finds the rest done:
same commands, same bytes, same dvc.lock.
"""

import json
import multiprocessing
import os
import queue
import runpy
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

BATCH = 12  # stages that one `dvc commit` records: it takes a second to start
DVC = [sys.executable, "-m", "dvc"]


def dvc(*arguments: str) -> str:
    """Run DVC and return what it prints; where it fails, end with its message and status."""
    done = subprocess.run([*DVC, *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def jobs(layers: list[int], changed: set[str]) -> list[list[tuple[str, list[str]]]]:
    """What may run side by side, the longest first: lists of (stage, script and arguments), to be run in turn."""
    found = [[("normalize", ["stages/normalize.py"])]] if "normalize" in changed else []
    for layer in layers:
        names = [f"dequant@{layer}", f"requant@{layer}"]
        # A layer that is de-nested again is fused again: its absmax may have changed.
        needed = names if names[0] in changed else [name for name in names if name in changed]
        if needed:
            found.append([(name, [f"stages/{name.split('@')[0]}.py", f"layer={layer}"]) for name in needed])
    return found


def run_script(arguments: list[str]) -> None:
    """What `python script arguments` does, in a process that has imported most of it already."""
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def run_jobs(found: list[list[tuple[str, list[str]]]], workers: int) -> None:
    """Run all jobs; `dvc commit` records what has finished meanwhile."""
    finished: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    failed = threading.Event()
    # Imports take as long as a layer: a server does them once, and forks for each command.
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["common", "gptoss_nf4.steps"])

    def run(job: list[tuple[str, list[str]]]) -> None:
        for name, command in job:
            if failed.is_set():
                return
            process = server.Process(target=run_script, args=(command,))
            process.start()
            process.join()
            if process.exitcode:
                failed.set()
                return
            finished.put(name)

    with ThreadPoolExecutor(workers) as pool:
        running = [pool.submit(run, job) for job in found]
        threading.Thread(target=lambda: ([each.exception() for each in running], finished.put(None)), daemon=True).start()
        open_end = True
        while open_end:
            names = []
            while len(names) < BATCH and (name := finished.get()):
                names.append(name)
            open_end = len(names) == BATCH
            if names:
                dvc("commit", "--quiet", "--force", *names)
    if failed.is_set():
        sys.exit("error: parallel: a stage failed, see above; what others made is kept, run the command again")


def main() -> None:
    targets = sys.argv[1:] or ["assemble"]
    layers = yaml.safe_load(Path("params.yaml").read_text())["model"]["layers"]
    print(dvc("repro", "--single-item", "fetch", "code"), end="", flush=True)
    stages = ["normalize", *(f"{name}@{layer}" for layer in layers for name in ("dequant", "requant"))]
    changed = set(json.loads(dvc("status", "--json", *stages) or "{}"))
    try:
        run_jobs(jobs(layers, changed), len(os.sched_getaffinity(0)))
    except KeyboardInterrupt:  # the stages had the signal too, and say so
        sys.exit(130)
    sys.exit(subprocess.run([*DVC, "repro", *targets]).returncode)


if __name__ == "__main__":
    main()
