"""Results as tables."""

from benchmarks.serving.jobs import ADAPTERS, BATCHES, OURS, PREFILLS
from benchmarks.tables import markdown

BATCH_COLUMNS = [f"batch {batch}" for batch in BATCHES]


def report(results: dict) -> str:
    """All tables. `results` is what metrics/serving.json holds: keys of its objects are text."""
    contenders = results["contenders"]
    parts = [
        f"\n{results['gpu']}; reading the files: {results['read_gb_per_second']:.1f} GB/s\n",
        speed(contenders),
        *([against_the_plugin(contenders)] if OURS in contenders else []),
        routing(contenders),
        *([adapters(contenders)] if any("adapters" in result for result in contenders.values()) else []),
    ]
    for name, result in contenders.items():
        if "full_length_prompt_seconds" in result:
            parts.append(
                f"{name}: a prompt of full length: {result['full_length_prompt_seconds']:.1f} s; "
                f"{result['full_length_requests']} of full length fit"
            )
        for batch, kernels in result.get("kernels_us_per_step", {}).items():
            parts.append(f"\n{name}, batch {batch}: device time per decode step")
            parts.append(markdown(["kernel", "us"], [[kernel[:90], f"{us:.0f}"] for kernel, us in kernels.items()]))
    return "\n".join(parts)


def rates(result: dict) -> list[float]:
    """Output tokens per second, for each of BATCHES."""
    return [each["output_tokens_per_second"] for each in result["batches"]]


def prefills(result: dict) -> list[float]:
    """Milliseconds to the first token, for each of PREFILLS."""
    return [result["prefill_ms"][str(tokens)] for tokens in PREFILLS]


def speed(contenders: dict[str, dict]) -> str:
    columns = ["", *(f"{batch} tok/s" for batch in BATCH_COLUMNS), *(f"prefill {tokens} ms" for tokens in PREFILLS)]
    rows = [
        [
            name,
            *(f"{rate:.0f}" for rate in rates(result)),
            *(f"{ms:.1f}" for ms in prefills(result)),
            result["kv_cache_tokens"],
            result["load_gb_per_second"] and f"{result['load_gb_per_second']:.1f}",
            f"{result['ready_seconds']:.0f}",
        ]
        for name, result in contenders.items()
    ]
    return markdown([*columns, "KV tokens", "load GB/s", "ready s"], rows)


def against_the_plugin(contenders: dict[str, dict]) -> str:
    """How many times as fast the plugin is."""
    ours = contenders[OURS]
    columns = ["plugin against", *BATCH_COLUMNS, *(f"prefill {tokens}" for tokens in PREFILLS)]
    rows = [
        [
            name,
            *(f"{our / their:.2f}x" for our, their in zip(rates(ours), rates(result), strict=True)),
            *(f"{their / our:.2f}x" for our, their in zip(prefills(ours), prefills(result), strict=True)),
        ]
        for name, result in contenders.items()
    ]
    return markdown(columns, rows)


def adapters(contenders: dict[str, dict]) -> str:
    """Output tokens per second of requests on adapters; those on the base are in the first table."""
    columns = [
        "requests on adapters",
        *(f"{batch} tok/s" for batch in BATCH_COLUMNS),
        f"{BATCH_COLUMNS[-1]} over {ADAPTERS}",
    ]
    found = {name: result["adapters"] for name, result in contenders.items() if "adapters" in result}
    rows = [
        [name, *(f"{rate:.0f}" for rate in each["one_adapter"]), f"{each['spread']:.0f}"] for name, each in found.items()
    ]
    return markdown(columns, rows)


def routing(contenders: dict[str, dict]) -> str:
    rows = [[name, *(f"{n:.1f}" for n in (r["distinct_experts"] or {}).values())] for name, r in contenders.items()]
    return markdown(["distinct experts a layer", *BATCH_COLUMNS], rows)
