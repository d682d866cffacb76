"""What the kernels compile to for a GPU that need not be here.

    python -m benchmarks.machine_code [86]

Every launch that gpt-oss-20b makes, without adapters and with them, is recorded and compiled for the compute capability:
registers, spills, shared memory, the machine instructions of the innermost loop per 4-bit weight, and how often that loop
waits for Hopper's matrix instructions. Experts come with blocks along the inputs and along the outputs.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

from benchmarks.tables import markdown
from benchmarks.weights import GPT_OSS_20B
from gptoss_nf4.format.blocks import DIRECTIONS, INPUTS, OUTPUTS
from gptoss_nf4.format.dimensions import Dimensions
from gptoss_nf4.vllm.kernels import experts_launch, head_launch, linear_launch, tiles, variants
from gptoss_nf4.vllm.kernels.arguments import Packed, Weight
from gptoss_nf4.vllm.kernels.lora import Factors, Lora
from gptoss_nf4.vllm.kernels.plan import Gpu, settle
from gptoss_nf4.vllm.kernels.twelve_bits import PLANES, WORDS, TwelveBits
from gptoss_nf4.vllm.kernels.variants import META

# By compute capability: A100, RTX 3090, H100, RTX 5090.
GPUS = {
    80: Gpu(wgmma=False, shared_bytes=164 * 1024, starts_early=False, multiprocessors=108),
    86: Gpu(wgmma=False, shared_bytes=100 * 1024, starts_early=False, multiprocessors=82),
    90: Gpu(wgmma=True, shared_bytes=228 * 1024, starts_early=True, multiprocessors=132),
    120: Gpu(wgmma=False, shared_bytes=100 * 1024, starts_early=True, multiprocessors=170),
}
TOKENS = (1, 8, 32, 64, 96, 128, 256, 2048)
LINEAR_ROWS = (1, 16, 32, 64, 65)
LORA_RANKS = (16, 64)
# Tiles that a warp decodes in an iteration of its loop.
TILES = {
    "small.linear": 1,
    "small.swiglu_experts": 2,
    "small.down_experts": 2,
    "large.swiglu_experts": 2,
    "large.down_experts": 2,
    "large.linear": 2,
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Launch(variants.Launch):
    """A launch, and what it compiles to."""

    @property
    def label(self) -> str:
        """The kernel and all that tells its variants apart."""
        tensors = {name: value for name, value in self.arguments.items() if isinstance(value, torch.Tensor)}
        dtypes = [f"{name} {tensor.dtype}" for name, tensor in tensors.items() if tensor.is_floating_point()]
        constants = [parameter.name for parameter in self.function.params if parameter.is_constexpr]
        settings = [f"{name} {self.arguments[name]}" for name in constants]
        weight = self.arguments.get("weight")
        if isinstance(weight, Weight) and weight.ROW_TILES_PER_BLOCK.value:
            settings.append("blocks along the outputs")
        if isinstance(lora := self.arguments.get("lora"), Lora):
            settings.append(f"LoRA of rank {lora.RANK.value}, {len(lora.ends)} slices")
        if self.arguments.get("routing") is not None and self.arguments["routing"].slots is None:
            settings.append("one slot a block")
        return f"{self.kernel} ({', '.join(dtypes + settings)})".replace("torch.", "")

    @property
    def decoded(self) -> int | None:
        """Weights that a lane decodes in an iteration of the kernel's loop; None where it has no such loop."""
        if self.kernel == "head.product":
            return 8 * WORDS * (2 if self.arguments["TWO"] else 1)
        if self.kernel == "head_large.product":
            return 8 * WORDS * self.arguments["TILES"] // self.arguments["num_warps"]
        tiles_a_warp = TILES.get(self.kernel)
        return tiles_a_warp and 8 * self.arguments["weight"].S.value * tiles_a_warp

    def compiled(self, capability: int) -> CompiledKernel:
        """As Triton compiles it when it is launched on a GPU of this compute capability."""
        with mock.patch.object(driver, "_active", AbsentDriver(capability)):
            return self.function.warmup(**self.arguments, grid=(1,))


@dataclass(frozen=True)
class AbsentDriver:
    """What Triton asks a driver before it compiles."""

    capability: int

    def get_current_device(self) -> str:
        return f"absent sm_{self.capability}"  # Triton keeps compiled kernels by device: not with those of a real one

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def launches(
    d: Dimensions,
    dtype: torch.dtype,
    gpu: Gpu,
    blocksize: int = 64,
    lora_rank: int | None = None,
    blocks_along: str = INPUTS,
) -> list[Launch]:
    """Every launch of a model that differs from the others by its kernel or settings. lora_rank: with adapters.

    blocks_along: of the experts.
    """
    found = launches_of(d, dtype, gpu, TOKENS, LINEAR_ROWS, blocksize, lora_rank, blocks_along)
    return list({each.label: each for each in found}.values())


def launches_of(
    d: Dimensions,
    dtype: torch.dtype,
    gpu: Gpu,
    batches: Sequence[int],
    linear_rows: Sequence[int],
    blocksize: int = 64,
    lora_rank: int | None = None,
    blocks_along: str = INPUTS,
) -> list[Launch]:
    """The launches of a layer in their order: of the experts for each of `batches`, of q/k/v and o for `linear_rows`."""
    w13 = packed(d.experts, 2 * d.intermediate, d.hidden, dtype, blocksize, blocks_along)
    w2 = packed(d.experts, d.hidden, d.intermediate, dtype, blocksize, blocks_along)
    qkv = packed(1, d.q_rows + 2 * d.kv_rows, d.hidden, dtype, blocksize)
    o = packed(1, d.hidden, d.q_rows, dtype, blocksize)
    top_k, experts = d.experts_per_token, d.experts
    w13_factors = w2_factors = qkv_factors = o_factors = router_factors = None
    if lora_rank:
        w13_factors = _factors(lora_rank, experts, [2 * d.intermediate], d.hidden, dtype)
        w2_factors = _factors(lora_rank, experts, [d.hidden], d.intermediate, dtype)
        router_factors = _factors(lora_rank, 1, [experts], d.hidden, dtype)
        o_factors = _factors(lora_rank, 1, [d.hidden], d.q_rows, dtype)
        qkv_factors = _factors(lora_rank, 1, [d.q_rows, d.kv_rows, d.kv_rows], d.hidden, dtype)
    settle(META, gpu)
    with variants.recorded() as found:
        for tokens in batches:
            x = torch.empty(tokens, d.hidden, dtype=dtype, device=META)
            logits = torch.empty(tokens, experts, dtype=dtype, device=META)
            if w13_factors is None:
                experts_launch.experts_of_logits(x, logits, top_k, None, None, w13, w2, _aligned)
                continue
            topk_weights = torch.empty(tokens, top_k, device=META)
            topk_ids = torch.empty(tokens, top_k, dtype=torch.int32, device=META)
            routed = x, topk_weights, topk_ids, None, experts
            experts_launch.routed_experts(*routed, w13, w2, _aligned, None, w13_factors, w2_factors)
        for rows in linear_rows:
            x = torch.empty(rows, d.hidden, dtype=dtype, device=META)
            linear_launch.router(x, torch.empty(experts, d.hidden, dtype=dtype, device=META), bias=x.new_empty(experts))
            linear_launch.linear(x, qkv, d.q_rows + 2 * d.kv_rows, factors=qkv_factors)
            linear_launch.linear(torch.empty(rows, d.q_rows, dtype=dtype, device=META), o, d.hidden, factors=o_factors)
            if router_factors is not None:
                linear_launch.add_adapters(torch.empty(rows, experts, dtype=dtype, device=META), x, router_factors)
    return [Launch(each.function, each.arguments, each.grid) for each in found]


def _aligned(ids: torch.Tensor, block: int, experts: int, expert_map: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Stands for vLLM's sorting of many slots: tensors of its dtypes, and as many blocks."""
    numbers = torch.empty(experts + ids.numel() // block, dtype=torch.int32, device=META)
    return numbers, numbers, numbers[:1]


def head_launches(d: Dimensions, dtype: torch.dtype, gpu: Gpu) -> list[Launch]:
    """Every launch for a head in 12 bits."""
    row_tiles, input_tiles = tiles.padded_rows(d.vocabulary) // tiles.ROWS, d.hidden // tiles.MAX_INPUTS

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device=META)

    words = empty(row_tiles, input_tiles, PLANES, tiles.LANES, WORDS)
    escapes = 1000
    lists = empty(row_tiles + 1), empty(escapes), empty(escapes, dtype=dtype)
    scale = 1024.0 if dtype == torch.float16 else 1.0
    packed = TwelveBits(words, empty(row_tiles, 2), *lists, d.vocabulary, scale)
    settle(META, gpu)
    with variants.recorded() as found:
        for rows in head_launch.VARIANTS:
            head_launch.linear(empty(rows, d.hidden, dtype=dtype), packed)
        head_launch.dequantize(packed, 0, head_launch.DENSE_ROWS)
    made = [Launch(each.function, each.arguments, each.grid) for each in found]
    return list({each.label: each for each in made}.values())


def packed(experts: int, rows: int, columns: int, dtype: torch.dtype, blocksize: int, blocks_along: str = INPUTS) -> Packed:
    """A weight without memory, for activations in `dtype`."""
    across = blocks_along == OUTPUTS
    inputs = tiles.tile_inputs_across(columns) if across else tiles.tile_inputs(blocksize)
    row_tiles, words = rows // tiles.ROWS, inputs // tiles.ROWS
    codes = torch.empty(experts, row_tiles, columns // inputs, tiles.LANES, words, dtype=torch.int32, device=META)
    shape = (rows // blocksize, columns) if across else (row_tiles, columns // blocksize, tiles.ROWS)
    absmax = torch.empty(experts, *shape, dtype=dtype if across else torch.float16, device=META)
    bias = torch.empty(experts, rows, dtype=dtype, device=META)
    return Packed(codes, absmax, bias, blocksize, "nf4", blocks_along)


def _factors(rank: int, experts: int, slices: list[int], inputs: int, dtype: torch.dtype) -> Factors:
    adapters = 4
    a = torch.empty(adapters, experts, len(slices) * rank, inputs, dtype=dtype, device=META)
    b = torch.empty(adapters, experts, sum(slices), rank, dtype=dtype, device=META)
    of_tokens = torch.empty(max(TOKENS), dtype=torch.int64, device=META)
    of_slots = None if experts == 1 else torch.empty(1, dtype=torch.int32, device=META)
    return Factors(a, b, of_tokens, of_slots, tuple(accumulate(slices)))


@dataclass(frozen=True)
class Resources:
    """What a launch takes of the GPU."""

    label: str
    registers: int
    """Of a thread."""
    spilled_bytes: int
    """Of a thread's stack; a Triton kernel uses one for nothing else."""
    static_bytes: int
    """Shared memory of a program that its machine code declares: `lookup`'s table, and 1 KiB of CUDA's on Hopper."""
    dynamic_bytes: int
    """Shared memory of a program that Triton allocates."""


def resources(each: Launch, compiled: CompiledKernel) -> Resources:
    said = disassembled(compiled, "-res-usage")
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED):(\d+)", said)}
    return Resources(each.label, usage["REG"], usage["STACK"], usage["SHARED"], compiled.metadata.shared)


def disassembled(compiled: CompiledKernel, what: str) -> str:
    """What cuobjdump says; `what` is one of its options."""
    return _told(compiled.asm["cubin"], what)


@lru_cache(maxsize=256)  # half a second for each, and some are asked for again and again
def _told(cubin: bytes, what: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([CUOBJDUMP, what, file.name], capture_output=True, text=True, check=True).stdout


def instructions(sass: str) -> list[tuple[int, str, str]]:
    """Of a kernel's machine code: address, opcode with modifiers, and operands."""
    lines = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", sass, re.MULTILINE)
    return [(int(address, 16), opcode, operands.strip()) for address, opcode, operands in lines]


def loops(code: list[tuple[int, str, str]]) -> list[tuple[int, int]]:
    """First and last address of each loop: from the target of a backward branch to the branch."""
    found = []
    for end, opcode, operands in code:
        target = re.search(r"(0x[0-9a-f]+)$", operands)
        if opcode.startswith("BRA") and target and int(target[1], 16) < end:
            found.append((int(target[1], 16), end))
    return found


def inner_loops(code: list[tuple[int, str, str]]) -> list[tuple[int, int]]:
    """First and last address of each loop that has no other within."""
    found = loops(code)
    return [one for one in found if not any(one != other and one[0] <= other[0] and other[1] <= one[1] for other in found)]


def main_loop(code: list[tuple[int, str, str]]) -> tuple[int, int] | None:
    """First and last address of the longest innermost loop."""
    return max(inner_loops(code), key=lambda loop: loop[1] - loop[0], default=None)


def loop_length(sass: str) -> int | None:
    """Instructions of the main loop."""
    code = instructions(sass)
    loop = main_loop(code)
    return loop and sum(loop[0] <= address <= loop[1] for address, _, _ in code)


def waits(code: list[tuple[int, str, str]]) -> tuple[int, int]:
    """Of the innermost loop with the most wgmma instructions: how often it waits for them, and how many it has.

    With tiles of 64 inputs a product of ours has four of them and waits twice. If it waits as often as it has them, the
    compiler has serialized them; ptxas -v says why (C7510 to C7519).
    """

    def count(loop: tuple[int, int], opcode: str) -> int:
        return sum(loop[0] <= address <= loop[1] and op.startswith(opcode) for address, op, _ in code)

    products, waited = max(
        ((count(loop, "HGMMA"), count(loop, "WARPGROUP.DEPBAR")) for loop in inner_loops(code)), default=(0, 0)
    )
    return waited, products


def main() -> None:
    capability = int(sys.argv[1]) if len(sys.argv) > 1 else 86
    if capability not in GPUS:
        known = ", ".join(map(str, GPUS))
        sys.exit(f"error: benchmarks.machine_code: compute capability: got {capability}, expected one of {known}")
    rows, gpu = [], GPUS[capability]
    found = [
        launches(GPT_OSS_20B, torch.bfloat16, gpu, lora_rank=rank, blocks_along=along)
        for along in DIRECTIONS
        for rank in (None, *LORA_RANKS)
    ]
    found += [head_launches(GPT_OSS_20B, dtype, gpu) for dtype in (torch.bfloat16, torch.float16)]
    for each in {each.label: each for each in chain(*found)}.values():
        compiled = each.compiled(capability)
        sass = disassembled(compiled, "-sass")
        r, loop = resources(each, compiled), loop_length(sass)
        a_weight = f"{loop / each.decoded:.2f}" if loop and each.decoded else None
        waited, products = waits(instructions(sass))
        wgmma = f"{waited} of {products}" if products else None
        rows.append([each.label, r.registers, r.spilled_bytes, r.static_bytes + r.dynamic_bytes, loop, a_weight, wgmma])
    columns = ["kernel", "registers", "spilled bytes", "shared bytes", "loop", "instructions a weight", "waits of wgmma"]
    print(markdown(columns, rows))


if __name__ == "__main__":
    main()
