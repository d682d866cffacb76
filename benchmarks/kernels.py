"""The plugin's kernels alone, at gpt-oss-20b's dimensions: time, share of the measured bandwidth, error.

    python -m benchmarks.kernels

Weights are random codes, three copies in turn, together larger than any GPU's L2 cache. Times are medians of replays of
a CUDA graph of several launches; bytes are those of the packed weights that the batch's experts have. The bandwidth is
measured in the same run: a device-to-device copy (bytes read and written) and a sum (bytes read).
"""

import statistics
import sys
from collections.abc import Callable

import torch

from benchmarks.tables import markdown
from benchmarks.weights import BLOCKSIZE, GPT_OSS_20B
from gptoss_nf4.format.codec import CODEBOOKS
from gptoss_nf4.vllm.activation import clamped_swiglu
from gptoss_nf4.vllm.kernels import launch, tiles
from gptoss_nf4.vllm.kernels.launch import Packed, Routing

D = GPT_OSS_20B
COPIES = 3
TOKENS = (1, 8, 32, 64, 128, 512, 2048, 8192)
LINEAR_ROWS = (1, 8, 32, 64, 256, 2048)
DTYPE = torch.bfloat16
DEVICE = torch.device("cuda")


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("error: benchmarks.kernels: no NVIDIA GPU: got none, expected Ampere or newer; run it on such a machine")
    copy, read = bandwidths()
    print(f"{torch.cuda.get_device_name()}: copy {copy:.2f} TB/s, read {read:.2f} TB/s\n")
    print(markdown(["kernel", "relative error against float64"], errors()))
    columns = ["tokens", "distinct experts", "w13 us", "w2 us", "TB/s", "of copy", "of read", "TFLOP/s"]
    print(markdown(columns, experts(copy, read)))
    columns = ["rows", "product", "plugin us", "dense bf16 us", "bitsandbytes us", "plugin MB", "dense MB"]
    print(markdown(columns, linears()))


def graph_us(calls: list[Callable], replays: int = 20) -> float:
    """Median microseconds of one of `calls`, captured together."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times[1:])


def bandwidths() -> tuple[float, float]:
    """TB/s of copying (read and written) and of reading."""
    source = torch.randint(0, 256, (1 << 30,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    values = source.view(torch.float16)[: 1 << 28].nan_to_num(0)
    copy = 2 * source.nbytes / graph_us([lambda: target.copy_(source)] * 2) / 1e6
    return copy, values.nbytes / graph_us([lambda: values.sum()] * 2) / 1e6


def packed(experts: int, rows: int, columns: int, gate_and_up: bool = False) -> Packed:
    """A random weight in the kernels' order."""
    row_tiles = (2 * tiles.padded_rows(rows // 2) if gate_and_up else tiles.padded_rows(rows)) // tiles.ROWS
    size = (experts, row_tiles, columns // tiles.MAX_INPUTS, tiles.LANES, 4 * tiles.MAX_INPUTS // tiles.ROWS)
    codes = torch.randint(0, 256, size, dtype=torch.uint8, device=DEVICE).view(torch.int32)
    absmax = torch.rand(experts, row_tiles, columns // BLOCKSIZE, tiles.ROWS, device=DEVICE) + 0.5
    absmax = (absmax * (tiles.ABSMAX_FACTOR / columns**0.5)).half()
    bias = torch.randn(experts, row_tiles * tiles.ROWS, device=DEVICE, dtype=DTYPE) * 0.1
    return Packed(codes, absmax, bias, BLOCKSIZE, "nf4")


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


def batch(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Activations, weights of the chosen experts and their numbers; routing spreads evenly."""
    x = torch.randn(tokens, D.hidden, device=DEVICE, dtype=DTYPE)
    logits = torch.randn(tokens, D.experts, device=DEVICE)
    values, ids = torch.topk(logits, D.experts_per_token)
    return x, torch.softmax(values, -1), ids.int()


def route(ids: torch.Tensor, plan: launch.Plan) -> Routing:
    return Routing(None, ids.flatten(), None) if len(ids) == 1 else align(ids, plan.rows, D.experts)


def experts(copy: float, read: float) -> list[list]:
    w13 = [packed(D.experts, 2 * D.intermediate, D.hidden, gate_and_up=True) for _ in range(COPIES)]
    w2 = [packed(D.experts, D.hidden, D.intermediate) for _ in range(COPIES)]
    expert_bytes = sum(t[0].nbytes for w in (w13[0], w2[0]) for t in (w.codes, w.absmax))
    rows = []
    for tokens in TOKENS:
        plan = launch.plan_experts(tokens, D.experts_per_token, D.experts, DEVICE)
        batches = [batch(tokens) for _ in range(2 * COPIES if tokens <= 64 else 2)]
        routes = [route(ids, plan) for _, _, ids in batches]
        distinct = statistics.mean(len(ids.unique()) for _, _, ids in batches)
        dtype = torch.float32 if plan.w2.warps else DTYPE

        def up(i, plan=plan, batches=batches, routes=routes):
            return launch.swiglu_experts(
                batches[i][0], D.experts_per_token, routes[i], w13[i % COPIES], D.intermediate, plan.rows, plan.w13
            )

        middle = [up(i) for i in range(len(batches))]

        def down(i, plan=plan, batches=batches, routes=routes, middle=middle, dtype=dtype):
            return launch.down_experts(
                middle[i], batches[i][1], routes[i], w2[i % COPIES], D.hidden, plan.rows, plan.w2, dtype
            )

        first = graph_us([lambda i=i: up(i) for i in range(len(batches))])
        second = graph_us([lambda i=i: down(i) for i in range(len(batches))])
        rate = expert_bytes * distinct / (first + second) / 1e6
        flops = 2 * tokens * D.experts_per_token * 3 * D.hidden * D.intermediate / (first + second) / 1e6
        rows.append(
            [
                tokens,
                f"{distinct:.1f}",
                f"{first:.1f}",
                f"{second:.1f}",
                f"{rate:.2f}",
                f"{rate / copy:.0%}",
                f"{rate / read:.0%}",
                f"{flops:.0f}",
            ]
        )
    return rows


def linears() -> list[list]:
    import bitsandbytes.functional as bnb

    rows = []
    for name, outputs, inputs in (("qkv", D.q_rows + 2 * D.kv_rows, D.hidden), ("o", D.hidden, D.q_rows)):
        copies = 8 * COPIES  # 8 MB each
        weights = [packed(1, outputs, inputs) for _ in range(copies)]
        dense = [torch.randn(outputs, inputs, device=DEVICE, dtype=DTYPE) for _ in range(COPIES)]
        theirs = [bnb.quantize_4bit(weight, quant_type="nf4") for weight in dense]
        sizes = [f"{sum(t.nbytes for t in weights[0][:2]) / 1e6:.1f}", f"{dense[0].nbytes / 1e6:.1f}"]
        for count in LINEAR_ROWS:
            x = torch.randn(count, inputs, device=DEVICE, dtype=DTYPE)
            ours = graph_us([lambda w=w, x=x, n=outputs: launch.linear(x, w, n) for w in weights])
            cublas = graph_us([lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in dense])
            other = graph_us(
                [
                    lambda w=w, s=s, x=x: (
                        torch.nn.functional.linear(x, bnb.dequantize_4bit(w, s)) if len(x) > 64 else _matmul_4bit(x, w, s)
                    )
                    for w, s in theirs
                ]
            )
            rows.append([count, name, f"{ours:.1f}", f"{cublas:.1f}", f"{other:.1f}", *sizes])
    return rows


def _matmul_4bit(x: torch.Tensor, weight: torch.Tensor, state) -> torch.Tensor:
    import bitsandbytes

    return bitsandbytes.matmul_4bit(x, weight.t(), quant_state=state)


def relative(result: torch.Tensor, reference: torch.Tensor) -> float:
    return float((result.double() - reference).norm() / reference.norm())


def products(weight: torch.Tensor, bias: torch.Tensor, choice: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Each row times its expert's weight, in float64."""
    return torch.stack([weight[e] @ row + bias[e].double() for e, row in zip(choice, rows, strict=True)])


def errors() -> list[list]:
    """Every plan's two products on fresh inputs against float64, four experts."""
    rows, count = [], 4
    codes = {
        n: torch.randint(0, 256, (count, r, k // 2), dtype=torch.uint8, device=DEVICE)
        for n, r, k in (("w13", 2 * D.intermediate, D.hidden), ("w2", D.hidden, D.intermediate))
    }
    absmax = {
        n: torch.rand(*c.shape[:2], 2 * c.shape[2] // BLOCKSIZE, device=DEVICE) / c.shape[2] ** 0.5
        for n, c in codes.items()
    }
    book = torch.from_numpy(CODEBOOKS["nf4"]).to(DEVICE).double()
    values = {n: book[torch.stack((c >> 4, c & 15), -1).flatten(-2).long()] for n, c in codes.items()}
    dense = {n: v * absmax[n].double().repeat_interleave(BLOCKSIZE, -1) for n, v in values.items()}
    for dtype in (torch.bfloat16, torch.float16):
        bias = {n: (torch.randn(c.shape[:2], device=DEVICE) * 0.1).to(dtype) for n, c in codes.items()}
        w13 = Packed(
            *tiles.pack(*(tiles.gate_and_up_tiles(t, 1) for t in (codes["w13"], absmax["w13"])), BLOCKSIZE),
            tiles.gate_and_up_tiles(bias["w13"], 1).contiguous(),
            BLOCKSIZE,
            "nf4",
        )
        w2 = Packed(*tiles.pack(codes["w2"], absmax["w2"], BLOCKSIZE), bias["w2"], BLOCKSIZE, "nf4")
        for tokens in (1, 4, 8, 16, 64, 256):
            plan = launch.plan_experts(tokens, 2, count, DEVICE)
            x = torch.randn(tokens, D.hidden, device=DEVICE).to(dtype)
            values, ids = torch.topk(torch.randn(tokens, count, device=DEVICE), 2)
            routing = Routing(None, ids.flatten().int(), None) if tokens == 1 else align(ids, plan.rows, count)
            choice, each = ids.flatten(), torch.softmax(values, -1)

            def order(t, plan=plan):  # in which the prefill kernels read and write
                return t if plan.w13.warps else tiles.operand_order(t, tiles.tile_inputs(BLOCKSIZE))

            reference = clamped_swiglu(products(dense["w13"], bias["w13"], choice, x.double().repeat_interleave(2, 0)))
            middle = launch.swiglu_experts(order(x), 2, routing, w13, D.intermediate, plan.rows, plan.w13)
            first = relative(middle, order(reference))
            middle = reference.to(dtype)
            down = launch.down_experts(order(middle), each, routing, w2, D.hidden, plan.rows, plan.w2, torch.float32)
            reference = products(dense["w2"], bias["w2"], choice, middle.double())
            second = relative(down, reference * each.double().view(-1, 1))
            rows.append([f"{dtype}, {tokens} tokens, {plan.rows} rows a program", f"w13 {first:.1e}, w2 {second:.1e}"])
    return rows


if __name__ == "__main__":
    main()
