"""The conversion of a full-size source, measured against copying it.

    python -m benchmarks.conversion [--model synthetic_20b] [--layers 24] [--growth 1 6 12]

It makes the source itself, of random codes, and works in a directory of its own. It prints the tables and writes
metrics/conversion.json. It takes six to twelve minutes on two cores, and 45 GB of disk while `cp` is measured.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.tables import markdown

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
DVC = [PYTHON, "-m", "dvc"]
CHANGED_LAYER = 0


@dataclass
class Run:
    """What one or several commands took. The peak is that of the largest process among all that they started."""

    seconds: float = 0.0
    peak_bytes: int = 0
    stages: int = 0

    def __add__(self, other: "Run") -> "Run":
        return Run(self.seconds + other.seconds, max(self.peak_bytes, other.peak_bytes), self.stages + other.stages)


def run(directory: Path, *command: str) -> Run:
    """Run `command` in `directory` and measure it; ends this program where it fails."""
    environment = os.environ | {"PATH": f"{Path(PYTHON).parent}:{os.environ['PATH']}"}
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=directory, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None  # a pipe, as asked for
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)  # usage: the largest of the process and of those that it waited for
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - started
    if process.returncode:
        sys.exit(f"error: {' '.join(command)}: got status {process.returncode}, expected 0; its message stands above")
    # A stage's last line has its seconds. stages/parallel.py has one line for all layers.
    ran = re.findall(r"^(?:fetch|dequant|requant|normalize|assemble|prove): (?:(\d+) layers)?.*, [\d.]+ s$", output, re.M)
    return Run(seconds, usage.ru_maxrss * 1024, sum(int(layers or 1) for layers in ran))


def checkout(project: Path) -> Path:
    """Copy the project's files to `project`, with a git repository of its own, which DVC asks for."""
    shutil.rmtree(project, ignore_errors=True)
    for name in subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True).split():
        if (ROOT / name).is_file():
            (project / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, project / name)
    subprocess.run(["git", "init", "-q"], cwd=project, check=True)
    return project


def clean(project: Path) -> None:
    """Forget every result but the source."""
    results = [project / "dvc.lock", project / "metrics", project / ".dvc/cache", project / ".dvc/tmp"]
    results += [path for path in (project / "artifacts").glob("*/*") if path.name != "source"]
    for path in results:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def configure(project: Path, args: argparse.Namespace, layers: int, *overrides: str) -> None:
    run(project, PYTHON, "stages/configure.py", f"model={args.model}", f"model.layers={list(range(layers))}", *overrides)


def source_files(project: Path, args: argparse.Namespace) -> list[Path]:
    return sorted((project / "artifacts" / args.model / "source").glob("*.safetensors"))


def copy_and_digest(project: Path, args: argparse.Namespace) -> Run:
    """`cp` of the source's weights, then `md5sum` of them."""
    files, copy = [str(file) for file in source_files(project, args)], project.parent / "copy"
    copy.mkdir(exist_ok=True)
    try:
        return run(project, "cp", *files, str(copy)) + run(project, "md5sum", *files)
    finally:
        shutil.rmtree(copy)


def change_a_code(project: Path, args: argparse.Namespace) -> None:
    """Flip one bit of the first expert of CHANGED_LAYER, in place: so a new fine-tune differs, in one layer."""
    from gptoss_nf4.storage.checkpoint import Checkpoint

    name = f"model.layers.{CHANGED_LAYER}.mlp.experts.down_projs.0.weight"
    info = Checkpoint(project / "artifacts" / args.model / "source").tensors[name]
    with info.file.open("r+b") as file:
        file.seek(info.start + 1000)
        byte = file.read(1)
        file.seek(info.start + 1000)
        file.write(bytes([byte[0] ^ 1]))


def disk_bytes(directory: Path) -> int:
    """Bytes on disk below `directory`. A file with several names counts once."""
    seen = {(s.st_dev, s.st_ino): s.st_blocks * 512 for s in (p.lstat() for p in directory.rglob("*"))}
    return sum(seen.values())


def measure(project: Path, args: argparse.Namespace) -> dict:
    """All rows of the first table, in an order in which each finds what it needs."""
    parallel, repro = (PYTHON, "stages/parallel.py"), (*DVC, "repro", "assemble")
    refetch = (*DVC, "repro", "-s", "-f", "fetch")
    configure(project, args, args.layers)
    rows = {"fetch, which writes the source": run(project, *DVC, "repro", "-s", "fetch")}
    rows["cp + md5sum of the source"] = copy_and_digest(project, args)
    before = disk_bytes(project)
    clean(project)
    rows["clean, stages/parallel.py"] = run(project, *parallel)
    artifacts = project / "artifacts" / args.model
    output = disk_bytes(artifacts / "checkpoint")
    disk = (disk_bytes(project) - before) / output
    rows["nothing changed, dvc repro assemble"] = run(project, *repro)
    rows["prove: every tensor, codes through bitsandbytes"] = run(project, *DVC, "repro", "prove")
    exactness = json.loads((project / "metrics/exactness.json").read_text())
    change_a_code(project, args)
    rows["one layer changed, fetch and dvc repro assemble"] = run(project, *refetch) + run(project, *repro)
    configure(project, args, args.layers, "dtype=bfloat16")
    rows["dtype changed to bfloat16, dvc repro assemble"] = run(project, *repro)
    configure(project, args, args.layers)
    # DVC has the float16 of above; computed again all the same.
    rows["dtype changed to float16, dvc repro assemble"] = run(project, *repro, "--no-run-cache")
    configure(project, args, args.layers, "dtype=bfloat16")
    clean(project)
    rows["clean, bfloat16, stages/parallel.py"] = run(project, *parallel)
    configure(project, args, args.layers)
    clean(project)
    rows["clean, plain dvc repro assemble"] = run(project, *repro)
    return {
        "model": args.model,
        "layers": args.layers,
        "cores": len(os.sched_getaffinity(0)),
        "source_bytes": sum(file.stat().st_size for file in source_files(project, args)),
        "output_bytes": output,
        "disk_by_output": disk,
        "values_compared": exactness["compared"],
        "values_different": exactness["different"],
        "runs": {name: asdict(row) for name, row in rows.items()},
    }


def growth(project: Path, args: argparse.Namespace) -> list[dict]:
    """Clean conversions of fewer layers, and copying as many."""
    rows = []
    for layers in args.growth:
        shutil.rmtree(project / "artifacts", ignore_errors=True)
        configure(project, args, layers)
        run(project, *DVC, "repro", "-s", "-f", "fetch")  # DVC may know this source from before, but not bring it back
        copied = copy_and_digest(project, args)
        clean(project)
        rows.append(growth_row(layers, asdict(run(project, PYTHON, "stages/parallel.py")), asdict(copied)))
    return rows


def growth_row(layers: int, converted: dict, copied: dict) -> dict:
    """A row of the table of growth, from two `Run`s."""
    return {
        "layers": layers,
        "seconds": converted["seconds"],
        "peak_gib": converted["peak_bytes"] / 2**30,
        "copy_seconds": copied["seconds"],
    }


def plotted(rows: list[dict]) -> dict[str, list[dict]]:
    """The points of two plots in dvc.yaml, by the directory below plots/."""
    curves = {"conversion": "seconds", "cp + md5sum": "copy_seconds"}
    return {
        "conversion": [
            {"layers": row["layers"], "series": name, "seconds": row[key]} for name, key in curves.items() for row in rows
        ],
        "memory": [{"layers": row["layers"], "peak_gib": row["peak_gib"]} for row in rows],
    }


def report(result: dict) -> None:
    size = f"{result['layers']} layers, {result['source_bytes'] / 1e9:.2f} GB"
    print(f"\n{result['model']} (synthetic), {size}, {result['cores']} cores\n")
    copied = result["runs"]["cp + md5sum of the source"]["seconds"]
    rows = []
    for name, taken in result["runs"].items():
        seconds, gib = taken["seconds"], taken["peak_bytes"] / 2**30
        rows.append([name, f"{seconds:.1f}", f"{seconds / copied:.2f}", f"{gib:.2f}", taken["stages"]])
    print(markdown(["what", "seconds", "of cp + md5sum", "largest process GiB", "stages run"], rows))
    print(f"disk beyond the source, cache included: {result['disk_by_output']:.2f} of the output")
    print(f"values compared: {result['values_compared']}, different: {result['values_different']}\n")
    if result["growth"]:
        rows = [
            [row["layers"], f"{row['seconds']:.1f}", f"{row['copy_seconds']:.1f}", f"{row['peak_gib']:.2f}"]
            for row in result["growth"]
        ]
        print(markdown(["layers", "seconds", "cp + md5sum", "largest process GiB"], rows))
        print("plot: dvc plots show")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("artifacts/benchmark-conversion"))
    parser.add_argument("--model", default="synthetic_20b", choices=("synthetic_20b", "synthetic_120b"))
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--growth", type=int, nargs="*", default=[1, 6, 12], help="clean runs with fewer layers")
    args = parser.parse_args()
    project = checkout(args.directory.resolve() / "project")
    result = measure(project, args)
    result["growth"] = growth(project, args)
    if result["growth"]:
        runs = result["runs"]
        whole = growth_row(args.layers, runs["clean, stages/parallel.py"], runs["cp + md5sum of the source"])
        result["growth"].append(whole)
    shutil.rmtree(project)
    report(result)
    out = Path("metrics/conversion.json")
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    for plot, points in plotted(result["growth"]).items():
        (ROOT / f"plots/{plot}/points.json").write_text(json.dumps(points, indent=2) + "\n")


if __name__ == "__main__":
    main()
