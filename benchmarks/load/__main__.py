"""The command line; what it does stands in the package's docstring."""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from benchmarks import load
from benchmarks.load.rounds import Report, under_load
from benchmarks.tables import markdown
from gptoss_nf4.convert.plan import RequantOptions
from gptoss_nf4.flow import convert
from gptoss_nf4.samples import embedded
from gptoss_nf4.source.layouts import open_checkpoint
from gptoss_nf4.source.model import Model
from gptoss_nf4.storage.artifacts import Artifacts

LOG = Path("metrics/load.log")
COLUMNS = [
    "round",
    "answered",
    "hung up",
    "wrong",
    "lost",
    "tokens",
    "most running",
    "most waiting",
    "run to the end",
    "preempted",
    "tokens from the cache",
    "MiB afterwards",
]


def table(report: Report) -> str:
    rows: list[list] = [["quiet", *[None] * (len(COLUMNS) - 2), f"{report.resident_bytes / 2**20:.1f}"]]
    for number, each in enumerate(report.rounds, 1):
        told = each.outcome
        counts = [told.answered, told.hung_up, len(told.wrong), len(told.lost), told.tokens]
        engine = [each.most_running, each.most_waiting, each.run_to_end, each.preempted, each.prefix_tokens]
        rows.append([number, *counts, *engine, f"{each.resident_bytes / 2**20:.1f}"])
    return markdown(COLUMNS, rows)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load", description=load.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60, help="of each round")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=2)
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with tempfile.TemporaryDirectory() as directory:
        path, artifacts = Path(directory) / "source", Artifacts(Path(directory) / "artifacts")
        embedded.write_checkpoint(path)
        convert(Model(name="load", kind="local", path=str(path)), artifacts, RequantOptions(), "float32")
        source = open_checkpoint(path)
        report = under_load(source, artifacts.checkpoint, LOG, args.clients, args.seconds, args.rounds)
    print(f"{report.questions} questions, {args.clients} clients, {args.seconds:g} s a round; the server's log: {LOG}\n")
    print(table(report))
    if faults := list(report.faults()):
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
