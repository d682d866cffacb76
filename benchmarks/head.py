"""The head in 12 bits against dense weights and cuBLAS, at gpt-oss-20b's size: the same bits, and how fast.

    python -m benchmarks.head            less than a minute on one GPU
    python -m benchmarks.head --plans    in addition the plans that suit each number of rows, in bfloat16

Weights are normally distributed, in bfloat16, and the same cast to float16. Either form is larger than any GPU's L2 cache.
Contenders take turns, each a CUDA graph of several launches.
"""

import argparse
import sys
import time
from collections.abc import Callable

import torch
from torch.nn.functional import linear
from triton.runtime.errors import OutOfResources

from benchmarks.graphs import graph_us
from benchmarks.tables import markdown
from benchmarks.values import LEGEND, Values
from benchmarks.weights import GPT_OSS_20B
from gptoss_nf4.vllm.kernels import head_launch
from gptoss_nf4.vllm.kernels.head_launch import Few, Many, Plan
from gptoss_nf4.vllm.kernels.twelve_bits import TwelveBits, pack

VOCABULARY, HIDDEN = GPT_OSS_20B.vocabulary, GPT_OSS_20B.hidden
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
DTYPES = (torch.bfloat16, torch.float16)
DEVICE = torch.device("cuda")
FEW = (Few(8, 2, 2), Few(8, 4, 1), Few(16, 2, 1), Few(16, 2, 2), Few(32, 4, 2), Few(32, 2, 2))
MANY = (
    *(Many(32, 4, 4, 4), Many(32, 4, 8, 3), Many(32, 4, 8, 4)),
    *(Many(64, 4, 4, 4), Many(64, 4, 8, 3), Many(64, 4, 8, 4)),
    *(Many(128, 4, 4, 4), Many(128, 4, 8, 3), Many(128, 4, 8, 4), Many(128, 8, 8, 4)),  # the last gives wrong logits
)
# By the number of rows. None: parts unpacked, and cuBLAS.
PLANS: dict[int, tuple[Plan | None, ...]] = {
    8: FEW[:2],
    16: (*FEW[2:4], *MANY[:3]),
    32: (*FEW[-2:], *MANY[:3]),
    64: MANY[:6],
    128: MANY[3:],
    256: (*MANY[4:], None),
}
SAMPLED = 4096  # rows of the weight that are compared with float64
ROUNDS = 15
LAUNCHES = 4  # of a graph
RARE = 0.003  # share of the weights that are made too small for 12 bits, in the table's last rows


def main() -> None:
    arguments = argparse.ArgumentParser(prog="benchmarks.head")
    arguments.add_argument("--plans", action="store_true", help="measure plans of the kernels, too")
    every_plan = arguments.parse_args().plans
    if not torch.cuda.is_available():
        sys.exit("error: benchmarks.head: no NVIDIA GPU: got none, expected Ampere or newer; run it on such a machine")
    print(torch.cuda.get_device_name(), torch.__version__)
    print(f"Each time: {LEGEND}\n")
    torch.manual_seed(0)
    checks, times, plans = [], [], []
    for dtype in DTYPES:
        weight = (torch.randn(VOCABULARY, HIDDEN, device=DEVICE) * 0.02).bfloat16().to(dtype)
        packed, seconds = packed_in(weight)
        checks += [[str(dtype), *row] for row in check(weight, packed, seconds)]
        times += [[str(dtype), *row] for row in compare(weight, packed, ROWS)]
        if every_plan and dtype == torch.bfloat16:  # float16 reads as much, and decodes with a few more instructions
            plans += compare_plans(packed)
    rare = torch.rand(weight.shape, dtype=dtype, device=DEVICE) < RARE
    weight[rare] *= 2.0**-14
    del rare
    packed, _ = packed_in(weight)
    share = f"{dtype}, {len(packed.places) / weight.numel():.2%} escapes"
    times += [[share, *row] for row in compare(weight, packed, (1, 8, 32))]
    print(markdown(["dtype", "what", "result"], checks))
    print(markdown(["weights", "rows", "12 bits us", "GB/s", "dense us", "GB/s", "dense / 12 bits"], times))
    if plans:
        print(markdown(["rows", "plan", "us", "GB/s"], plans))


def packed_in(weight: torch.Tensor) -> tuple[TwelveBits, float]:
    """The weight packed, and in how many seconds."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    packed = pack(weight)
    torch.cuda.synchronize()
    if isinstance(packed, str):
        sys.exit(f"error: benchmarks.head: random weights were not packed: {packed}")
    return packed, time.perf_counter() - start


def check(weight: torch.Tensor, packed: TwelveBits, seconds: float) -> list[list[str]]:
    """The rows of the table of results."""
    wrong = int((head_launch.dequantize(packed).view(torch.int16) != weight.view(torch.int16)).sum())
    rows = [
        ["size", f"{packed.nbytes / 1e6:.1f} MB, dense {weight.nbytes / 1e6:.1f} MB"],
        ["packed in", f"{seconds:.2f} s"],
        ["escapes", f"{len(packed.places)}, at most {int(packed.starts.diff().max())} in a row tile"],
        ["weights whose bits differ when unpacked", str(wrong)],
    ]
    sampled = torch.randperm(VOCABULARY, device=DEVICE)[:SAMPLED]
    for count in ROWS:
        x = torch.randn(count, HIDDEN, device=DEVICE).to(weight.dtype)
        expected = x.double() @ weight[sampled].double().T
        ours, dense = (relative(out[:, sampled], expected) for out in (head_launch.linear(x, packed), x @ weight.T))
        rows.append([f"error against float64, {count} rows", f"{ours:.2e}, dense {dense:.2e}"])
    most = max(head_launch.VARIANTS)
    columns = torch.linspace(0, HIDDEN - 1, most, device=DEVICE).long()  # one 1 a row: the product is the weight itself
    x = torch.zeros(most, HIDDEN, dtype=weight.dtype, device=DEVICE)
    x[torch.arange(most, device=DEVICE), columns] = 1
    for count in head_launch.VARIANTS:
        wrong = int((head_launch.linear(x[:count].contiguous(), packed) != weight[:, columns[:count]].T).sum())
        rows.append([f"logits of unit vectors that differ from the weight, {count} rows", str(wrong)])
    return rows


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result.double() - expected).norm() / expected.norm())


def compare(weight: torch.Tensor, packed: TwelveBits, counts: tuple[int, ...]) -> list[list[str]]:
    """Times of both forms for each number of rows of activations."""
    rows = []
    for count in counts:
        x = torch.randn(count, HIDDEN, device=DEVICE).to(weight.dtype)
        calls: list[Callable] = [lambda x=x: head_launch.linear(x, packed), lambda x=x: linear(x, weight)]
        ours, dense = in_turn(calls)
        rates = [packed.nbytes / ours.median / 1e3, weight.nbytes / dense.median / 1e3]
        ratio = dense.median / ours.median
        rows.append([str(count), ours.text(0), f"{rates[0]:.0f}", dense.text(0), f"{rates[1]:.0f}", f"{ratio:.2f}"])
    return rows


def compare_plans(packed: TwelveBits) -> list[list[str]]:
    """Times of `PLANS`; one that does not fit the GPU says why instead."""
    rows = []
    for count, plans in PLANS.items():
        x = torch.randn(count, HIDDEN, device=DEVICE).to(packed.dtype)
        calls: dict[Plan | None, Callable[[], object]] = {}
        for plan in plans:
            call = planned(x, packed, plan)
            try:
                call()
            except OutOfResources as error:
                rows.append([str(count), name(plan), str(error), ""])
            else:
                calls[plan] = call
        for plan, times in zip(calls, in_turn(list(calls.values())), strict=True):
            rows.append([str(count), name(plan), times.text(0), f"{packed.nbytes / times.median / 1e3:.0f}"])
    return rows


def name(plan: Plan | None) -> str:
    if plan is None:
        return "parts unpacked, cuBLAS"
    ahead = f", {plan.stages} stages" if isinstance(plan, Many) else ""
    return f"{type(plan).__name__.lower()}: {plan.rows} rows, {plan.warps} warps, {plan.tiles} tiles{ahead}"


def planned(x: torch.Tensor, packed: TwelveBits, plan: Plan | None) -> Callable[[], object]:
    if plan is None:
        out = torch.empty(len(x), packed.rows, dtype=x.dtype, device=x.device)
        return lambda: head_launch.linear_in_parts(x, packed, out)
    return lambda: head_launch.linear(x, packed, plan=plan)


def in_turn(calls: list[Callable]) -> list[Values]:
    """Microseconds of each call."""
    return graph_us([[call] * LAUNCHES for call in calls], ROUNDS)


if __name__ == "__main__":
    main()
