"""An RTX 3090's decode step by arithmetic, as long as nobody here has one.

    python -m benchmarks.rtx3090

Our kernels come from `prediction`, compiled here for the card. Beside them stands an H200, by the same arithmetic: how far
that is off from what was measured there (NOTES.md) says what the prediction is worth. Needs no GPU.
"""

from dataclasses import dataclass

import triton

from benchmarks import cards
from benchmarks.cards import H200, RTX_3090, Card
from benchmarks.prediction import LAUNCH_US, ROUND_TRIPS, predictions
from benchmarks.tables import markdown
from benchmarks.weights import GPT_OSS_20B
from gptoss_nf4.format.dimensions import Dimensions

BATCHES = (1, 8, 32)
PIPE_COLUMNS = ("integer", "product", "tensor", "caches")
KERNEL_COLUMNS = ["batch", "kernel", "MB", "registers", "KiB", "warps", "KiB in flight / needed", "memory us", "latency"]
KERNEL_COLUMNS += ["issue", *PIPE_COLUMNS, "us", "limit"]
OFF = "step, if as far off as an H200"
STEP_COLUMNS = ["batch", "head bits", "our kernels ms", "head", "others", "step", "tokens/s", OFF, "tokens/s"]


@dataclass(frozen=True)
class Others:
    """Microseconds of a step on an H200 in kernels that are not ours, by the profile of `benchmarks.serving`."""

    attention: float
    rest: float
    """Norms, rotary embedding, writing of keys and values, sampling."""


OTHERS = {1: Others(131, 182), 32: Others(266, 240)}
CONTEXT = 256  # tokens, in the middle of the measured run


def others(tokens: int) -> Others:
    """Between the two measured batches in proportion."""
    share = (tokens - 1) / 31
    one, many = OTHERS[1], OTHERS[32]
    return Others(*(a + share * (b - a) for a, b in zip(vars(one).values(), vars(many).values(), strict=True)))


def cache_bytes(tokens: int, d: Dimensions, context: int = CONTEXT, window: int = 128) -> float:
    """Keys and values that a step reads, 16 bits each: half of the layers see `window` tokens only."""
    return tokens * d.layers / 2 * 2 * d.kv_rows * 2 * (context + min(context, window))


def head_bytes(d: Dimensions, bits: int) -> float:
    return d.vocabulary * d.hidden * bits / 8


@dataclass(frozen=True)
class Step:
    """Microseconds of a decode step."""

    ours: float
    head: float
    others: float

    @property
    def us(self) -> float:
        return self.ours + self.head + self.others

    def cells(self, tokens: int) -> list[str]:
        """Milliseconds, and tokens/s."""
        return [f"{self.us / 1e3:.2f}", f"{tokens / self.us * 1e6:.0f}"]


def step(tokens: int, card: Card, head_bits: int = 16, off: dict[str, float] | None = None) -> Step:
    """Kernels that are not ours are as long as on an H200, by the clock, but for the bytes of the cache.

    off: factors for single predictions, as `off_by` gives them.
    """
    d, off = GPT_OSS_20B, off or {}
    ours = sum(each.us * off.get(name, 1.0) for name, each in predictions(tokens, card).items()) * d.layers
    head = LAUNCH_US + head_bytes(d, head_bits) / card.read_gb_s / 1e3
    known, slower = others(tokens), H200.clock_ghz / card.clock_ghz
    cached = cache_bytes(tokens, d) / 1e3
    attention = max(known.attention - cached / H200.read_gb_s, 0) * slower + cached / card.read_gb_s
    return Step(ours, head * off.get("head", 1.0), attention + known.rest * slower)


# ---- against what was measured ----

# An H200 (NOTES.md), us: kernels alone, each as it starts early behind its own kind; w13 and w2 together, of batches from
# the profile of a step. To be measured anew when kernels change. Comparable with machine code of the same Triton alone.
MEASURED_WITH = "3.7.1"  # Triton
MEASURED = {
    1: {"experts": 29.1, "q/k/v": 6.0, "o": 5.9, "router": 2.8, "head": 280},
    8: {"experts": 113, "q/k/v": 6.6, "o": 6.4, "router": 2.9, "top-k and sorting": 2.9},
    32: {"experts": 172, "q/k/v": 12.4, "o": 10.7, "router": 3.6, "top-k and sorting": 3.6, "head": 290},
}
MEASURED_STEPS = {1: 1473, 8: 3552, 32: 5421}  # the device's time for a step, without the head


def compared(tokens: int) -> dict[str, tuple[float, float]]:
    """Predicted and measured on an H200."""
    found = predictions(tokens, H200)
    predicted = {name: each.us for name, each in found.items()} | {"experts": found["w13"].us + found["w2"].us}
    predicted["head"] = LAUNCH_US + head_bytes(GPT_OSS_20B, 16) / H200.read_gb_s / 1e3
    return {name: (predicted[name], measured) for name, measured in MEASURED[tokens].items()}


def comparable() -> bool:
    """Whether kernels compile here to what was measured."""
    return bool(triton.__version__ == MEASURED_WITH)


def off_by(tokens: int) -> dict[str, float]:
    """Measured / predicted on an H200, by the names of `predictions`."""
    factors = {name: measured / predicted for name, (predicted, measured) in compared(tokens).items()}
    return factors | {"w13": factors["experts"], "w2": factors["experts"]}


# ---- tables ----


def kernel_rows(card: Card) -> list[list]:
    rows = []
    for tokens in BATCHES:
        for name, each in predictions(tokens, card).items():
            pipes = [f"{each.parts.get(part, 0):.1f}" for part in ("memory", "latency", "issue", *PIPE_COLUMNS)]
            held = f"{each.held.warps} ({each.held.limit})"
            flight = f"{each.in_flight / 1024:.0f} / {each.needed / 1024:.0f}"
            resources_of = [each.registers, f"{each.shared_bytes / 1024:.0f}", held, flight]
            rows.append([tokens, name, f"{each.mb:.1f}", *resources_of, *pipes, f"{each.us:.1f}", each.limit])
    return rows


def comparison_rows() -> list[list]:
    rows = []
    for tokens in BATCHES:
        for name, (predicted, measured) in compared(tokens).items():
            rows.append([tokens, name, f"{predicted:.1f}", f"{measured:.1f}", f"{measured / predicted:.2f}"])
        if tokens in MEASURED_STEPS:
            reckoned, measured = step(tokens, H200), MEASURED_STEPS[tokens]
            predicted = reckoned.us - reckoned.head
            rows.append([tokens, "step without head", f"{predicted:.0f}", f"{measured:.0f}", f"{measured / predicted:.2f}"])
    return rows


def step_rows(card: Card) -> list[list]:
    rows = []
    for tokens in BATCHES:
        for bits in (16, 12):
            plain = step(tokens, card, bits)
            parts = [f"{each / 1e3:.2f}" for each in (plain.ours, plain.head, plain.others)]
            both = [plain, step(tokens, card, bits, off_by(tokens))] if comparable() else [plain]
            rows.append([tokens, bits, *parts, *(cell for each in both for cell in each.cells(tokens))])
    return rows


def assumption_rows(card: Card) -> list[list]:
    """What no machine code says; sources are in `cards` and above."""
    return [
        ["read bandwidth", f"{card.read_gb_s:.0f} GB/s", f"{cards.READ_SHARE:.0%} of the paper's, as an H100 reads"],
        ["clock", f"{card.clock_ghz} GHz", "the boost clock; cards in a cool case run faster"],
        ["latency of memory under load", f"{card.latency_ns:.0f} ns", "twice an idle A100's or H100's"],
        [
            "latencies of a kernel that nothing hides",
            ROUND_TRIPS,
            "what first loads depend on, first tiles, last loads",
        ],
        ["from kernel to kernel", f"{LAUNCH_US} us", "in a CUDA graph on an H100"],
        ["experts of a batch", "even", "every token chooses evenly and alone"],
        ["context", f"{CONTEXT} tokens", "half of the layers see 128 of them"],
        ["kernels that are not ours", "as on an H200", "measured there, longer by the clock; the cache by its bytes"],
        ["head", "bytes alone", "of 16 bits, or of 12, at the read bandwidth"],
        ["host", "0", "never slower than the kernels"],
    ]


def main() -> None:
    print(markdown(["assumption", RTX_3090.name, "why"], assumption_rows(RTX_3090)))
    print(f"{RTX_3090.name}, kernels of a layer\n\n" + markdown(KERNEL_COLUMNS, kernel_rows(RTX_3090)))
    print(f"{H200.name}, the same\n\n" + markdown(KERNEL_COLUMNS, kernel_rows(H200)))
    if not comparable():
        print(f"Compiled by Triton {triton.__version__}; measured with {MEASURED_WITH}, whose machine code differs.\n")
    print(markdown(["batch", H200.name, "predicted us", "measured us", "measured / predicted"], comparison_rows()))
    print(f"{RTX_3090.name}, a step\n\n" + markdown(STEP_COLUMNS, step_rows(RTX_3090)))


if __name__ == "__main__":
    main()
