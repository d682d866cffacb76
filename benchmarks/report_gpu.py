"""What this GPU does with the plugin's kernels, as Markdown that fits into an issue.

    python -m benchmarks.report_gpu

Takes a few minutes and about 10 GiB of the GPU's memory. Beside each time stands what `prediction` reckons for this GPU
from the machine code, at the bandwidth that was measured and the clock under load.
"""

import platform
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks import kernels
from benchmarks.bandwidth import copy_bandwidth, read_bandwidth
from benchmarks.cards import CARDS, H200, Card
from benchmarks.graphs import graph_us
from benchmarks.prediction import predictions
from benchmarks.rtx3090 import BATCHES, OFF, comparable, head_bytes, off_by, step
from benchmarks.tables import markdown
from benchmarks.values import LEGEND
from benchmarks.weights import GPT_OSS_20B, ROOT
from gptoss_nf4.vllm.kernels.plan import gpu_of

ERROR_BATCHES = (1, 8, 64)
PACKAGES = ("torch", "triton", "vllm", "bitsandbytes", "gptoss-nf4")
# As nvidia-smi names them, and a table of ours.
ASKED = {
    "driver_version": "driver",
    "clocks.sm": "clock under load",
    "clocks.max.sm": "highest clock",
    "clocks.mem": "memory clock",
    "power.draw": "power under load",
    "power.limit": "power limit",
    "temperature.gpu": "temperature, C",
    "ecc.mode.current": "ECC",
    "memory.total": "memory",
    "memory.used": "memory in use",
}


def main() -> None:
    if refused := reason_to_refuse():
        sys.exit(refused)
    copy, read = copy_bandwidth(), read_bandwidth()
    asked = asked_under_load()
    card = this_card(read, asked)
    print("\n".join(lines(copy, read, asked, card)))


def reason_to_refuse() -> str | None:
    """One line for a machine on which nothing can be measured."""
    where = "error: benchmarks.report_gpu"
    if not torch.cuda.is_available():
        return f"{where}: no NVIDIA GPU: got none, expected Ampere or newer; run it on such a machine"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        name = torch.cuda.get_device_name()
        return f"{where}: {name}: got compute capability {major}.{minor}, expected 8.0 or more; run it on Ampere or newer"
    free, _ = torch.cuda.mem_get_info()
    if free < 10 << 30:
        return (
            f"{where}: GPU memory: got {free / (1 << 30):.1f} GiB free, expected 10; end what else uses the GPU "
            "(nvidia-smi lists it)"
        )
    return None


def lines(copy: float, read: float, asked: dict[str, str], card: Card | None) -> list[str]:
    """The report; measures what it reports."""
    predicted = "" if card else " No predictions: the pipes of this compute capability are not in `benchmarks.cards`."
    return [
        f"### {torch.cuda.get_device_name()}: kernels of gptoss-nf4",
        "",
        *facts(asked),
        "",
        f"Copies {copy * 1e3:.0f} GB/s (read and written), reads {read * 1e3:.0f} GB/s. Times are {LEGEND}.{predicted}",
        "",
        *table([*kernels.EXPERT_COLUMNS, "predicted w13 us", "w2 us"], experts(copy, read, card)),
        *table([*kernels.LINEAR_COLUMNS, "predicted us"], linears(card)),
        *head(read),
        "",
        *steps(card),
        *table(kernels.ERROR_COLUMNS, kernels.errors(batches=ERROR_BATCHES)),
    ]


def table(columns: list[str], rows: list[list]) -> list[str]:
    return [*markdown(columns, rows).splitlines(), ""]


# ---- the machine ----


def facts(asked: dict[str, str]) -> list[str]:
    """A line with versions, one with the GPU, one with what nvidia-smi says."""
    properties = torch.cuda.get_device_properties(0)
    versions = [f"{name} {installed(name)}" for name in PACKAGES]
    gpu = [
        f"sm_{properties.major}{properties.minor}",
        f"{properties.multi_processor_count} multiprocessors",
        f"{properties.shared_memory_per_multiprocessor >> 10} KiB of shared memory",
        f"L2 {properties.L2_cache_size / (1 << 20):.0f} MiB",
        f"kernels decode by {'a shared table' if gpu_of(torch.device('cuda')).holds_tables else 'permutes'}",
    ]
    said = [f"{name} {value}" for name, value in asked.items()] or ["nvidia-smi: not found"]
    system = [
        f"commit {commit()}",
        f"Python {platform.python_version()}",
        f"CUDA {torch.version.cuda}",
        platform.platform(),
    ]
    return [f"- {', '.join(versions)}", f"- {', '.join(system)}", f"- {', '.join(gpu)}", f"- {', '.join(said)}"]


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """Of this clone, "+" if files are changed."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return "unknown"
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--exclude=*"], cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"


def asked_under_load() -> dict[str, str]:
    """What nvidia-smi says while the GPU copies; empty without nvidia-smi. Keys are those of our table."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return {}
    source = torch.zeros(1 << 28, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    query = [smi, f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader", f"--id={gpu_id()}"]
    with subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as asking:
        while asking.poll() is None:
            for _ in range(10):
                target.copy_(source)
            torch.cuda.synchronize()
        return parsed(asking.stdout.read() if asking.stdout else "")


def gpu_id() -> str:
    """Of the GPU in use, as nvidia-smi takes it: CUDA may show only some of them."""
    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None)  # torch 2.5 and newer
    return "0" if uuid is None else f"GPU-{uuid}"


def parsed(said: str) -> dict[str, str]:
    """nvidia-smi's line of values by our names, without those it does not know."""
    values = [value.strip() for value in said.strip().split(",")]
    if len(values) != len(ASKED):
        return {}
    return {name: value for name, value in zip(ASKED.values(), values, strict=True) if not value.startswith("[")}


def this_card(read: float, asked: dict[str, str]) -> Card | None:
    """This GPU as `prediction` takes it; None for a compute capability that it does not know. read: TB/s."""
    properties = torch.cuda.get_device_properties(0)
    like = CARDS.get(10 * properties.major + properties.minor)
    if like is None:
        return None
    mhz = asked.get("clock under load", "").removesuffix(" MHz")
    return replace(
        like,
        name=torch.cuda.get_device_name(),
        multiprocessors=properties.multi_processor_count,
        clock_ghz=float(mhz) / 1e3 if mhz.replace(".", "", 1).isdigit() else like.clock_ghz,
        read_gb_s=read * 1e3,
        shared_bytes=properties.shared_memory_per_multiprocessor,
        l2_bytes=properties.L2_cache_size,
    )


# ---- measured beside predicted ----


def experts(copy: float, read: float, card: Card | None) -> list[list]:
    rows = kernels.expert_times(copy, read, BATCHES)
    if card is None:
        return rows
    return [[*row, *(f"{predictions(row[0], card)[name].us:.1f}" for name in ("w13", "w2"))] for row in rows]


def linears(card: Card | None) -> list[list]:
    rows = kernels.linear_times(BATCHES)
    if card is None:
        return rows
    names = {"qkv": "q/k/v", "o": "o"}
    return [[*row, f"{predictions(row[0], card)[names[row[1]]].us:.1f}"] for row in rows]


def head(read: float) -> list[str]:
    """The dense head, one row of activations: what cuBLAS makes of the largest weight."""
    weight = torch.randn(GPT_OSS_20B.vocabulary, GPT_OSS_20B.hidden, dtype=kernels.DTYPE, device="cuda")
    x = torch.randn(1, GPT_OSS_20B.hidden, dtype=kernels.DTYPE, device="cuda")
    (times,) = graph_us([[lambda: torch.nn.functional.linear(x, weight)] * 2])
    rate = head_bytes(GPT_OSS_20B, 16) / times.median / 1e3
    return [f"Head, dense, 16 bits, 1 row: {times.text(0)} us, {rate:.0f} GB/s, {rate / read / 1e3:.0%} of the read rate."]


def steps(card: Card | None) -> list[str]:
    """Predicted tokens/s of a whole step: as reckoned, and if all kernels are as far off as they are on an H200."""
    if card is None:
        return []
    columns = ["batch", "head bits", "predicted step ms", "tokens/s", f"{OFF}, ms", "tokens/s"]
    rows = []
    for tokens in BATCHES:
        factors = off_by(tokens) if comparable() and card.capability != H200.capability else None
        for bits in (16, 12):
            found = [step(tokens, card, bits), *([step(tokens, card, bits, factors)] if factors else [])]
            rows.append([tokens, bits, *(cell for each in found for cell in each.cells(tokens))])
    return table(columns, rows)


if __name__ == "__main__":
    main()
