"""Results as tables. A row is a cell, a column a contender."""

from collections.abc import Callable

from benchmarks.serving.cells import DECODE, PREFILL
from benchmarks.serving.compare import LORA, bandwidth_share, best_other, device, is_plugin, wall
from benchmarks.serving.jobs import CONTENDERS
from benchmarks.tables import markdown
from benchmarks.values import LEGEND, WIDE

Contenders = dict[str, dict]


def report(results: dict) -> str:
    """All tables. `results` is what metrics/serving.json holds: keys of its objects are text."""
    contenders: Contenders = results["contenders"]
    parts = [heading(results), setups(contenders, results["files_gb_per_second"])]
    for lora in (False, True):
        chosen = {name: result for name, result in contenders.items() if name.endswith(LORA) == lora and result["cells"]}
        for kind in (DECODE, PREFILL):
            names = [name for name in cell_names(chosen) if name.startswith(kind)]
            if names:
                parts += [cells_by_wall(chosen, names, kind), cells_on_device(chosen, names)]
    parts += [routing(contenders), experts(contenders, results["read_tb_per_second"]), *remarks(contenders)]
    return "\n".join(part for part in parts if part)


def heading(results: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    rates = ", ".join(f"{kind} {rate:.1f} GB/s" for kind, rate in results["files_gb_per_second"].items())
    together = [result["together"] for result in results["contenders"].values()]
    turns = "All took turns, cell by cell." if min(together) == len(together) else "Only those up together took turns."
    return (
        f"\n{results['gpu']}, {versions}; memory reads at {results['read_tb_per_second']:.2f} TB/s; "
        f"reading the files: {rates}\n{results['settings']}\nEach value: {LEGEND}. {turns}\n"
    )


def cell_names(contenders: Contenders) -> list[str]:
    """Of all cells that any of them measured, in order."""
    return list(dict.fromkeys(name for result in contenders.values() for name in result["cells"]))


def cells_by_wall(contenders: Contenders, names: list[str], kind: str) -> str:
    """Tokens per second of decoding, or milliseconds to the first token; and how many times as fast the plugin is."""

    def text(result: dict, cell: str) -> str | None:
        values = wall(result, cell)
        if values is None:
            return None
        return values.rates(1e3 * batch_of(cell)).text(0) if kind == DECODE else values.text(1)

    def median(result: dict, cell: str) -> float | None:
        values = wall(result, cell)
        return None if values is None else values.median

    return compared("tokens/s" if kind == DECODE else "ms to the first token", contenders, names, text, median)


def cells_on_device(contenders: Contenders, names: list[str]) -> str:
    """Milliseconds that the device is busy, for a decode step or a prefill."""

    def text(result: dict, cell: str) -> str | None:
        time = device(result, cell)
        return None if time is None else f"{time:.2f}"

    return compared("device ms", contenders, names, text, device)


def compared(
    title: str,
    contenders: Contenders,
    cells: list[str],
    text: Callable[[dict, str], str | None],
    time: Callable[[dict, str], float | None],
) -> str:
    """A column for each contender, of `text`, and one for each plugin's ratio to the best other, of `time`."""
    plugins = [name for name in contenders if is_plugin(name)]
    rows = []
    for cell in cells:
        times = {name: time(result, cell) for name, result in contenders.items()}
        best = best_other(times)
        ratios = [ratio(times[name], best) for name in plugins]
        rows.append([cell, *(text(result, cell) for result in contenders.values()), *ratios])
    return markdown([title, *contenders, *(f"{name} / best other" for name in plugins)], rows)


def ratio(ours: float | None, best: tuple[str, float] | None) -> str | None:
    """How many times as fast as the best other, whose name follows."""
    return None if ours is None or best is None else f"{best[1] / ours:.2f} ({best[0]})"


def batch_of(cell: str) -> int:
    """Of a decode cell's name."""
    return int(cell.removeprefix(DECODE).split("x")[0])


def setups(contenders: Contenders, files_gb_per_second: dict[str, float]) -> str:
    """What each contender is, how it loads, and what memory it takes."""
    rows = []
    for name, result in contenders.items():
        contender = CONTENDERS[name.removesuffix(LORA)]
        load, read = result.get("load_gb_per_second"), files_gb_per_second[contender.weights]
        rows.append(
            [
                name,
                contender.configuration,
                load and f"{load:.1f}",
                load and f"{load / read:.0%}",
                number(result, "prepared_gb_per_second", 1),
                number(result, "ready_seconds", 0),
                number(result, "model_gib", 2),
                number(result, "peak_gib", 1),
                result.get("kv_cache_tokens"),
                len(result["compiled_after_ready"]) if "compiled_after_ready" in result else None,
                result["together"],
            ]
        )
    columns = [
        "contender",
        "configuration",
        "load GB/s",
        "of reading",
        "and prepare GB/s",
        "ready s",
        "model GiB",
        "peak GiB",
        "KV tokens",
        "compiled after ready",
        "up together",
    ]
    return markdown(columns, rows)


def number(result: dict, key: str, digits: int) -> str | None:
    value = result.get(key)
    return None if value is None else f"{value:.{digits}f}"


def routing(contenders: Contenders) -> str:
    found = {name: result["distinct_experts"] for name, result in contenders.items() if result.get("distinct_experts")}
    batches = list(dict.fromkeys(batch for each in found.values() for batch in each))
    rows = [[name, *(f"{each[batch]:.1f}" if batch in each else None for batch in batches)] for name, each in found.items()]
    return markdown(["distinct experts a layer", *(f"batch {batch}" for batch in batches)], rows) if rows else ""


def experts(contenders: Contenders, read_tb_per_second: float) -> str:
    rows = []
    for name, result in contenders.items():
        found = bandwidth_share(result, read_tb_per_second) if is_plugin(name) else None
        if found:
            rows.append([name, f"{found['bytes'] / 1e6:.0f}", f"{found['us']:.0f}", f"{found['share']:.0%}"])
    columns = ["expert kernels at one token", "MB, all layers", "us, all layers", "of the read bandwidth"]
    return markdown(columns, rows) if rows else ""


def remarks(contenders: Contenders) -> list[str]:
    """A line for each thing that a reader has to know of single results."""
    lines = []
    for name, result in contenders.items():
        wide = [cell for cell in result["cells"] if (values := wall(result, cell)) is not None and values.wide]
        if wide:
            lines.append(f"{name}: spread above {WIDE:.0%}: {', '.join(wide)}")
        if result.get("compiled_after_ready"):
            lines.append(f"{name}: compiled after it was ready: {', '.join(sorted(set(result['compiled_after_ready'])))}")
        if "full_length_requests" in result and result["full_length_requests"] is not None and result["together"] == 1:
            lines.append(f"{name}: {result['full_length_requests']} requests of the full length fit")
        if "failed" in result:
            lines.append(f"{name}: failed: {result['failed']}")
    return lines


def kernels(contenders: Contenders, names: list[str]) -> str:
    """Device time by kernel, of the contenders called `names`."""
    parts = []
    for name in names:
        for cell, found in contenders.get(name, {"cells": {}})["cells"].items():
            if "kernels_us" in found:
                parts.append(f"\n{name}, {cell}: device time of a step")
                parts.append(
                    markdown(["kernel", "us"], [[each[:90], f"{us:.0f}"] for each, us in found["kernels_us"].items()])
                )
    return "\n".join(parts)
