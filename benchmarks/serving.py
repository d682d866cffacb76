"""Serving full-size gpt-oss-20b: this plugin, the stock MXFP4 checkpoint with each expert backend, and dequantizing
every expert on every forward, all in one run on one GPU.

    python -m benchmarks.serving                    # weights are made in --directory (27 GB) and kept there
    python -m benchmarks.serving --together 3       # start so many of the others at once on a large GPU

Every contender runs in a process of its own, capped at --gib of GPU memory, with CUDA graphs, and is measured while the
others wait. Starting is most of the time. Engines that start together cannot tell whose memory grows, so they get a KV
cache of fixed size instead of the rest of --gib; the plugin's engine starts alone unless --kv-gib fixes its cache too.
Results go to metrics/serving.json, logs beside the weights.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.tables import markdown

CONTENDERS = {
    # name: (checkpoint, vLLM arguments, dequantize every expert)
    "nf4": ("nf4", {}, False),
    "mxfp4-marlin": ("mxfp4", {"moe_backend": "marlin"}, False),
    "mxfp4-triton": ("mxfp4", {"moe_backend": "triton"}, False),
    "nf4-dequantize-all": ("nf4", {}, True),
}
OURS = "nf4"
STOCK = ("mxfp4-marlin", "mxfp4-triton")
BATCHES = (1, 8, 32)
PREFILLS = (2048, 8192)
GRAPH_SIZES = [1, 2, 4, 8, 16, 32]
KV_GIB = 5  # one request of the full length needs 3.1
ROUTED_TOKENS = 256  # beyond the sizes of the CUDA graphs, so that the router can be watched


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("artifacts/benchmark-20b"), help="of the weights")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--gib", type=float, default=24, help="GPU memory of each engine")
    parser.add_argument("--together", type=int, default=1, help="engines of the other contenders at the same time")
    parser.add_argument("--kv-gib", type=float, help="fixed size of the KV cache (default: what --gib leaves)")
    parser.add_argument("--max-model-len", type=int, default=131072)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--long", action="store_true", help="also one prompt of the full length, with the plugin")
    parser.add_argument("--profile", nargs="*", choices=CONTENDERS, default=[], help="also device time per kernel")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.contender:
        run_contender(args)
        return
    results = run_all(args)
    report(results)
    out = Path("metrics/serving.json")
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(results, indent=2) + "\n")


# The parent: makes the weights, starts the contenders, lets one at a time measure.


def run_all(args: argparse.Namespace) -> dict:
    import torch

    from benchmarks import weights

    if not torch.cuda.is_available():
        sys.exit("error: benchmarks.serving: no NVIDIA GPU: got none, expected one with 24 GB; run it on such a machine")
    for kind in sorted({CONTENDERS[name][0] for name in args.contenders}):
        started = time.monotonic()
        weights.ensure(args.directory, kind, weights.GPT_OSS_20B, "cuda")
        print(f"weights {kind}: {time.monotonic() - started:.0f} s", flush=True)
    torch.cuda.empty_cache()
    read = read_rate(args.directory / CONTENDERS[args.contenders[0]][0])
    print(f"reading the files: {read:.1f} GB/s", flush=True)
    results = {"gpu": torch.cuda.get_device_name(), "read_gb_per_second": read, "contenders": {}}
    others = [name for name in args.contenders if name != OURS]
    groups = [[OURS]] * (OURS in args.contenders)
    if args.kv_gib:  # nothing to measure while starting: the plugin's engine too may start with others
        groups, others = [], args.contenders
    groups += [others[i : i + args.together] for i in range(0, len(others), args.together)]
    for group in groups:
        kv_gib = args.kv_gib if len(group) == 1 else args.kv_gib or KV_GIB
        children = {name: start_child(name, args, kv_gib) for name in group}
        ready = {name for name in group if wait_for(children[name], "READY")}  # all of them: nobody starts while one runs
        for name in group:
            result = None
            if name in ready:
                children[name].stdin.write("GO\n")
                children[name].stdin.flush()
                result = wait_for(children[name], "RESULT ")
            if result:
                results["contenders"][name] = json.loads(result)
            print(f"{name}: {result or f'failed, see {log_of(name, args)}'}", flush=True)
        for child in children.values():
            child.stdin.close()
            child.wait()
    return results


def read_rate(directory: Path) -> float:
    """GB/s of reading a checkpoint's files once, as they are cached now: what loading is measured against."""
    buffer, total, started = bytearray(1 << 24), 0, time.perf_counter()
    for file in sorted(directory.glob("*.safetensors")):
        with file.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                total += count
    return total / (time.perf_counter() - started) / 1e9


def log_of(name: str, args: argparse.Namespace) -> Path:
    return args.directory / f"{name}.log"


def start_child(name: str, args: argparse.Namespace, kv_gib: float | None) -> subprocess.Popen:
    command = [sys.executable, "-m", "benchmarks.serving", "--contender", name]
    for option in ("directory", "gib", "rounds", "max_model_len"):
        command += ["--" + option.replace("_", "-"), str(getattr(args, option))]
    command += ["--kv-gib", str(kv_gib)] if kv_gib else []
    command += ["--long"] * args.long + ["--profile", name] * (name in args.profile)
    # In-process engine: the router can be watched, and a contender can exchange the plugin's method.
    env = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "INFO"}
    with log_of(name, args).open("w") as log:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=env)


def wait_for(child: subprocess.Popen, start: str) -> str | None:
    for line in child.stdout:
        if line.startswith(start):
            return line[len(start) :] or start
    return None


# A contender.


def run_contender(args: argparse.Namespace) -> None:
    say = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM logs to stdout, which is our channel: let it write to the log instead
    checkpoint, engine_args, dequantize_all = CONTENDERS[args.contender]
    if dequantize_all:
        from gptoss_nf4.vllm.moe import Nf4MoEMethod

        Nf4MoEMethod.packs = lambda self, params_dtype: False
    import torch
    from vllm import LLM

    total = torch.cuda.get_device_properties(0).total_memory
    started = time.monotonic()
    llm = LLM(
        str(args.directory / checkpoint),
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=args.max_model_len,
        max_num_seqs=64,
        max_num_batched_tokens=8192,
        gpu_memory_utilization=args.gib * 2**30 / total,
        attention_config={"backend": "TRITON_ATTN"},
        enable_prefix_caching=False,
        disable_log_stats=False,
        compilation_config={"cudagraph_capture_sizes": GRAPH_SIZES},
        kv_cache_memory_bytes=int(args.kv_gib * 2**30) if args.kv_gib else None,
        **engine_args,
    )
    result = {"ready_seconds": time.monotonic() - started}
    result |= read_log(log_of(args.contender, args), args.directory / checkpoint)
    print("READY", file=say, flush=True)
    if sys.stdin.readline() != "GO\n":
        return
    print("RESULT " + json.dumps(result | measure(llm, args)), file=say, flush=True)
    sys.stdin.readline()


def measure(llm, args: argparse.Namespace) -> dict:
    from gptoss_nf4.engine.measure import generate_seconds, measure_batch, measure_prefill, random_prompts

    vocabulary = llm.model_config.get_vocab_size()
    result = {
        "batches": [measure_batch(llm, batch, 128, 257, args.rounds, vocabulary) for batch in BATCHES],
        "prefill_ms": {tokens: measure_prefill(llm, tokens, args.rounds, vocabulary) for tokens in PREFILLS},
    }
    if args.long and args.contender == OURS:
        prompt = random_prompts(1, args.max_model_len - 16, vocabulary)
        result["full_length_prompt_seconds"] = generate_seconds(llm, prompt, 16)
    if args.profile:
        result["kernels_us_per_step"] = {batch: profile(llm, batch, vocabulary) for batch in (1, 32)}
    result["distinct_experts"] = distinct_experts(llm, vocabulary)
    return result


def read_log(log: Path, checkpoint: Path) -> dict:
    """What vLLM says of loading and of the KV cache."""
    text = log.read_text()
    load = re.search(r"Loading weights took ([\d.]+) seconds", text)
    tokens = re.search(r"GPU KV cache size: ([\d,]+) tokens", text)
    concurrency = re.search(r"Maximum concurrency for [\d,]+ tokens per request: ([\d.]+)x", text)
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    return {
        "load_seconds": load and float(load[1]),
        "load_gb_per_second": load and size / float(load[1]) / 1e9,
        "kv_cache_tokens": tokens and int(tokens[1].replace(",", "")),
        "full_length_requests": concurrency and float(concurrency[1]),
    }


def distinct_experts(llm, vocabulary: int) -> dict | None:
    """Mean distinct experts a layer for batches of each size, from the router's choices on random tokens.

    None where the backend routes within its own kernel: it sees the same router and the same kind of tokens.
    """
    from gptoss_nf4.engine.measure import generate_seconds, random_prompts

    chosen = []

    def watch(model) -> bool:
        routers = [getattr(module, "router", None) for module in model.modules() if type(module).__name__ == "MoERunner"]
        if not routers or any(r is None or not hasattr(r, "set_capture_fn") for r in routers):
            return False
        for router in routers:
            router.set_capture_fn(lambda ids: chosen.append(ids.detach().cpu()))
        return True

    if not all(llm.apply_model(watch)):
        return None
    generate_seconds(llm, random_prompts(1, ROUTED_TOKENS, vocabulary), 1)
    layers = [ids for ids in chosen if len(ids) >= ROUTED_TOKENS]
    if not layers:
        return None
    groups = {batch: [ids[i : i + batch] for ids in layers for i in range(0, ROUTED_TOKENS, batch)] for batch in BATCHES}
    return {batch: sum(len(group.unique()) for group in each) / len(each) for batch, each in groups.items()}


def profile(llm, batch: int, vocabulary: int, steps: int = 32) -> dict[str, float]:
    """Device microseconds per decode step by kernel, the largest 25; prefill's kernels are taken off."""
    from torch.profiler import ProfilerActivity, profile

    from gptoss_nf4.engine.measure import generate_seconds, random_prompts

    def times(output_tokens: int) -> dict[str, float]:
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            generate_seconds(llm, random_prompts(batch, 128, vocabulary), output_tokens)
        return {event.key: event.self_device_time_total for event in trace.key_averages()}

    first, whole = times(1), times(1 + steps)
    per_step = {name: (time - first.get(name, 0)) / steps for name, time in whole.items()}
    largest = sorted(per_step.items(), key=lambda item: -item[1])[:25]
    return {"all": sum(per_step.values())} | dict(largest)


# Tables.


def report(results: dict) -> None:
    contenders = results["contenders"]
    print(f"\n{results['gpu']}; reading the files: {results['read_gb_per_second']:.1f} GB/s\n")
    columns = [
        "",
        *(f"batch {b} tok/s" for b in BATCHES),
        *(f"prefill {p} ms" for p in PREFILLS),
        "KV tokens",
        "load GB/s",
        "ready s",
    ]
    rows = []
    for name, r in contenders.items():
        rates = [f"{b['output_tokens_per_second']:.0f}" for b in r["batches"]]
        prefills = [f"{r['prefill_ms'][str(p)]:.1f}" for p in PREFILLS]
        load = r["load_gb_per_second"]
        rows.append([name, *rates, *prefills, r["kv_cache_tokens"], load and f"{load:.1f}", f"{r['ready_seconds']:.0f}"])
    print(markdown(columns, rows))
    if OURS in contenders:
        ours = contenders[OURS]
        columns = ["plugin against", *(f"batch {b}" for b in BATCHES), *(f"prefill {p}" for p in PREFILLS)]
        rows = []
        for name, r in contenders.items():
            pairs = zip(ours["batches"], r["batches"], strict=True)
            rates = [f"{a['output_tokens_per_second'] / b['output_tokens_per_second']:.2f}x" for a, b in pairs]
            prefills = [f"{r['prefill_ms'][str(p)] / ours['prefill_ms'][str(p)]:.2f}x" for p in PREFILLS]
            rows.append([name, *rates, *prefills])
        print(markdown(columns, rows))
    rows = [[name, *(f"{v:.1f}" for v in (r["distinct_experts"] or {}).values())] for name, r in contenders.items()]
    print(markdown(["distinct experts a layer", *(f"batch {b}" for b in BATCHES)], rows))
    for name, r in contenders.items():
        if "full_length_prompt_seconds" in r:
            print(
                f"{name}: a prompt of full length: {r['full_length_prompt_seconds']:.1f} s; "
                f"{r['full_length_requests']} of full length fit"
            )
        for batch, kernels in r.get("kernels_us_per_step", {}).items():
            print(f"\n{name}, batch {batch}: device time per decode step")
            print(markdown(["kernel", "us"], [[key[:90], f"{us:.0f}"] for key, us in kernels.items()]))


if __name__ == "__main__":
    main()
