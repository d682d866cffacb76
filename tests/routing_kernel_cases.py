"""Runs the kernels between the router's input and the experts' output, as `kernel_cases.py` runs the others.

    python tests/routing_kernel_cases.py [SEED]

Routing is compared with sorting in torch: experts exactly, weights with float64. Logits have ties, NaN and infinities.
"""

import json
import sys
from dataclasses import dataclass

import torch
from kernel_cases import DEVICE, ON_GPU, align, poison, products, random_matrix, relative

from gptoss_nf4.vllm.activation import clamped_swiglu
from gptoss_nf4.vllm.kernels import experts_launch, routing
from gptoss_nf4.vllm.kernels.arguments import Routing
from gptoss_nf4.vllm.kernels.router import few_logits


@dataclass(frozen=True)
class Case:
    tokens: int
    experts: int
    top_k: int
    padding: bool = False
    """The last tokens only fill up the batch."""
    away: bool = False
    """The last expert is another rank's."""


CASES = [
    Case(1, 32, 4),
    Case(1, 5, 2, away=True),
    Case(1, 128, 4, padding=True),
    Case(3, 6, 3, padding=True),
    Case(8, 32, 4),
    Case(20, 12, 4, padding=True, away=True),
    Case(70, 33, 2, padding=True),
    Case(129, 32, 4, away=True),
]


def wild_logits(case: Case, dtype: torch.dtype) -> torch.Tensor:
    logits = torch.randn(case.tokens, case.experts, device=DEVICE).to(dtype)
    if case.tokens > 2:
        logits[0] = logits[0].round()  # ties
        logits[1, ::2] = float("-inf")
        logits[2, 1], logits[2, 3] = float("nan"), float("inf")
    return logits


def choices(logits: torch.Tensor, top_k: int, is_padding: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 weights and ids as vLLM's router gives them: of equal logits the lower number first. NaN is the lowest."""
    values = logits.double().nan_to_num(nan=-3e38, posinf=3e38, neginf=-3e38)
    ids = torch.sort(values, dim=1, descending=True, stable=True)[1][:, :top_k]
    weights = torch.softmax(torch.gather(values, 1, ids), 1)
    return weights, ids.int() if is_padding is None else torch.where(is_padding[:, None], -1, ids.int())


def errors(case: Case, dtype: torch.dtype) -> dict[str, float]:
    local = torch.arange(case.experts, dtype=torch.int32, device=DEVICE)
    if case.away:
        local[-1] = -1
    expert_map = local if case.away else None
    is_padding = torch.arange(case.tokens, device=DEVICE) >= max(1, case.tokens - 2) if case.padding else None
    logits = wild_logits(case, dtype)
    finite = torch.randn(case.tokens, case.experts, device=DEVICE).to(dtype)
    found: dict[str, float] = {}
    for name, given in (("wild", logits), ("finite", finite)):
        weights, ids = choices(given, case.top_k, is_padding)
        got = poison(lambda given=given: routing.choose(given, case.top_k))
        found[f"{name} ids, exact"] = float((got[1] != choices(given, case.top_k, None)[1]).sum())
        found[f"{name} weights"] = relative(got[0], weights)
        if routing.routes(case.tokens, case.experts):
            got = poison(lambda given=given: routing.route(given, case.top_k, 8, expert_map, is_padding))
            found[f"{name} routed ids, exact"] = float((got[1] != ids).sum())
            found[f"{name} routed weights"] = relative(got[0], weights)
            found[f"{name} blocks, exact"] = float(
                slots_by_expert(got[2], ids) != slots_by_expert(aligned(ids, local), ids)
            )
    if case.tokens > 70 and not ON_GPU:
        return found  # the interpreter would take a minute
    return found | products_of_logits(case, dtype, finite, expert_map, local, is_padding)


def slots_by_expert(routed: Routing, ids: torch.Tensor, block: int = 8) -> list[tuple[int, int]]:
    """(slot, local expert), sorted; blocks must be filled up with numbers that are no slots."""
    assert routed.slots is not None
    assert routed.padded_count is not None
    assert routed.experts is not None
    used = int(routed.padded_count)
    slots, owners = routed.slots[:used].tolist(), routed.experts[: used // block].tolist()
    return sorted((slot, owners[place // block]) for place, slot in enumerate(slots) if slot < ids.numel())


def aligned(ids: torch.Tensor, local: torch.Tensor) -> Routing:
    return align(ids, 8, local.tolist())


def products_of_logits(
    case: Case,
    dtype: torch.dtype,
    logits: torch.Tensor,
    expert_map: torch.Tensor | None,
    local: torch.Tensor,
    is_padding: torch.Tensor | None,
    hidden: int = 64,
    intermediate: int = 32,
) -> dict[str, float]:
    w13 = random_matrix(case.experts, 2 * intermediate, hidden, 32, "nf4", dtype, gate_and_up=True)
    w2 = random_matrix(case.experts, hidden, intermediate, 32, "nf4", dtype)
    x = torch.randn(case.tokens, hidden, device=DEVICE).to(dtype)

    def align_many(ids: torch.Tensor, block: int, experts: int, expert_map: torch.Tensor | None) -> tuple:
        return align(ids, block, local.tolist())[:3]

    result = poison(
        lambda: experts_launch.experts_of_logits(
            x, logits, case.top_k, is_padding, expert_map, w13.packed, w2.packed, align_many
        )
    )
    if case.tokens == 1 or not routing.routes(case.tokens, case.experts):
        is_padding = None  # computed as others are
    weights, ids = choices(logits, case.top_k, is_padding)
    expert = ids.flatten().long()
    here = (expert >= 0) & (local[expert] >= 0)
    middle = clamped_swiglu(products(w13, expert.clamp(min=0), x.repeat_interleave(case.top_k, 0)))
    down = products(w2, expert.clamp(min=0), middle) * weights.view(-1, 1) * here[:, None]
    expected = down.view(case.tokens, case.top_k, -1).sum(1)
    found = {"whole": relative(result, expected)}
    if is_padding is not None:
        found["rows that do not exist, exact"] = float(result[is_padding].abs().max())
    x = torch.randn(min(case.tokens, 5), 72, device=DEVICE).to(dtype)  # no power of two
    weight, bias = torch.randn(case.experts, 72, device=DEVICE).to(dtype), torch.randn(case.experts, device=DEVICE)
    row = poison(lambda: few_logits(x, weight, bias.to(dtype)))
    return found | {"router": relative(row, x.double() @ weight.double().T + bias.to(dtype).double())}


def main() -> None:
    torch.manual_seed(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    for dtype in (torch.bfloat16, torch.float16) if ON_GPU else (torch.float16,):
        for case in CASES:
            print(json.dumps({"case": str(case), "dtype": str(dtype), "errors": errors(case, dtype)}), flush=True)


if __name__ == "__main__":
    main()
