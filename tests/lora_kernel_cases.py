"""Runs the kernels with adapters on fresh random inputs and prints how far their results are off, as JSON lines.

    python tests/lora_kernel_cases.py [SEED]

As `kernel_cases`: relative errors against float64; of tokens of the base, in the same batch, the number of results that are
not, bit by bit, those of the same kernels without adapters.
"""

import sys
from dataclasses import dataclass

import torch
from kernel_cases import (
    ACROSS,
    DEVICE,
    ON_GPU,
    TOP_K,
    Experts,
    Linear,
    Matrix,
    clamped_swiglu,
    experts_launch,
    linear_launch,
    poison,
    products,
    random_matrix,
    relative,
    report,
    route,
    tiles,
)

from gptoss_nf4.vllm.kernels.expand import expand
from gptoss_nf4.vllm.kernels.lora import Factors
from gptoss_nf4.vllm.kernels.plan import Large, Small, gpu_of, plan_experts

BEYOND = 1 << 30  # in the mapping behind the last token, where nobody may look
W2_SCALE = 2.0**-6


@dataclass(frozen=True)
class Adapters:
    """How many the engine holds, and of what rank. Tokens ask for them, and for the base, in turn."""

    count: int
    rank: int


EXPERTS = [
    (Experts(tokens=1, experts=4, hidden=192, intermediate=64), Adapters(count=1, rank=16)),
    (Experts(tokens=5, experts=4, hidden=192, intermediate=64), Adapters(count=3, rank=8)),
    (
        Experts(tokens=6, experts=3, hidden=96, intermediate=96, blocksize=32, plan=Small(rows=8, warps=2)),
        Adapters(count=2, rank=1),
    ),
    # Three rounds of the ranks, and below two chunks of them; the last ones are not whole.
    (Experts(tokens=9, experts=3, hidden=64, intermediate=64, plan=Small(rows=16, warps=1)), Adapters(count=8, rank=20)),
    (
        Experts(tokens=9, experts=3, hidden=160, intermediate=160, blocksize=32, plan=Large(rows=32)),
        Adapters(count=3, rank=8),
    ),
    (Experts(tokens=40, experts=3, hidden=256, intermediate=64, plan=Large(rows=16)), Adapters(count=2, rank=64)),
    (Experts(tokens=40, experts=3, hidden=192, intermediate=64, plan=Large(16, shrinks_slots=True)), Adapters(5, 16)),
    (Experts(tokens=30, experts=2, hidden=64, intermediate=64, plan=Large(rows=16)), Adapters(count=1, rank=20)),
    (Experts(tokens=70, experts=2, hidden=64, intermediate=64, plan=Large(rows=64)), Adapters(count=3, rank=40)),
    (Experts(tokens=20, experts=2, hidden=64, intermediate=64, plan=Large(rows=32)), Adapters(count=2, rank=72)),
    # Blocks along the outputs.
    (Experts(tokens=1, experts=4, hidden=192, intermediate=96, blocks_along=ACROSS), Adapters(count=1, rank=16)),
    (
        Experts(tokens=6, experts=3, hidden=96, intermediate=96, blocks_along=ACROSS, blocksize=32, plan=Small(8, 2)),
        Adapters(count=3, rank=8),
    ),
    (
        Experts(tokens=9, experts=3, hidden=192, intermediate=96, blocks_along=ACROSS, plan=Large(rows=32)),
        Adapters(count=2, rank=16),
    ),
]
# With the rows of each slice.
LINEARS = [
    (Linear(rows=5, outputs=72, inputs=192), [72], Adapters(count=2, rank=16)),
    (Linear(rows=5, outputs=96, inputs=192), [64, 16, 16], Adapters(count=3, rank=8)),
    (Linear(rows=20, outputs=64, inputs=96, blocksize=32), [32, 16, 16], Adapters(count=2, rank=17)),
    (Linear(rows=40, outputs=32, inputs=192, bias=False), [32], Adapters(count=4, rank=1)),
    (Linear(rows=40, outputs=96, inputs=192, plan=Large(rows=64, parts=3)), [64, 16, 16], Adapters(count=3, rank=16)),
    (Linear(rows=70, outputs=96, inputs=192), [64, 16, 16], Adapters(count=3, rank=16)),
    (Linear(rows=70, outputs=72, inputs=192, bias=False), [72], Adapters(count=2, rank=64)),
]


def main() -> None:
    torch.manual_seed(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    for dtype in (torch.bfloat16, torch.float16) if ON_GPU else (torch.float16,):
        for case, slices, adapters in LINEARS:
            report(f"{case} {slices} {adapters}", dtype, linear_errors(case, slices, adapters, dtype))
        for case, adapters in EXPERTS:
            report(f"{case} {adapters}", dtype, experts_errors(case, adapters, dtype))
        for rank, inputs in ((8, 64), (129, 512)):  # in one kernel, and in two
            report(f"a dense layer of few rows, rank {rank}", dtype, expand_errors(3, rank, inputs, dtype))


def linear_errors(case: Linear, slices: list[int], adapters: Adapters, dtype: torch.dtype) -> dict[str, float]:
    weight = random_matrix(1, case.outputs, case.inputs, case.blocksize, case.quant_type, dtype)
    packed = weight.packed if case.bias else weight.packed._replace(bias=None)
    x = torch.randn(case.rows, case.inputs, device=DEVICE).to(dtype)
    factors = random_factors(adapters, 1, slices, case.inputs, case.rows, dtype)
    mapping = factors.adapters[: case.rows]
    expected = x.double() @ weight.dense[0].T + weight.bias[0] * case.bias
    for row, adapter in enumerate(mapping.tolist()):
        if adapter >= 0:
            expected[row] += merged(factors, slices, adapter, 0) @ x[row].double()
    result = poison(lambda: linear_launch.linear(x, packed, case.outputs, case.plan, factors))
    alone = poison(lambda: linear_launch.linear(x, packed, case.outputs, case.plan))
    return {"linear": relative(result, expected), "base": different(result, alone, mapping)}


def experts_errors(case: Experts, adapters: Adapters, dtype: torch.dtype) -> dict[str, float]:
    """Of both products, each on inputs that are exact for it, and of the whole."""
    plan = case.plan or plan_experts(case.tokens, TOP_K, case.experts, gpu_of(DEVICE))
    settings = case.blocksize, case.quant_type, dtype
    along13, along2 = case.blocks_along
    w13 = random_matrix(case.experts, 2 * case.intermediate, case.hidden, *settings, True, along13)
    w2 = random_matrix(case.experts, case.hidden, case.intermediate, *settings, blocks_along=along2)
    x = torch.randn(case.tokens, case.hidden, device=DEVICE).to(dtype)
    values, ids = torch.topk(torch.randn(case.tokens, case.experts, device=DEVICE), TOP_K)
    topk_weights = torch.softmax(values, -1)
    # The last is another rank's, and the others have other numbers here.
    local = torch.tensor([*reversed(range(case.experts - 1)), -1], dtype=torch.int32, device=DEVICE)
    routing, expert = route(ids, plan, local), local[ids.flatten()]
    here = expert >= 0

    outputs, inputs = 2 * case.intermediate, case.hidden
    w13_factors = random_factors(adapters, case.experts, [outputs], inputs, case.tokens, dtype, expert)
    w2_factors = random_factors(adapters, case.experts, [inputs], case.intermediate, case.tokens, dtype, expert)
    w2_factors = w2_factors._replace(b=w2_factors.b * 4, scale=W2_SCALE * 8)
    mapping = w13_factors.adapters[: case.tokens].repeat_interleave(TOP_K)

    def order(t: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        """As the product with `matrix` takes it."""
        return tiles.operand_order(t, 16 * matrix.packed.codes.shape[-1]) if isinstance(plan, Large) else t

    def swiglu(factors: Factors | None) -> torch.Tensor:
        given = order(x, w13)
        return poison(
            lambda: experts_launch.swiglu_experts(given, TOP_K, routing, w13.packed, case.intermediate, plan, factors)
        )

    rows = x.repeat_interleave(TOP_K, 0)
    middle = clamped_swiglu(products_with(w13, w13_factors, mapping, expert, rows))
    result = swiglu(w13_factors)
    errors = {
        "w13": relative(result[here], order(middle, w2)[here]),
        "w13 base": different(result[here], swiglu(None)[here], mapping[here]),
    }

    middle = middle.to(dtype)
    middle[~here] = float("nan")  # as no kernel writes it

    def down(factors: Factors | None) -> torch.Tensor:
        given = order(middle, w2)
        return poison(
            lambda: experts_launch.down_experts(
                given, TOP_K, topk_weights, routing, w2.packed, case.hidden, plan, torch.float32, factors
            )
        )

    expected = products_with(w2, w2_factors, mapping, expert, middle) * topk_weights.double().view(-1, 1)
    expected[~here] = 0
    result = down(w2_factors)
    errors |= {"w2": relative(result, expected), "w2 base": different(result, down(None), mapping)}

    whole = poison(
        lambda: experts_launch.experts(
            x, TOP_K, topk_weights, ids.int(), routing, w13.packed, w2.packed, plan, None, w13_factors, w2_factors
        )
    )
    return errors | {"whole": relative(whole, expected.view(case.tokens, TOP_K, -1).sum(1))}


def expand_errors(rows: int, rank: int, inputs: int, dtype: torch.dtype) -> dict[str, float]:
    """In float32 too, as a router may have its results."""
    factors = random_factors(Adapters(count=2, rank=rank), 1, [12], inputs, rows, dtype)._replace(scale=0.5)
    x, out = torch.randn(rows, inputs, device=DEVICE).to(dtype), torch.randn(rows, 12, device=DEVICE)
    expected = out.double()
    for row, adapter in enumerate(factors.adapters[:rows].tolist()):
        if adapter >= 0:
            expected[row] += merged(factors, [12], adapter, 0) @ x[row].double()
    poison(lambda: expand(out, x, factors))
    return {"expand": relative(out, expected)}


def random_factors(
    adapters: Adapters,
    experts: int,
    slices: list[int],
    inputs: int,
    tokens: int,
    dtype: torch.dtype,
    local: torch.Tensor | None = None,
) -> Factors:
    """What B @ A adds is about as large as what the weight of `random_matrix` gives."""
    count, rank = adapters.count, adapters.rank
    a = torch.randn(count, experts, len(slices) * rank, inputs, device=DEVICE) / inputs**0.5
    b = torch.randn(count, experts, sum(slices), rank, device=DEVICE) / rank**0.5
    mapping = (torch.arange(tokens + 8, device=DEVICE) + 1) % (count + 1) - 1  # the first token has adapter 0
    mapping[tokens:] = BEYOND
    ends = torch.tensor(slices).cumsum(0).tolist() if len(slices) > 1 else ()
    return Factors(a.to(dtype), b.to(dtype), mapping, local, tuple(ends))


def merged(factors: Factors, slices: list[int], adapter: int, expert: int) -> torch.Tensor:
    """The dense float64 [rows, in] that an adapter adds to the weight."""
    a, b = factors.a[adapter, expert].double(), factors.b[adapter, expert].double()
    parts = zip(a.chunk(len(slices)), b.split(slices), strict=True)
    return factors.scale * torch.cat([part_b @ part_a for part_a, part_b in parts])


def products_with(
    matrix: Matrix, factors: Factors, mapping: torch.Tensor, expert: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """`products`, plus what the adapter of each slot adds."""
    result = products(matrix, expert, rows)
    for slot, adapter in enumerate(mapping.tolist()):
        if adapter >= 0:
            result[slot] += merged(factors, [factors.b.shape[2]], adapter, int(expert[slot])) @ rows[slot].double()
    return result


def different(result: torch.Tensor, alone: torch.Tensor, mapping: torch.Tensor) -> int:
    """How many rows of the base are not the same bits."""
    return int((result != alone).any(-1)[mapping < 0].sum())


if __name__ == "__main__":
    main()
