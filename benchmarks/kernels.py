"""The plugin's kernels alone, at gpt-oss-20b's dimensions: time, share of the measured bandwidth, error.

    python -m benchmarks.kernels

Weights are random codes, three copies in turn, together larger than any GPU's L2 cache. Times are of replays of CUDA graphs
of several launches. What stands in one row is replayed in turn (A B A B ...). Each time has median, smallest and largest
value. Bytes are those of the packed weights that the batch's experts have. The bandwidth is measured in the same run: a
device-to-device copy (bytes read and written) and a sum (bytes read).
"""

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import torch

from benchmarks.bandwidth import copy_bandwidth, read_bandwidth
from benchmarks.graphs import graph_us
from benchmarks.tables import markdown
from benchmarks.values import LEGEND
from benchmarks.weights import BLOCKSIZE, GPT_OSS_20B
from gptoss_nf4.format.blocks import DIRECTIONS, INPUTS, OUTPUTS, absmax_shape
from gptoss_nf4.format.codec import CODEBOOKS
from gptoss_nf4.vllm.activation import clamped_swiglu
from gptoss_nf4.vllm.kernels import experts_launch, linear_launch, tiles
from gptoss_nf4.vllm.kernels.arguments import Packed, Routing
from gptoss_nf4.vllm.kernels.plan import Large, Plan, gpu_of, plan_experts

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

D = GPT_OSS_20B
COPIES = 3
TOKENS = (1, 8, 32, 64, 128, 512, 2048, 8192)
LINEAR_ROWS = (1, 8, 32, 64, 256, 2048)
ERROR_TOKENS = (1, 4, 8, 16, 32, 64, 512)
DTYPE = torch.bfloat16
DEVICE = torch.device("cuda")
ERROR_COLUMNS = ["kernel", "relative error against float64"]
EXPERT_COLUMNS = ["tokens", "distinct experts", "w13 us", "w2 us", "TB/s", "of copy", "of read", "TFLOP/s"]
DIRECTION_TOKENS = (1, 8, 32, 64, 128, 2048)
DIRECTION_COLUMNS = ["tokens", "product", "blocks along inputs us", "blocks along outputs us", "inputs / outputs"]
LINEAR_COLUMNS = ["rows", "product", "plugin us", "dense bf16 us", "bitsandbytes us", "plugin MB", "dense MB"]


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("error: benchmarks.kernels: no NVIDIA GPU: got none, expected Ampere or newer; run it on such a machine")
    copy, read = copy_bandwidth(), read_bandwidth()
    print(f"{torch.cuda.get_device_name()}: copy {copy:.2f} TB/s, read {read:.2f} TB/s")
    print(f"Each time: {LEGEND}. Rates are of the medians.\n")
    print(markdown(ERROR_COLUMNS, errors()))
    print(markdown(EXPERT_COLUMNS, expert_times(copy, read)))
    print(markdown(DIRECTION_COLUMNS, direction_times()))
    print(markdown(LINEAR_COLUMNS, linear_times()))


@dataclass(frozen=True)
class Batch:
    """Activations and their way through the experts."""

    x: torch.Tensor  # [tokens, hidden]
    topk_weights: torch.Tensor  # float32 [tokens, k]
    ids: torch.Tensor  # int32 [tokens, k]
    routing: Routing


def random_batch(tokens: int, dtype: torch.dtype, plan: Plan, experts: int, top_k: int) -> Batch:
    """Whose routing spreads evenly."""
    x = torch.randn(tokens, D.hidden, device=DEVICE).to(dtype)
    values, ids = torch.topk(torch.randn(tokens, experts, device=DEVICE), top_k)
    ids = ids.int()
    routing = Routing(None, ids.flatten(), None) if tokens == 1 else align(ids, plan.rows, experts)
    return Batch(x, torch.softmax(values, -1), ids, routing)


def align(ids: torch.Tensor, block: int, experts: int) -> Routing:
    """vLLM's `moe_align_block_size`, in torch."""
    flat = ids.flatten().long()
    count = torch.bincount(flat, minlength=experts)
    padded = (count + block - 1) // block * block
    order = torch.argsort(flat, stable=True)
    rank = torch.arange(len(flat), device=ids.device) - (count.cumsum(0) - count)[flat[order]]
    total = int(padded.sum())
    slots = torch.full((total,), len(flat), dtype=torch.int32, device=ids.device)
    slots[(padded.cumsum(0) - padded)[flat[order]] + rank] = order.int()
    blocks = torch.arange(experts, device=ids.device).repeat_interleave(padded // block)
    return Routing(slots, blocks.int(), torch.tensor([total], dtype=torch.int32, device=ids.device))


def random_packed(experts: int, rows: int, columns: int, gate_and_up: bool = False, blocks_along: str = INPUTS) -> Packed:
    """A random weight in the kernels' order."""
    row_tiles = (2 * tiles.padded_rows(rows // 2) if gate_and_up else tiles.padded_rows(rows)) // tiles.ROWS
    size = (experts, row_tiles, columns // tiles.MAX_INPUTS, tiles.LANES, 4 * tiles.MAX_INPUTS // tiles.ROWS)
    codes = torch.randint(0, 256, size, dtype=torch.uint8, device=DEVICE).view(torch.int32)
    bias = torch.randn(experts, row_tiles * tiles.ROWS, device=DEVICE, dtype=DTYPE) * 0.1
    if blocks_along == OUTPUTS:
        absmax = (torch.rand(experts, rows // BLOCKSIZE, columns, device=DEVICE) + 0.5) / columns**0.5
        return Packed(codes, tiles.pack_absmax_of_inputs(absmax, DTYPE), bias, BLOCKSIZE, "nf4", blocks_along)
    absmax = torch.rand(experts, row_tiles, columns // BLOCKSIZE, tiles.ROWS, device=DEVICE) + 0.5
    absmax = (absmax * (tiles.ABSMAX_FACTOR / columns**0.5)).half()
    return Packed(codes, absmax, bias, BLOCKSIZE, "nf4")


def bytes_of(weight: Packed) -> int:
    return weight.codes.nbytes + weight.absmax.nbytes


def expert_times(copy: float, read: float, batches: Sequence[int] = TOKENS) -> list[list]:
    """The rows of the experts' table; `copy` and `read` in TB/s."""
    w13 = [random_packed(D.experts, 2 * D.intermediate, D.hidden, gate_and_up=True) for _ in range(COPIES)]
    w2 = [random_packed(D.experts, D.hidden, D.intermediate) for _ in range(COPIES)]
    expert_bytes = (bytes_of(w13[0]) + bytes_of(w2[0])) / D.experts
    rows = []
    for tokens in batches:
        plan = plan_experts(tokens, D.experts_per_token, D.experts, gpu_of(DEVICE))
        count = 2 * COPIES if tokens <= 64 else 2
        drawn = [random_batch(tokens, DTYPE, plan, D.experts, D.experts_per_token) for _ in range(count)]
        distinct = statistics.mean(len(batch.ids.unique()) for batch in drawn)
        partial_dtype = DTYPE if isinstance(plan, Large) else torch.float32

        def up(i: int, plan: Plan = plan, drawn: list[Batch] = drawn) -> torch.Tensor:
            batch = drawn[i]
            return experts_launch.swiglu_experts(
                batch.x, D.experts_per_token, batch.routing, w13[i % COPIES], D.intermediate, plan
            )

        middle = [up(i) for i in range(count)]

        def down(
            i: int,
            plan: Plan = plan,
            drawn: list[Batch] = drawn,
            middle: list[torch.Tensor] = middle,
            dtype: torch.dtype = partial_dtype,
        ) -> torch.Tensor:
            batch = drawn[i]
            return experts_launch.down_experts(
                middle[i], D.experts_per_token, batch.topk_weights, batch.routing, w2[i % COPIES], D.hidden, plan, dtype
            )

        first, second = graph_us([[lambda i=i: up(i) for i in range(count)], [lambda i=i: down(i) for i in range(count)]])
        both = first.median + second.median
        rate = expert_bytes * distinct / both / 1e6
        flops = 2 * tokens * D.experts_per_token * 3 * D.hidden * D.intermediate / both / 1e6
        times = [f"{distinct:.1f}", first.text(1), second.text(1)]
        rows.append([tokens, *times, f"{rate:.2f}", f"{rate / copy:.0%}", f"{rate / read:.0%}", f"{flops:.0f}"])
    return rows


def direction_times(batches: Sequence[int] = DIRECTION_TOKENS) -> list[list]:
    """The rows of the directions' table: blocks along the inputs and along the outputs, replayed in turn."""
    shapes = {"w13": (D.experts, 2 * D.intermediate, D.hidden, True), "w2": (D.experts, D.hidden, D.intermediate, False)}
    weights = {
        name: [[random_packed(*shape, blocks_along=along) for _ in range(COPIES)] for along in DIRECTIONS]
        for name, shape in shapes.items()
    }
    rows = []
    for tokens in batches:
        plan = plan_experts(tokens, D.experts_per_token, D.experts, gpu_of(DEVICE))
        count = 2 * COPIES if tokens <= 64 else 2
        drawn = [random_batch(tokens, DTYPE, plan, D.experts, D.experts_per_token) for _ in range(count)]
        middle = [torch.randn(tokens * D.experts_per_token, D.intermediate, device=DEVICE).to(DTYPE) for _ in drawn]
        partial = DTYPE if isinstance(plan, Large) else torch.float32

        def up(i: int, w: list[Packed], plan: Plan = plan, drawn: list[Batch] = drawn) -> torch.Tensor:
            x, routing = drawn[i].x, drawn[i].routing
            return experts_launch.swiglu_experts(x, D.experts_per_token, routing, w[i % COPIES], D.intermediate, plan)

        def down(
            i: int,
            w: list[Packed],
            plan: Plan = plan,
            drawn: list[Batch] = drawn,
            middle: list[torch.Tensor] = middle,
            partial: torch.dtype = partial,
        ) -> torch.Tensor:
            given = D.experts_per_token, drawn[i].topk_weights, drawn[i].routing
            return experts_launch.down_experts(middle[i], *given, w[i % COPIES], D.hidden, plan, partial)

        for name, start in (("w13", up), ("w2", down)):
            times = graph_us([[lambda i=i, w=w, start=start: start(i, w) for i in range(count)] for w in weights[name]])
            ratio = times[0].median / times[1].median
            rows.append([tokens, name, *(each.text(1) for each in times), f"{ratio:.2f}"])
    return rows


def linear_times(batches: Sequence[int] = LINEAR_ROWS) -> list[list]:
    """The rows of the linear layers' table."""
    import bitsandbytes.functional as bnb

    rows = []
    for name, outputs, inputs in (("qkv", D.q_rows + 2 * D.kv_rows, D.hidden), ("o", D.hidden, D.q_rows)):
        weights = [random_packed(1, outputs, inputs) for _ in range(8 * COPIES)]  # 8 MB each
        dense = [torch.randn(outputs, inputs, device=DEVICE, dtype=DTYPE) for _ in range(COPIES)]
        quantized = [bnb.quantize_4bit(weight, quant_type="nf4") for weight in dense]
        sizes = [f"{bytes_of(weights[0]) / 1e6:.1f}", f"{dense[0].nbytes / 1e6:.1f}"]
        for count in batches:
            x = torch.randn(count, inputs, device=DEVICE, dtype=DTYPE)
            times = graph_us(
                [
                    [lambda w=w, x=x, n=outputs: linear_launch.linear(x, w, n) for w in weights],
                    [lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in dense],
                    [lambda w=w, s=s, x=x: bitsandbytes_linear(x, w, s) for w, s in quantized],
                ]
            )
            rows.append([count, name, *(each.text(1) for each in times), *sizes])
    return rows


def bitsandbytes_linear(x: torch.Tensor, weight: torch.Tensor, state: "QuantState") -> torch.Tensor:
    """As vLLM's own bitsandbytes method does it: dequantizing where that is faster."""
    import bitsandbytes
    import bitsandbytes.functional as bnb

    if len(x) > 64:
        return torch.nn.functional.linear(x, bnb.dequantize_4bit(weight, state))
    return bitsandbytes.matmul_4bit(x, weight.t(), quant_state=state)


@dataclass(frozen=True)
class Stored:
    """A random weight as a checkpoint has it, and in float64."""

    codes: torch.Tensor  # uint8 [E, rows, columns / 2]
    absmax: torch.Tensor  # float32 [E, rows, columns / BLOCKSIZE], or [E, rows / BLOCKSIZE, columns]
    dense: torch.Tensor  # float64 [E, rows, columns]


def random_stored(experts: int, rows: int, columns: int, blocks_along: str) -> Stored:
    codes = torch.randint(0, 256, (experts, rows, columns // 2), dtype=torch.uint8, device=DEVICE)
    shape = absmax_shape((experts, rows, columns), BLOCKSIZE, blocks_along)
    absmax = torch.rand(shape, device=DEVICE) / (columns / 2) ** 0.5
    book = torch.from_numpy(CODEBOOKS["nf4"]).to(DEVICE).double()
    values = book[torch.stack((codes >> 4, codes & 15), -1).flatten(-2).long()]
    return Stored(codes, absmax, values * absmax.double().repeat_interleave(BLOCKSIZE, 1 if blocks_along == OUTPUTS else 2))


def packed_of(stored: Stored, bias: torch.Tensor, blocks_along: str, gate_and_up: bool = False) -> Packed:
    """As the kernels take it for activations in the dtype of `bias`."""

    def tiled(rows: torch.Tensor) -> torch.Tensor:
        return tiles.gate_and_up_tiles(rows, 1).contiguous() if gate_and_up else rows

    codes, bias = tiled(stored.codes), tiled(bias)
    if blocks_along == OUTPUTS:
        codes, absmax, factor = tiles.pack_across(codes, stored.absmax, bias.dtype)
        return Packed(codes, absmax, bias, BLOCKSIZE, "nf4", blocks_along, factor)
    return Packed(*tiles.pack(codes, tiled(stored.absmax), BLOCKSIZE), bias, BLOCKSIZE, "nf4")


def errors(experts: int = 4, top_k: int = 2, batches: Sequence[int] = ERROR_TOKENS) -> list[list]:
    """The rows of the errors' table: both products of every plan, on fresh inputs that are exact for them."""
    rows = []
    for dtype, along in product((torch.bfloat16, torch.float16), DIRECTIONS):
        w13 = random_stored(experts, 2 * D.intermediate, D.hidden, along)
        w2 = random_stored(experts, D.hidden, D.intermediate, along)
        bias13, bias2 = ((torch.randn(w.codes.shape[:2], device=DEVICE) * 0.1).to(dtype) for w in (w13, w2))
        packed13, packed2 = packed_of(w13, bias13, along, gate_and_up=True), packed_of(w2, bias2, along)
        for tokens in batches:
            plan = plan_experts(tokens, top_k, experts, gpu_of(DEVICE))
            batch = random_batch(tokens, dtype, plan, experts, top_k)
            expert = batch.ids.flatten()

            def order(t: torch.Tensor, plan: Plan = plan) -> torch.Tensor:
                return tiles.operand_order(t, tiles.tile_inputs(BLOCKSIZE)) if isinstance(plan, Large) else t

            expected = clamped_swiglu(products(w13.dense, bias13, expert, batch.x.repeat_interleave(top_k, 0)))
            result = experts_launch.swiglu_experts(order(batch.x), top_k, batch.routing, packed13, D.intermediate, plan)
            first = relative(result, order(expected))

            middle = expected.to(dtype)
            expected = products(w2.dense, bias2, expert, middle) * batch.topk_weights.double().view(-1, 1)
            result = experts_launch.down_experts(
                order(middle), top_k, batch.topk_weights, batch.routing, packed2, D.hidden, plan, torch.float32
            )
            second = relative(result, expected)
            what = f"{dtype}, blocks along the {along}, {tokens} tokens, {plan.rows} rows a program"
            rows.append([what, f"w13 {first:.1e}, w2 {second:.1e}"])
    return rows


def products(weight: torch.Tensor, bias: torch.Tensor, expert: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Each of `rows` times its expert's weight, plus bias, in float64."""
    return torch.stack([weight[e] @ row + bias[e].double() for e, row in zip(expert, rows.double(), strict=True)])


def relative(result: torch.Tensor, reference: torch.Tensor) -> float:
    return float((result.double() - reference).norm() / reference.norm())


if __name__ == "__main__":
    main()
