"""Runs every kernel on fresh random inputs and prints, as JSON lines, its error against float64.

On a GPU in bfloat16 and float16. Without one in float16 through Triton's interpreter, which has to be chosen before the
kernels are imported, hence a script of its own (the interpreter multiplies bfloat16's bits as integers).
"""

import json
import os
import sys

import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

from gptoss_nf4.format.codec import CODEBOOKS  # noqa: E402
from gptoss_nf4.vllm.activation import clamped_swiglu  # noqa: E402
from gptoss_nf4.vllm.kernels import combine, launch, sort, tiles  # noqa: E402
from gptoss_nf4.vllm.kernels.launch import Packed, Plan, Routing, Tiling  # noqa: E402

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
TOP_K = 2
LARGE = Tiling(0)
# experts, hidden, intermediate, tokens, blocksize, quant type, plan; None: what the plugin chooses
CASES = [
    (4, 192, 64, 1, 64, "nf4", None),
    (4, 192, 64, 5, 64, "nf4", None),
    (4, 192, 96, 5, 32, "nf4", Plan(8, Tiling(2), Tiling(4))),  # half-size tiles, rows not a multiple of a program's
    (4, 128, 128, 5, 128, "fp4", Plan(16, Tiling(1), Tiling(2))),
    (4, 192, 72 * 4, 9, 32, "nf4", Plan(32, LARGE, LARGE)),
    (3, 256, 64, 40, 64, "nf4", Plan(16, LARGE, LARGE)),
]


def random_weight(experts: int, rows: int, columns: int, blocksize: int):
    codes = torch.randint(0, 256, (experts, rows, columns // 2), dtype=torch.uint8, device=DEVICE)
    absmax = (torch.rand(experts, rows, columns // blocksize, device=DEVICE) + 0.5) * 2 / columns**0.5
    return codes, absmax, torch.randn(experts, rows, device=DEVICE) * 0.2


def dense(codes: torch.Tensor, absmax: torch.Tensor, blocksize: int, quant_type: str) -> torch.Tensor:
    book = torch.from_numpy(CODEBOOKS[quant_type]).to(DEVICE).double()
    values = book[torch.stack((codes >> 4, codes & 15), -1).flatten(-2).long()]
    return values * absmax.double().repeat_interleave(blocksize, -1)


def align(ids: torch.Tensor, block: int, local: list[int]) -> Routing:
    """What vLLM's `moe_align_block_size` returns, with a block too many, as in its upper bound."""
    flat, slots, blocks = ids.flatten().tolist(), [], []
    for expert in range(len(local)):
        mine = [slot for slot, chosen in enumerate(flat) if chosen == expert]
        for start in range(0, len(mine), block):
            part = mine[start : start + block]
            slots += part + [len(flat)] * (block - len(part))
            blocks.append(local[expert])
    used = torch.tensor([len(slots)], dtype=torch.int32, device=DEVICE)
    slots += [1 << 30] * block
    blocks.append(0)
    return Routing(
        torch.tensor(slots, dtype=torch.int32, device=DEVICE), torch.tensor(blocks, dtype=torch.int32, device=DEVICE), used
    )


def relative(result: torch.Tensor, reference: torch.Tensor) -> float:
    return float((result.double() - reference).norm() / reference.norm())


def run(case, dtype: torch.dtype) -> dict[str, float]:
    experts, hidden, intermediate, tokens, blocksize, quant_type, plan = case
    plan = plan or launch.plan_experts(tokens, TOP_K, experts, DEVICE)
    (c13, a13, b13), (c2, a2, b2) = (
        random_weight(experts, 2 * intermediate, hidden, blocksize),
        random_weight(experts, hidden, intermediate, blocksize),
    )
    b13, b2 = b13.to(dtype), b2.to(dtype)
    x = torch.randn(tokens, hidden, device=DEVICE).to(dtype)
    values, ids = torch.topk(torch.randn(tokens, experts, device=DEVICE), TOP_K)
    each = torch.softmax(values, -1)
    # The last expert is another rank's.
    local = [*range(experts - 1), -1]
    if tokens == 1:
        routing = Routing(None, torch.tensor(local, dtype=torch.int32, device=DEVICE)[ids.flatten()], None)
    elif plan.w13.warps:  # as the plugin sorts few slots
        mapped = torch.tensor(local, dtype=torch.int32, device=DEVICE)
        routing = Routing(*poison(lambda: sort.sort_slots(ids, plan.rows, experts, mapped)))
    else:
        routing = align(ids, plan.rows, local)
    w13 = Packed(
        *tiles.pack(tiles.gate_and_up_tiles(c13, 1), tiles.gate_and_up_tiles(a13, 1), blocksize),
        tiles.gate_and_up_tiles(b13, 1).contiguous(),
        blocksize,
        quant_type,
    )
    w2 = Packed(
        *tiles.pack(c2, a2, blocksize),
        torch.nn.functional.pad(b2, (0, tiles.padded_rows(hidden) - hidden)),
        blocksize,
        quant_type,
    )
    d13, d2 = dense(c13, a13, blocksize, quant_type), dense(c2, a2, blocksize, quant_type)
    choice = ids.flatten()
    here = choice < experts - 1
    slots = x.double().repeat_interleave(TOP_K, 0)
    gate_up = torch.stack([d13[e] @ s + b13[e].double() for e, s in zip(choice, slots, strict=True)])

    def order(t: torch.Tensor) -> torch.Tensor:  # of the kernels of `large`
        return t if plan.w13.warps else tiles.operand_order(t, tiles.tile_inputs(blocksize))

    poisoned = poison(lambda: launch.swiglu_experts(order(x), TOP_K, routing, w13, intermediate, plan.rows, plan.w13))
    reference = order(clamped_swiglu(gate_up))
    errors = {"w13": relative(poisoned[here], reference[here])}
    middle = reference.to(dtype)
    partial = poison(lambda: launch.down_experts(middle, each, routing, w2, hidden, plan.rows, plan.w2, torch.float32))
    natural = clamped_swiglu(gate_up).to(dtype).double()
    down = torch.stack([d2[e] @ m + b2[e].double() for e, m in zip(choice, natural, strict=True)])
    down = down * each.double().view(-1, 1) * here.double()[:, None]
    errors["w2"] = relative(partial, down)
    total = poison(lambda: combine.sum_slots(partial.view(tokens, TOP_K, hidden), torch.float32))
    errors["sum"] = relative(total, partial.double().view(tokens, TOP_K, hidden).sum(1))
    middle = clamped_swiglu(gate_up).to(dtype)
    one = Packed(*(t[:1] for t in tiles.pack(c2, a2, blocksize)), w2.bias[:1], blocksize, quant_type)
    for name, linear_plan in {"linear": None, "linear, 16 rows": (16, Tiling(2))}.items():
        result = poison(lambda p=linear_plan: launch.linear(middle, one, hidden, p))
        errors[name] = relative(result, middle.double() @ d2[0].T + b2[0].double())
    errors["dequantize"] = relative(poison(lambda: launch.dequantize(one, hidden, dtype)), d2[0])
    return errors


def poison(call):
    """Run `call` with every new tensor filled with NaN, or an absurd number, first: what no kernel writes shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 1 << 30)

    torch.empty = poisoned
    try:
        return call()
    finally:
        torch.empty = empty


def main() -> None:
    torch.manual_seed(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    for dtype in (torch.bfloat16, torch.float16) if ON_GPU else (torch.float16,):
        for case in CASES:
            print(json.dumps({"case": str(case), "dtype": str(dtype), "errors": run(case, dtype)}), flush=True)


if __name__ == "__main__":
    main()
