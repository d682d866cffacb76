"""The command line; what it does stands in the package's docstring."""

import argparse
import json
from pathlib import Path

from benchmarks import serving
from benchmarks.serving.jobs import CONTENDERS, Job, grouped
from benchmarks.serving.parent import measure_all, prepare
from benchmarks.serving.tables import report


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description=serving.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--directory", type=Path, default=Path("artifacts/benchmark-20b"), help="of the weights")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--gib", type=float, default=24, help="GPU memory of each engine")
    parser.add_argument("--together", type=int, default=1, help="engines of the other contenders at the same time")
    parser.add_argument("--kv-gib", type=float, help="fixed size of the KV cache (default: what --gib leaves)")
    parser.add_argument("--max-model-len", type=int, default=131072)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--passes", type=int, default=1, help="over all engines that start together, taking turns")
    parser.add_argument("--lora", type=int, metavar="RANK", help="each contender also with LoRA, and adapters of this rank")
    parser.add_argument("--long", action="store_true", help="also one prompt of the full length, with the plugin")
    parser.add_argument("--profile", nargs="*", choices=CONTENDERS, default=[], help="also device time per kernel")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    jobs = [
        Job(
            contender=name,
            directory=args.directory,
            gib=args.gib,
            kv_gib=args.kv_gib,
            max_model_len=args.max_model_len,
            rounds=args.rounds,
            long_prompt=args.long,
            profile=name in args.profile,
            lora_rank=rank,
        )
        for name in args.contenders
        for rank in ([None, args.lora] if args.lora else [None])
    ]
    results = prepare(jobs) | {"contenders": measure_all(grouped(jobs, args.together), args.passes)}
    print(report(results))
    out = Path("metrics/serving.json")
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
