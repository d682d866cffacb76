"""The command line; what it does stands in the package's docstring."""

import argparse
import json
import time
from pathlib import Path

from benchmarks import serving
from benchmarks.serving.cells import DECODE_CELLS, LONG_CELLS, PREFILL, PREFILL_CELLS, Cell, decode_cell
from benchmarks.serving.jobs import CONTENDERS, DEFAULT_GIB, Job, grouped
from benchmarks.serving.prepare import prepare
from benchmarks.serving.rounds import Plan, Results, measure_all
from benchmarks.serving.tables import kernels, report
from benchmarks.weights import GPT_OSS_20B
from gptoss_nf4.storage.writing import write_json

OUT = Path("metrics/serving.json")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description=serving.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--directory", type=Path, default=Path("artifacts/benchmark-20b"), help="of the weights")
    add("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    add("--together", type=int, default=1, help="engines that are up at the same time, and measure in turn")
    add("--gib", type=float, default=DEFAULT_GIB, help="GPU memory of each engine, when it is up alone")
    add("--kv-gib", type=float, help="fixed size of each engine's KV cache")
    add("--max-model-len", type=int, default=131072)
    add("--decode", nargs="*", type=decode_cell, metavar="BATCHxTOKENS", default=[*DECODE_CELLS, *LONG_CELLS])
    add("--prefill", nargs="*", type=int, metavar="TOKENS", default=[cell.tokens for cell in PREFILL_CELLS])
    add("--rounds", type=int, default=5, help="values of each cell")
    add("--steps", type=int, default=128, help="decode steps of a value")
    add("--minutes", type=float, help="after which no new round starts, counted from the start of this command")
    add("--start-minutes", type=float, default=15, help="for an engine to get ready")
    add("--lora", type=int, metavar="RANK", help="each contender also with LoRA, and adapters of this rank")
    add("--kernels", nargs="*", choices=CONTENDERS, default=[], help="print the device time of each kernel too")
    return parser


def plan_of(args: argparse.Namespace, spent_seconds: float = 0.0) -> Plan:
    """ValueError for what cannot be measured."""
    cells = (*args.decode, *(Cell(PREFILL, tokens) for tokens in args.prefill))
    if not cells or min(args.rounds, args.steps, args.together, *args.prefill, 1) < 1:
        raise ValueError("nothing to measure: give at least one cell, round, step and engine")
    longest = max(cells, key=lambda cell: cell.length(args.steps))
    if longest.length(args.steps) > args.max_model_len:
        raise ValueError(
            f"{longest.name} takes {longest.length(args.steps)} tokens, --max-model-len is {args.max_model_len}"
        )
    # Every second layer of gpt-oss keeps keys and values, of 16 bits, of all tokens. vLLM refuses less, once it has loaded.
    d = GPT_OSS_20B
    least = d.layers // 2 * 2 * d.kv_rows * 2 * args.max_model_len / 2**30
    if args.kv_gib and args.kv_gib < least:
        raise ValueError(f"--max-model-len {args.max_model_len} takes {least:.2f} GiB and more, --kv-gib is {args.kv_gib}")
    return Plan(
        cells=cells,
        rounds=args.rounds,
        steps=args.steps,
        budget=None if args.minutes is None else max(0.0, 60 * args.minutes - spent_seconds),
        start=60 * args.start_minutes,
    )


def jobs_of(args: argparse.Namespace, max_num_seqs: int) -> list[Job]:
    return [
        Job(name, args.directory, args.gib, args.kv_gib, args.max_model_len, max_num_seqs, rank)
        for name in args.contenders
        for rank in ([None, args.lora] if args.lora else [None])
    ]


def settings_of(args: argparse.Namespace, groups: list[list[Job]]) -> str:
    """How it was measured, in one line."""
    jobs = [job for group in groups for job in group]
    memory = {f"{job.kv_gib} GiB of KV cache" if job.kv_gib else f"{job.gib} GiB of GPU memory" for job in jobs}
    return (
        f"{' or '.join(sorted(memory))} each, max_model_len {args.max_model_len}, TRITON_ATTN, CUDA graphs, "
        f"{args.steps} decode steps a value"
    )


def main() -> None:
    started = time.monotonic()
    command = parser()
    args = command.parse_args()
    try:
        plan = plan_of(args)
    except ValueError as error:
        command.error(str(error))
    jobs = jobs_of(args, max_num_seqs=max(plan.batches))
    groups = grouped(jobs, args.together)
    facts = prepare(jobs) | {"settings": settings_of(args, groups)}

    def save(found: Results) -> None:
        write_json(OUT, facts | {"contenders": found})

    measure_all(groups, plan_of(args, time.monotonic() - started), save)
    results = json.loads(OUT.read_text())
    print(report(results))
    print(kernels(results["contenders"], args.kernels))


if __name__ == "__main__":
    main()
