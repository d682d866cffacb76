"""`dvc repro` on every core: python stages/parallel.py [stages of dvc.yaml, assemble by default]

DVC runs one stage after another, and reads and writes the whole of dvc.lock after each. But layers do not depend on each
other. So this asks `dvc status` which stages changed and runs their commands, as many at a time as there are cores. Then
`dvc commit` records all stages of a kind at once. A plain `dvc repro` comes last: it runs what is left and finds the rest
done. Commands, bytes and dvc.lock are the same as without this script. A kind of stages gets one line, not one a layer.
"""

from ending import end_together

# isort: split
import contextlib
import io
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import connection, forkserver
from pathlib import Path

import yaml
from common import model_of, require_settings
from dvc_lock import mend
from omegaconf import DictConfig
from params import settings

from gptoss_nf4.convert.plan import EXACT
from gptoss_nf4.errors import UserError
from gptoss_nf4.fetch.budget import stage_bytes
from gptoss_nf4.source.model import open_source
from gptoss_nf4.storage.progress import Progress, show_elsewhere, size_text
from gptoss_nf4.storage.reading import read_text

# Kinds of stages, by their names in dvc.yaml. Those of LAYER_KINDS run in this order, each for all layers side by side.
LAYER_KINDS, NORMALIZE = ("dequant", "requant"), "normalize"
KINDS = (*LAYER_KINDS, NORMALIZE)
# Which of KINDS a target needs. Any other stage of dvc.yaml needs all of them.
NEEDED = {"fetch": (), "adapter": (), "dequant": ("dequant",), "requant": LAYER_KINDS, NORMALIZE: (NORMALIZE,)}
DVC = [sys.executable, "stages/quiet_dvc.py"]
SECONDS_BETWEEN_LOOKS = 0.1  # at what the stages have written


def dvc(*arguments: str) -> None:
    """Run DVC. Where it fails, exit with its status; it has printed why."""
    if status := subprocess.run([*DVC, *arguments]).returncode:
        sys.exit(status)


def changed_stages() -> set[str]:
    """The stages of KINDS that `dvc status` names. It is asked by kind: DVC looks at all stages again for each target."""
    done = subprocess.run([*DVC, "status", "--json", *KINDS], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return set(json.loads(done.stdout or "{}"))


def kinds_of_stages(layers: list[int], changed: set[str]) -> dict[str, list[str]]:
    """The stages to run, by kind, of a model with `layers`. `changed` has the stages that `dvc status` names."""
    # Where dequant runs again, requant does: absmax may change.
    needed = changed | {f"requant@{layer}" for layer in layers if f"dequant@{layer}" in changed}
    found = {kind: [f"{kind}@{layer}" for layer in layers] for kind in KINDS} | {NORMALIZE: [NORMALIZE]}
    return {kind: run for kind, stages in found.items() if (run := [stage for stage in stages if stage in needed])}


def stages_for(targets: list[str], cfg: DictConfig) -> set[str]:
    """The stages of KINDS that `dvc repro TARGETS` would run if all had changed. UserError where one is no stage."""
    known = yaml.safe_load(read_text(Path("dvc.yaml")))["stages"]
    layers = [str(layer) for layer in cfg.model.layers]
    adapters = list(cfg.adapters)
    items = {"dequant": layers, "requant": layers, "adapter": adapters, "smoke-adapter": adapters}
    found: set[str] = set()
    for target in targets:
        kind, has_item, item = target.partition("@")
        if kind not in known or (has_item and item not in items.get(kind, ())):
            choices = [f"{each}@{'|'.join(items[each])}" if items.get(each) else each for each in known]
            raise UserError(
                "no such stage",
                where="dvc.yaml",
                got=target,
                expected=f"one of {', '.join(choices)}",
                next_step="name one of these; options of dvc repro are for `dvc repro` itself",
            )
        its_layers = [item] if has_item and kind in LAYER_KINDS else layers
        for each in NEEDED.get(kind, KINDS):
            found |= {NORMALIZE} if each == NORMALIZE else {f"{each}@{layer}" for layer in its_layers}
    return found


def run_script(arguments: list[str], written: connection.Connection) -> None:
    """Do what `python SCRIPT ARGUMENTS` does, in a process that has imported most modules already.

    `written` gets the number of bytes of each piece that the script writes. What a layer's stage prints is left out.
    """

    def advance(count: int) -> None:
        with contextlib.suppress(BrokenPipeError):  # nobody looks any more
            written.send_bytes(count.to_bytes(8, "little"))

    sys.argv = arguments
    show_elsewhere(advance)
    one_of_many = contextlib.redirect_stdout(io.StringIO()) if len(arguments) > 1 else contextlib.nullcontext()
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the server, of which this is a fork, ignores it
        with one_of_many:
            runpy.run_path(arguments[0], run_name="__main__")
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())  # the script has set it: one line


class Scripts:
    """Runs the scripts of stages, `workers` at a time. Once one has failed, no other starts."""

    def __init__(self, workers: int, modules: tuple[str, ...]) -> None:
        """`modules`: imported once, for all scripts."""
        self._pool = ThreadPoolExecutor(workers)
        self._failed, self._lock = threading.Event(), threading.Lock()
        # Imports take as long as a layer. A server does them once and forks for each command.
        self._server = multiprocessing.get_context("forkserver")
        # A pipe, since a shared integer would need a semaphore, which Python complains about after Ctrl-C.
        self._reports, self._report_to = self._server.Pipe(duplex=False)
        self.written = 0
        """Bytes that all stages have written so far."""
        threading.Thread(target=self._count, daemon=True).start()
        # Each fork imports the main script once more, which costs nothing where the server has imported it as a module.
        self._server.set_forkserver_preload([Path(sys.argv[0]).stem, *modules])
        # While the server imports, Ctrl-C would end it with a traceback. It inherits that it is to ignore it.
        heeded = signal.signal(signal.SIGINT, signal.SIG_IGN)
        forkserver.ensure_running()
        signal.signal(signal.SIGINT, heeded)

    def start(self, stage: str) -> Future:
        """Queue `stage`. The future tells whether it ran and succeeded."""
        return self._pool.submit(self._run, stage)

    def _count(self) -> None:
        while True:
            self.written += int.from_bytes(self._reports.recv_bytes(), "little")

    @contextlib.contextmanager
    def showing(self, size: int, what: str) -> Iterator[None]:
        """Meanwhile a `Progress` shows the bytes that stages write, of which `size` are still to come."""
        ended, shown = threading.Event(), self.written

        def look() -> None:
            nonlocal shown
            while not ended.wait(SECONDS_BETWEEN_LOOKS):
                now = self.written
                progress.advance(now - shown)
                shown = now

        looks = threading.Thread(target=look, daemon=True)
        with Progress(size, what) as progress:
            looks.start()
            try:
                yield
            finally:
                ended.set()
                looks.join()

    def _run(self, stage: str) -> bool:
        if self._failed.is_set():
            return False
        kind, _, layer = stage.partition("@")
        command = [f"stages/{kind}.py", *([f"layer={layer}"] if layer else [])]
        process = self._server.Process(target=run_script, args=(command, self._report_to))
        # start() also reaps processes that have ended. Meanwhile join() in another thread would miss one, and report 255.
        with self._lock:
            process.start()
        connection.wait([process.sentinel])
        with self._lock:
            process.join()
        if process.exitcode:
            self._failed.set()
        return process.exitcode == 0


def run_stages(
    kinds: dict[str, list[str]],
    sizes: dict[str, int],
    workers: int,
    changed: dict[str, list[str]] | None = None,
    modules: tuple[str, ...] = (),
) -> None:
    """Run the stages of `kinds`, and record those that are done. `sizes`: bytes that all stages of a kind will write.

    `changed` has all stages that are out of date, by kind, where `kinds` has not all of them. `modules` are what the stages
    import that takes long.

    `dvc commit` replaces each file by a link to the cache, and for a moment there is none. So a kind is recorded only when
    no stage that reads its files is running. normalize reads none of the layers' files, so it runs meanwhile.
    """
    scripts = Scripts(workers, modules)
    done: dict[str, list[str]] = {}

    def wait(kind: str, started: dict[str, Future]) -> None:
        begun, before = time.monotonic(), scripts.written
        with scripts.showing(sizes.get(kind, 0), f"stage {kind}"):
            done[kind] = [stage for stage, future in started.items() if future.result()]
        if kind in LAYER_KINDS and done[kind]:
            size, seconds = size_text(scripts.written - before), time.monotonic() - begun
            print(f"{kind}: {len(done[kind])} layers, {size}, {seconds:.1f} s", flush=True)

    def start(kind: str) -> dict[str, Future]:
        return {stage: scripts.start(stage) for stage in kinds.get(kind, [])}

    for kind in LAYER_KINDS:
        wait(kind, start(kind))
    normalize = start(NORMALIZE)
    record({kind: done[kind] for kind in LAYER_KINDS}, changed or kinds)
    wait(NORMALIZE, normalize)
    record({NORMALIZE: done[NORMALIZE]}, changed or kinds)
    if done != {kind: kinds.get(kind, []) for kind in KINDS}:
        sys.exit("error: parallel: a stage failed, see above; what others made is kept, run the command again")


def record(done: dict[str, list[str]], changed: dict[str, list[str]]) -> None:
    """Have DVC record the stages that are `done`.

    Where all stages of a kind that are out of date, `changed`, are done, the kind's name is given: it stands for all
    layers, of which the others have not changed, and DVC then writes dvc.lock once.
    """
    targets: list[str] = []
    for kind, stages in done.items():
        targets += [kind] if stages and stages == changed[kind] else stages
    if targets:
        dvc("commit", "--force", *targets)


def sizes_of(kinds: dict[str, list[str]], cfg: DictConfig) -> dict[str, int]:
    """Bytes that the stages of `kinds` will write, by kind."""
    source = open_source(*model_of(cfg))
    return {kind: sum(stage_bytes(source, stage, cfg.dtype) for stage in stages) for kind, stages in kinds.items()}


def repro(targets: list[str]) -> int:
    """Run what is out of date. Returns the status of the `dvc repro` at the end."""
    cfg = settings()
    require_settings(cfg)
    if mend():
        print("parallel: a DVC that was killed left its list of running processes in the way; it is deleted", flush=True)
    wanted = stages_for(targets, cfg)
    dvc("repro", "--single-item", "fetch")
    if not wanted:
        return subprocess.run([*DVC, "repro", *targets]).returncode
    if cfg.requant.merge:  # the layers need it
        dvc("repro", "--single-item", f"adapter@{cfg.requant.merge}")
    changed = kinds_of_stages(list(cfg.model.layers), changed_stages())
    limited = {kind: [stage for stage in stages if stage in wanted] for kind, stages in changed.items()}
    if kinds := {kind: stages for kind, stages in limited.items() if stages}:
        modules = ("gptoss_nf4.convert.requant", *("gptoss_nf4.eager_bnb",) * (cfg.requant.mode != EXACT))
        run_stages(kinds, sizes_of(kinds, cfg), len(os.sched_getaffinity(0)), changed, modules)
    return subprocess.run([*DVC, "repro", *targets]).returncode


def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    end_together()
    try:
        sys.exit(repro(sys.argv[1:] or ["assemble"]))
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("parallel: interrupted; run the command again to go on", file=sys.stderr, flush=True)
        os._exit(130)  # without waiting for threads


if __name__ == "__main__":
    main()
