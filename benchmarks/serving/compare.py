"""What the results say: values of a cell, ratios to the best other contender, share of the memory's bandwidth."""

from benchmarks.serving.cells import DECODE
from benchmarks.serving.jobs import CONTENDERS
from benchmarks.values import Values

LORA = "-lora"
EXPERT_KERNELS = ("swiglu_experts", "down_experts")  # of the plugin, by the functions' names
ONE_TOKEN = f"{DECODE} 1x"


def is_plugin(name: str) -> bool:
    """Whether a result, by its name, is the plugin's own."""
    return CONTENDERS[name.removesuffix(LORA)].plugin


def wall(result: dict, cell: str) -> Values | None:
    """Milliseconds of a decode step or of a prefill by the wall clock; None where it was not measured."""
    values = result["cells"].get(cell, {}).get("ms")
    return Values(tuple(values)) if values else None


def device(result: dict, cell: str) -> float | None:
    """Milliseconds of the device for the same."""
    return result["cells"].get(cell, {}).get("device_ms")


def best_other(times: dict[str, float | None]) -> tuple[str, float] | None:
    """Name and time of the fastest contender that is not the plugin, of times by name; None if there is none."""
    others = [(time, name) for name, time in times.items() if time is not None and not is_plugin(name)]
    if not others:
        return None
    time, name = min(others)
    return name, time


def bandwidth_share(result: dict, read_tb_per_second: float) -> dict[str, float] | None:
    """Of the expert kernels at one token: `us` of all layers, `bytes`, and `share` of the bandwidth of reading.

    None where the profile has none of them.
    """
    cells = [cell for name, cell in result["cells"].items() if name.startswith(ONE_TOKEN) and "adapter" not in name]
    cell: dict = cells[0] if cells else {}
    us = sum(time for name, time in cell.get("kernels_us", {}).items() if name.startswith(EXPERT_KERNELS))
    if not us or "expert_bytes" not in result:
        return None
    return {"us": us, "bytes": result["expert_bytes"], "share": result["expert_bytes"] / us / 1e6 / read_tb_per_second}
