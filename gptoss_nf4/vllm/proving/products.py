"""What the layers compute with our kernels, on real widths, to be compiled and tried.

Trials take the widths of the layer: so what they run are the variants that the model runs. They take few tokens and two
experts, random codes (`inputs`), and a reference in float32.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import linear

from gptoss_nf4.format.blocks import INPUTS
from gptoss_nf4.vllm.activation import clamped_swiglu
from gptoss_nf4.vllm.kernels import experts_launch, linear_launch
from gptoss_nf4.vllm.kernels.arguments import Packed
from gptoss_nf4.vllm.kernels.lora import Factors
from gptoss_nf4.vllm.kernels.plan import MAX_LINEAR_ROWS, Plan, gpu_of, plan_experts
from gptoss_nf4.vllm.kernels.routing import choose
from gptoss_nf4.vllm.kernels.sort import local_experts
from gptoss_nf4.vllm.kernels.variants import META
from gptoss_nf4.vllm.proving.inputs import Adapters, Draw, worst

EXPERTS = 2  # of this rank that a trial uses
SOME_TOKENS = 3


class Product(ABC):
    """What a layer computes. Products that are equal start the same kernels."""

    most_tokens: int
    """Of a step."""
    without: ClassVar[str] = "dequantizing all weights in every step: one takes 6 to 9 times as long"
    """What serves instead of our kernels, and what that costs (NOTES.md)."""

    @abstractmethod
    def start(self, tokens: int) -> None:
        """Start the kernels for so many tokens, on tensors of the meta device: only to be recorded."""

    @abstractmethod
    def errors(self, device: torch.device) -> Iterator[tuple[str, float]]:
        """Run every kernel once: which one, and how far its worst result is off, in units of the results' size."""


@dataclass(frozen=True)
class Linear(Product):
    """A linear layer of 4-bit weights, with adapters or without."""

    rows: int
    inputs: int
    blocksize: int
    quant_type: str
    dtype: torch.dtype
    bias: bool
    most_tokens: int
    adapters: Adapters | None = None

    def start(self, tokens: int) -> None:
        draw = Draw.on(META)
        packed, _, _ = self._weight(draw)
        x = draw.normal(tokens, self.inputs).to(self.dtype)
        linear_launch.linear(x, packed, self.rows, factors=self._factors(tokens, draw))

    def errors(self, device: torch.device) -> Iterator[tuple[str, float]]:
        draw = Draw.on(device)
        packed, dense, bias = self._weight(draw)
        seen = set()
        for tokens in range(1, MAX_LINEAR_ROWS + 2):
            plan = linear_launch.plan_of(tokens, packed)
            if plan in seen:
                continue
            seen.add(plan)
            x = draw.normal(tokens, self.inputs).to(self.dtype)
            factors = self._factors(tokens, draw)
            expected = linear(x.float(), dense[0], bias[0] if self.bias else None)
            if factors is not None and self.adapters is not None:
                expected += self.adapters.delta(factors, x) * (factors.adapters >= 0)[:, None]
            yield (
                f"a linear layer of {tokens} rows",
                worst(linear_launch.linear(x, packed, self.rows, factors=factors), expected),
            )

    def _weight(self, draw: Draw) -> tuple[Packed, torch.Tensor, torch.Tensor]:
        packed, dense, bias = draw.weight(1, self.rows, self.inputs, self.blocksize, self.quant_type, self.dtype)
        return packed if self.bias else packed._replace(bias=None), dense, bias

    def _factors(self, tokens: int, draw: Draw) -> Factors | None:
        if self.adapters is None:
            return None
        return self.adapters.factors(1, self.rows, self.inputs, tokens, self.dtype, draw)


@dataclass(frozen=True)
class DenseAdapters(Product):
    """What adapters add to a linear layer of 16 bits. `out_dtype` is that of the layer's results."""

    rows: int
    inputs: int
    dtype: torch.dtype
    out_dtype: torch.dtype
    most_tokens: int
    adapters: Adapters

    def start(self, tokens: int) -> None:
        draw = Draw.on(META)
        self._run(tokens, draw)

    def errors(self, device: torch.device) -> Iterator[tuple[str, float]]:
        draw = Draw.on(device)
        for tokens in (SOME_TOKENS, MAX_LINEAR_ROWS + 1):
            out, x, factors = self._run(tokens, draw)
            expected = self.adapters.delta(factors, x) * (factors.adapters >= 0)[:, None]
            yield f"adapters of a dense layer of {tokens} rows", worst(out, expected)

    def _run(self, tokens: int, draw: Draw) -> tuple[torch.Tensor, torch.Tensor, Factors]:
        x = draw.normal(tokens, self.inputs).to(self.dtype)
        factors = self.adapters.factors(1, self.rows, self.inputs, tokens, self.dtype, draw)
        out = torch.zeros(tokens, self.rows, dtype=self.out_dtype, device=draw.device)
        linear_launch.add_adapters(out, x, factors)
        return out, x, factors


@dataclass(frozen=True)
class Router(Product):
    """The dense layer that gives each token a logit for every expert."""

    without: ClassVar[str] = "vLLM's product for the router: 4 us a layer more"
    experts: int
    hidden: int
    dtype: torch.dtype
    most_tokens: int

    def start(self, tokens: int) -> None:
        self._run(tokens, Draw.on(META))

    def errors(self, device: torch.device) -> Iterator[tuple[str, float]]:
        result, expected = self._run(SOME_TOKENS, Draw.on(device))
        yield f"the router of {SOME_TOKENS} tokens", worst(result, expected)

    def _run(self, tokens: int, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
        """Result and reference."""
        shapes = (tokens, self.hidden), (self.experts, self.hidden), (self.experts,)
        x, weight, bias = (draw.normal(*shape).to(self.dtype) for shape in shapes)
        return linear_launch.router(x, weight, bias), linear(x.float(), weight.float(), bias.float())


@dataclass(frozen=True)
class Experts(Product):
    """Both products of the experts of a layer, from routing to sum, with adapters or without."""

    hidden: int
    intermediate: int
    """Of this rank."""
    w13_blocksize: int
    w2_blocksize: int
    quant_type: str
    dtype: torch.dtype
    experts: int
    """Global number."""
    here: int
    """How many of them this rank has; where it has not all, an expert map says which."""
    top_k: int
    most_tokens: int
    of_logits: bool = False
    """The kernels choose each token's experts; else they are told. Without adapters only."""
    w13_adapters: Adapters | None = None
    w2_adapters: Adapters | None = None
    w13_blocks_along: str = INPUTS
    w2_blocks_along: str = INPUTS

    def start(self, tokens: int) -> None:
        draw = Draw.on(META)
        for padded in (True, False) if self.of_logits else (True,):  # vLLM does not always tell which tokens exist
            self._run(tokens, draw, *self._weights(draw), padded=padded)

    def errors(self, device: torch.device) -> Iterator[tuple[str, float]]:
        draw = Draw.on(device)
        w13, w2 = self._weights(draw)
        plans = {
            plan_experts(tokens, self.top_k, self.experts, gpu_of(device)): tokens
            for tokens in range(self.most_tokens, 0, -1)
        }
        for plan, least in plans.items():
            for tokens in {min(least, SOME_TOKENS), SOME_TOKENS}:  # one token alone is not sorted
                result, expected = self._run(tokens, draw, w13, w2, plan)
                yield f"experts of {tokens} tokens by {plan}", worst(result, expected)
        if self.of_logits:
            logits = draw.normal(SOME_TOKENS, self.experts).to(self.dtype)
            weights, ids = choose(logits, self.top_k, early=gpu_of(device).starts_early)
            largest = torch.topk(logits.float(), self.top_k)[0]
            yield "the choice of experts", worst(logits.float().gather(1, ids.long()), largest)
            yield "the weights of experts", worst(weights, torch.softmax(largest, -1))

    @property
    def _used(self) -> int:
        """Experts of this rank that a trial uses. A token never chooses one twice by itself."""
        return max(EXPERTS, self.top_k) if self.of_logits else EXPERTS

    def _weights(self, draw: Draw) -> tuple[tuple, tuple]:
        shared = self.quant_type, self.dtype
        w13 = self._used, 2 * self.intermediate, self.hidden, self.w13_blocksize, *shared
        w2 = self._used, self.hidden, self.intermediate, self.w2_blocksize, *shared
        return (
            draw.weight(*w13, gate_and_up=True, blocks_along=self.w13_blocks_along),
            draw.weight(*w2, blocks_along=self.w2_blocks_along),
        )

    def _run(
        self, tokens: int, draw: Draw, w13: tuple, w2: tuple, plan: Plan | None = None, padded: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Result and reference. Where there is an expert map, global number 0 is another rank's, 1 is the first here."""
        away = int(self.here < self.experts)
        local_numbers = torch.arange(self.experts, dtype=torch.int32, device=draw.device) - away
        expert_map = local_numbers if away else None
        x = draw.normal(tokens, self.hidden).to(self.dtype)
        if self.of_logits:
            return self._run_of_logits(x, local_numbers, expert_map, draw, w13, w2, plan, padded)
        ids = draw.below(min(EXPERTS + away, self.experts), tokens, self.top_k)
        weights = draw.normal(tokens, self.top_k).abs()
        if draw.device != META and tokens > 1:
            ids[-1, -1] = -1  # as where vLLM fills up a batch
        w13_factors = w2_factors = None
        if self.w13_adapters is not None and self.w2_adapters is not None:
            local = local_experts(ids, expert_map)
            made = tokens, self.dtype, draw
            w13_factors = self.w13_adapters.factors(self.here, 2 * self.intermediate, self.hidden, *made)
            w2_factors = self.w2_adapters.factors(self.here, self.hidden, self.intermediate, *made)
            w13_factors, w2_factors = w13_factors._replace(experts=local), w2_factors._replace(experts=local)
        routed = x, weights, ids, expert_map, self.experts
        result = experts_launch.routed_experts(*routed, w13[0], w2[0], _aligned, None, w13_factors, w2_factors, plan)
        if draw.device == META:
            return result, result
        return result, self._reference(x, weights, ids, local_numbers, w13, w2, w13_factors, w2_factors)

    def _run_of_logits(
        self,
        x: torch.Tensor,
        local_numbers: torch.Tensor,
        expert_map: torch.Tensor | None,
        draw: Draw,
        w13: tuple,
        w2: tuple,
        plan: Plan | None,
        padded: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `_run`; if `padded`, the last of several tokens only fills up the batch."""
        tokens = len(x)
        logits = draw.normal(tokens, self.experts).to(self.dtype)
        is_padding = torch.zeros(tokens, dtype=torch.bool, device=draw.device) if padded else None
        if draw.device != META:
            logits[:, (local_numbers >= self._used).nonzero().flatten()] = -100  # of which the trial has no weights
            if is_padding is not None:
                is_padding[1:][-1:] = True
        packed = w13[0], w2[0]
        result = experts_launch.experts_of_logits(x, logits, self.top_k, is_padding, expert_map, *packed, _aligned, plan)
        if draw.device == META:
            return result, result
        largest, ids = torch.topk(logits.float(), self.top_k)
        if is_padding is not None:
            ids[is_padding] = -1
        weights = torch.softmax(largest, -1)
        return result, self._reference(x, weights, ids, local_numbers, w13, w2, None, None)

    def _reference(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor,
        local_numbers: torch.Tensor,
        w13: tuple,
        w2: tuple,
        w13_factors: Factors | None,
        w2_factors: Factors | None,
    ) -> torch.Tensor:
        expected = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for token, choice in (ids >= 0).nonzero().tolist():
            expert = int(local_numbers[ids[token, choice]])
            if expert < 0:
                continue
            row = x[token].float()
            gate_up = linear(row, w13[1][expert], w13[2][expert])
            adapted = w13_factors is not None and int(w13_factors.adapters[token]) >= 0
            if adapted and w13_factors is not None and self.w13_adapters is not None:
                gate_up += self.w13_adapters.delta(w13_factors, row, expert)
            middle = clamped_swiglu(gate_up)
            down = linear(middle, w2[1][expert], w2[2][expert])
            if adapted and w2_factors is not None and self.w2_adapters is not None:
                down += self.w2_adapters.delta(w2_factors, middle, expert)
            expected[token] += down * weights[token, choice]
        return expected


def _aligned(ids: torch.Tensor, block: int, experts: int, expert_map: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Stands for the caller's sorting of many slots, on the meta device: tensors of its dtypes."""
    any_number = torch.empty(1, dtype=torch.int32, device=META)
    return any_number, any_number, any_number
