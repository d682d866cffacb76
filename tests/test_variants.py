"""No compilation after the start: what the operators launch, at any number of tokens, is among what a layer compiles.

Keys are Triton's own, for a GPU that need not be here: of each launch, what it would compile is asked for and not compiled.
"""

from itertools import product

import pytest
import torch
from asked_triton import keys_of

from benchmarks.machine_code import GPUS, packed
from benchmarks.weights import GPT_OSS_20B
from gptoss_nf4.format.blocks import INPUTS, OUTPUTS
from gptoss_nf4.vllm import ops
from gptoss_nf4.vllm.kernels.arguments import Packed
from gptoss_nf4.vllm.kernels.plan import settle
from gptoss_nf4.vllm.kernels.start import kind_of
from gptoss_nf4.vllm.kernels.variants import META, recorded
from gptoss_nf4.vllm.proving.inputs import Adapters
from gptoss_nf4.vllm.proving.ladder import launches, weaker
from gptoss_nf4.vllm.proving.products import DenseAdapters, Experts, Linear, Product, Router

D = GPT_OSS_20B
DTYPE = torch.float16
MOST_TOKENS = 2048  # vLLM's max_num_batched_tokens on a desktop card
SLICES = (D.q_rows, D.q_rows + D.kv_rows, D.q_rows + 2 * D.kv_rows)
ALL_NUMBERS = [*range(1, 400), *range(400, MOST_TOKENS, 37), 511, 512, 513, 1000, 1024, 1025, 2047, 2048]


def layers(held: int | None, rank: int, here: int, blocks_along: str) -> list[Product]:
    """What the layers of gpt-oss-20b ask for when they are made, and with adapters when vLLM has wrapped them."""
    widths = {"quant_type": "nf4", "dtype": DTYPE, "most_tokens": MOST_TOKENS}
    linear = {"rows": SLICES[-1], "inputs": D.hidden, "blocksize": 64, "bias": True} | widths
    experts = {"hidden": D.hidden, "intermediate": D.intermediate, "w13_blocksize": 64, "w2_blocksize": 64} | widths
    experts |= {"experts": D.experts, "here": here, "top_k": D.experts_per_token}
    experts |= {"w13_blocks_along": blocks_along, "w2_blocks_along": blocks_along}
    router = Router(D.experts, D.hidden, DTYPE, MOST_TOKENS)
    found: list[Product] = [Linear(**linear), Experts(**experts, of_logits=not held), router]
    if held:
        adapters = Adapters(held, rank)
        found += [
            Linear(**linear, adapters=Adapters(held, rank, SLICES)),
            Experts(**experts, w13_adapters=adapters, w2_adapters=adapters),
            DenseAdapters(D.experts, D.hidden, DTYPE, DTYPE, MOST_TOKENS, adapters),
        ]
    return found


def aligned(ids: torch.Tensor, block: int, experts: int, expert_map: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Tensors as vLLM's `moe_align_block_size` returns them; it has no form for the meta device."""
    slots = torch.empty(ids.numel() + experts * (block - 1), dtype=torch.int32, device=META)
    return slots, torch.empty(len(slots) // block + 1, dtype=torch.int32, device=META), slots.new_empty(1)


class Server:
    """Calls the operators as vLLM does, on tensors of the real shapes without memory."""

    def __init__(self, held: int | None, rank: int, here: int, blocks_along: str):
        self.qkv = packed(1, SLICES[-1], D.hidden, DTYPE, 64)
        self.w13 = packed(here, 2 * D.intermediate, D.hidden, DTYPE, 64, blocks_along)
        self.w2 = packed(here, D.hidden, D.intermediate, DTYPE, 64, blocks_along)
        self.expert_map = None if here == D.experts else torch.empty(D.experts, dtype=torch.int32, device=META)
        self.held = held
        if held:
            self.adapters = torch.empty(MOST_TOKENS, dtype=torch.int64, device=META)
            shapes = {
                "qkv": (1, 3 * rank, D.hidden, SLICES[-1]),
                "router": (1, rank, D.hidden, D.experts),
                "w13": (here, rank, D.hidden, 2 * D.intermediate),
                "w2": (here, rank, D.intermediate, D.hidden),
            }
            self.stacks = {
                name: (
                    torch.empty(held, experts, ranks, inputs, dtype=DTYPE, device=META),
                    torch.empty(held, experts, rows, rank, dtype=DTYPE, device=META),
                )
                for name, (experts, ranks, inputs, rows) in shapes.items()
            }

    def step(self, tokens: int, no_lora: bool) -> None:
        x = torch.empty(tokens, D.hidden, dtype=DTYPE, device=META)
        weights = torch.empty(tokens, D.experts_per_token, device=META)
        ids = torch.empty(tokens, D.experts_per_token, dtype=torch.int32, device=META)
        routed = x, weights, ids, self.expert_map, D.experts
        both = *fields(self.w13, "w13_"), *fields(self.w2, "w2_")
        # Any power of two that a layer finds when it is loaded: no variant of its own.
        along = {"w13_absmax_factor": 64.0, "w2_absmax_factor": 0.5}
        along |= {"w13_blocks_along": self.w13.blocks_along, "w2_blocks_along": self.w2.blocks_along}
        flag = torch.tensor([no_lora])
        logits = torch.empty(tokens, D.experts, dtype=DTYPE, device=META)
        plain(ops.router)(x, torch.empty(D.experts, D.hidden, dtype=DTYPE, device=META), logits[0])
        if not self.held:
            plain(ops.packed_linear)(x, *self.qkv[:3], SLICES[-1], 64, "nf4")
            for is_padding in (None, torch.empty(MOST_TOKENS, dtype=torch.bool, device=META)):
                chosen = x, logits, D.experts_per_token, is_padding, self.expert_map
                plain(ops.packed_experts_of_logits)(*chosen, **dict(both), quant_type="nf4", **along)
            return
        plain(ops.packed_linear_with_adapters)(
            x, *self.qkv[:3], SLICES[-1], 64, "nf4", self.adapters, flag, *self.stacks["qkv"], [*SLICES]
        )
        plain(ops.add_adapters)(logits, x, self.adapters, flag, *self.stacks["router"], [])
        stacks = *self.stacks["w13"], *self.stacks["w2"]
        plain(ops.packed_experts_with_adapters)(
            torch.empty_like(x), *routed, *dict(both).values(), "nf4", self.adapters, flag, *stacks, 1 / 64, **along
        )


def fields(packed: Packed, prefix: str) -> list[tuple[str, object]]:
    names = ("codes", "absmax", "bias", "blocksize")
    return [(f"{prefix}{name}", getattr(packed, name)) for name in names]


def plain(operator):
    """The function of an operator: torch would call its fake on meta tensors."""
    return operator._init_fn


QUICK = [(86, None, 0, 32, INPUTS)]
CASES = [(None, 0, 16, INPUTS), (1, 16, 32, INPUTS), (4, 64, 32, INPUTS), (2, 8, 16, INPUTS)]
CASES += [(None, 0, 32, OUTPUTS), (4, 64, 16, OUTPUTS)]
THOROUGH = [*product((86,), CASES), *product((80, 90), [(None, 0, 32, INPUTS), (4, 64, 16, OUTPUTS)])]


@pytest.mark.parametrize(
    ("capability", "held", "rank", "here", "blocks_along"),
    [*QUICK, *(pytest.param(capability, *case, marks=pytest.mark.slow) for capability, case in THOROUGH)],
)
def test_what_is_launched_was_compiled_at_the_start(capability, held, rank, here, blocks_along, monkeypatch):
    monkeypatch.setattr(ops, "moe_align_block_size", aligned)
    # Without memory, torch works out in Python what comes of these, which takes longer than all else.
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, weight, bias: x.new_empty(len(x), len(weight)))
    monkeypatch.setattr(torch.Tensor, "clamp", lambda ids, min: ids)
    server = Server(held, rank, here, blocks_along)
    for gpu, _ in weaker(GPUS[capability]):
        known = {
            key for layer in layers(held, rank, here, blocks_along) for key in keys_of(launches(layer, gpu), capability)
        }
        settle(META, gpu)
        with recorded() as served:
            for no_lora, tokens in product((False, True) if held else (True,), ALL_NUMBERS):
                server.step(tokens, no_lora)
        keys = keys_of(served, capability)
        asked = set(keys)
        assert asked <= known, sorted(asked - known)
        assert len(asked) > 15  # and not because nothing was launched
        assert len(known - asked) <= 2, sorted(known - asked)  # nor is much compiled for nothing
        # `start_kernel` starts again what it takes for the same: Triton takes it for the same too.
        kinds = [kind_of(launch.function, (), launch.arguments) for launch in served]
        assert len(set(zip(kinds, keys, strict=True))) == len(set(kinds)) < len(served) / 4
