"""Random inputs of a trial, on the device or on `meta`, and how far a result is off.

The codebook comes from `gptoss_nf4.format.codec`: what weights mean shares nothing with the kernels but their order.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch.nn.functional import linear, pad

from gptoss_nf4.format.blocks import INPUTS, OUTPUTS, absmax_shape
from gptoss_nf4.format.codec import CODEBOOKS
from gptoss_nf4.vllm.kernels import tiles
from gptoss_nf4.vllm.kernels.arguments import Packed
from gptoss_nf4.vllm.kernels.lora import Factors
from gptoss_nf4.vllm.kernels.variants import META


def alike(number: int) -> int:
    """A small number for which Triton compiles as it does for `number`: it tells 1, and what 16 divides, from the rest."""
    return 1 if number == 1 else 16 if number % 16 == 0 else 2


@dataclass(frozen=True)
class Adapters:
    """Stacks of adapters of a weight, as `kernels.lora.Factors` has them."""

    held: int
    rank: int
    ends: tuple[int, ...] = ()

    def factors(self, experts: int, rows: int, inputs: int, tokens: int, dtype: torch.dtype, draw: "Draw") -> Factors:
        """Random ones, of few adapters and experts but on `meta`. Tokens ask for the last, for none, and so on."""
        slices = max(1, len(self.ends))
        held, experts = (self.held, experts) if draw.device == META else (alike(self.held), alike(experts))
        a = draw.normal(held, experts, slices * self.rank, inputs) / inputs**0.5
        b = draw.normal(held, experts, rows, self.rank) / self.rank**0.5
        asked_for = held - 1 - held * (torch.arange(tokens, device=draw.device) % 2)
        return Factors(a.to(dtype), b.to(dtype), asked_for, ends=self.ends)

    def delta(self, factors: Factors, x: torch.Tensor, expert: int = 0) -> torch.Tensor:
        """float32 [tokens, rows]: what the last adapter adds for each row of x."""
        a, b = factors.a[-1, expert].float(), factors.b[-1, expert].float()
        ends = self.ends or (len(b),)
        starts = (0, *ends)
        parts = [
            linear(linear(x.float(), part), b[start:end])
            for part, start, end in zip(a.chunk(len(ends)), starts, ends, strict=False)
        ]
        return torch.cat(parts, dim=-1) * factors.scale


@dataclass(frozen=True)
class Draw:
    """Random tensors on a device, always the same, that leave torch's own generator as it is. On `meta`: empty ones."""

    device: torch.device
    generator: torch.Generator | None

    @classmethod
    def on(cls, device: torch.device) -> "Draw":
        return cls(device, None if device == META else torch.Generator(device).manual_seed(0))

    def normal(self, *shape: int) -> torch.Tensor:
        empty = torch.empty(shape, dtype=torch.float32, device=self.device)
        return empty if self.generator is None else empty.normal_(generator=self.generator)

    def below(self, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        empty = torch.empty(shape, dtype=dtype, device=self.device)
        return empty if self.generator is None else empty.random_(0, high, generator=self.generator)

    def weight(
        self,
        experts: int,
        rows: int,
        inputs: int,
        blocksize: int,
        quant_type: str,
        dtype: torch.dtype,
        gate_and_up: bool = False,
        blocks_along: str = INPUTS,
    ) -> tuple[Packed, torch.Tensor, torch.Tensor]:
        """Packed, and what it means in float32: weight [experts, rows, inputs] and bias [experts, rows]."""
        if self.device == META:
            rows = 2 * tiles.padded_rows(rows // 2) if gate_and_up else rows
            return _weight_without_memory(experts, rows, inputs, blocksize, quant_type, dtype, blocks_along)
        codes = self.below(256, experts, rows, inputs // 2, dtype=torch.uint8)
        absmax = (self.normal(*absmax_shape((experts, rows, inputs), blocksize, blocks_along)).abs() + 0.5) / inputs**0.5
        bias = (self.normal(experts, rows) * 0.2).to(dtype)

        def tiled(rows: torch.Tensor) -> torch.Tensor:
            return tiles.gate_and_up_tiles(rows, 1).contiguous() if gate_and_up else rows

        padded = tiled(bias)
        padded = pad(padded, (0, tiles.padded_rows(padded.shape[1]) - padded.shape[1]))
        if blocks_along == OUTPUTS:
            packed_codes, packed_absmax, factor = tiles.pack_across(tiled(codes), absmax, dtype)
            packed = Packed(packed_codes, packed_absmax, padded, blocksize, quant_type, blocks_along, factor)
        else:
            packed = Packed(*tiles.pack(tiled(codes), tiled(absmax), blocksize), padded, blocksize, quant_type)
        book = torch.from_numpy(CODEBOOKS[quant_type]).to(self.device)
        dense = torch.stack([book[torch.stack((each >> 4, each & 15), -1).flatten(-2).int()] for each in codes])
        return packed, dense * absmax.repeat_interleave(blocksize, 1 if blocks_along == OUTPUTS else 2), bias.float()


@cache
def _weight_without_memory(
    experts: int, rows: int, inputs: int, blocksize: int, quant_type: str, dtype: torch.dtype, blocks_along: str
) -> tuple[Packed, torch.Tensor, torch.Tensor]:
    """`Draw.weight` on meta, made once."""
    across = blocks_along == OUTPUTS
    row_tiles = tiles.padded_rows(rows) // tiles.ROWS
    tile = tiles.tile_inputs_across(inputs) if across else tiles.tile_inputs(blocksize)
    codes = torch.empty(experts, row_tiles, inputs // tile, tiles.LANES, tile // tiles.ROWS, dtype=torch.int32, device=META)
    shape = (rows // blocksize, inputs) if across else (row_tiles, inputs // blocksize, tiles.ROWS)
    absmax = torch.empty(experts, *shape, dtype=dtype if across else torch.float16, device=META)
    bias = torch.empty(experts, row_tiles * tiles.ROWS, dtype=dtype, device=META)
    return Packed(codes, absmax, bias, blocksize, quant_type, blocks_along), absmax, bias


def worst(result: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference in units of `expected`'s root mean square; NaN where `result` has one."""
    return float((result.float() - expected).abs().max() / expected.square().mean().sqrt().clamp(min=1e-6))
