"""The kernels: packing is lossless, results against float64, and what they compile to for a GPU that is not here."""

import itertools
import json
import math
import random
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import machine_code
from benchmarks.weights import GPT_OSS_20B
from gptoss_nf4.format.blocks import DIRECTIONS, INPUTS, OUTPUTS
from gptoss_nf4.format.codec import CODEBOOKS
from gptoss_nf4.vllm.kernels import linear_launch, tiles
from gptoss_nf4.vllm.kernels.codebook import best_factor, codebook
from gptoss_nf4.vllm.kernels.plan import Decoding, Large, Plan, Small, plan_experts, plan_linear

ROOT = Path(__file__).parent.parent
LIMITS = {"torch.bfloat16": 4e-3, "torch.float16": 1e-3}
BOTH_PRODUCTS = ("whole", "some skipped")  # one after the other: the first one's rounding is an input of the second
KERNELS = {
    "small.linear",
    "small.swiglu_experts",
    "small.down_experts",
    "large.swiglu_experts",
    "large.down_experts",
    "dense.dequantize",
    "order._order",
    "combine._sum_slots",
    "router._router",
}
WGMMA_KERNELS = {"large.linear"}
ROUTING_KERNELS = {"routing._route", "routing._choose"}
LORA_KERNELS = {
    "sort._sort_slots",
    "shrink.shrink_slots",
    "shrink.shrink_blocks",
    "expand.expand_rows",
    "expand.add_to_row",
}
# Shared memory of a program in all, by compute capability; and what its machine code may declare of it ("CUDA C++
# Programming Guide", "Compute Capabilities"). With both, `shared_memory.ask_when_loaded` asks CUDA for more than 48 KiB.
MAX_SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}
MAX_STATIC_BYTES = 48 * 1024
TWO_REGISTERS = 8  # bytes; kept in memory once in a program, not in its loop


@pytest.mark.parametrize(
    ("batch", "rows", "columns", "inputs"), [((2,), 40, 192, 64), ((), 16, 96, 32), ((3,), 7, 128, 64)]
)
def test_packing_moves_bytes_and_loses_none(batch, rows, columns, inputs):
    codes = torch.randint(0, 256, (*batch, rows, columns // 2), dtype=torch.uint8)
    packed = tiles.pack_codes(codes, inputs)
    assert packed.shape == (*batch, tiles.padded_rows(rows) // 16, columns // inputs, 32, inputs // 16)
    assert torch.equal(tiles.unpack_codes(packed, rows), codes)


def test_a_lane_holds_what_the_tensor_core_wants():
    """The order as PTX documents it: one nibble set, looked for where the formula says."""
    codes = torch.zeros(16, 64, dtype=torch.uint8)  # 16 rows, 128 inputs
    row, column = 13, 64 + 32 + 8 * 3 + 4 * 0 + 2 * 1 + 1
    codes[row, column // 2] = 0x0B  # an odd column is the low nibble
    packed = tiles.pack_codes(codes, 64)
    lane, word, nibble = 4 * (row % 8) + 3, 2, 1 + 2 * (row // 8) + 4 * 1
    assert packed[0, 1, lane, word] == 0x0B << (4 * nibble)
    assert packed.count_nonzero() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-4, 0.01, 1.0, 200.0])
def test_activations_times_absmax_of_inputs_stay_in_float16(dtype, size):
    """Whatever its size, absmax of blocks along the outputs is 1 at most, and as exact as its dtype."""
    absmax = (torch.rand(2, 3, 64) + 0.1) * size  # times ABSMAX_FACTOR normal in float16
    codes = torch.randint(0, 256, (2, 96, 32), dtype=torch.uint8)
    packed, kept, factor = tiles.pack_across(codes, absmax, dtype)
    assert torch.equal(tiles.unpack_codes(packed, 96), codes)
    assert kept.shape == absmax.shape
    assert kept.dtype == dtype
    assert 0.5 < float(kept.max()) <= 1
    assert math.frexp(factor)[0] == 0.5  # a power of two
    off = (kept.double() / factor / absmax.double() - 1).abs().max()
    assert off <= {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]


@pytest.mark.parametrize("absmax", [torch.zeros(1, 2, 32), torch.zeros(0, 2, 32)])
def test_absmax_of_nothing_is_left_as_it_is(absmax):
    assert tiles.fitting_power(absmax.half()) == 1


@pytest.mark.parametrize(("inputs", "tile"), [(2880, 64), (1440, 32), (96, 32), (64, 64)])
def test_tiles_are_whole_where_blocks_run_along_the_outputs(inputs, tile):
    assert tiles.tile_inputs_across(inputs) == tile


def test_gate_and_up_tiles_are_a_permutation_padded_with_zeros():
    rows = torch.arange(1, 2 * 20 + 1).view(1, 40, 1)
    tiled = tiles.gate_and_up_tiles(rows, 1).flatten()
    assert tiled[:16].tolist() == list(range(1, 33, 2))
    assert tiled[16:32].tolist() == list(range(2, 34, 2))
    assert sorted(tiled.tolist())[24:] == list(range(1, 41))
    assert (tiled == 0).sum() == 24


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11)])
def test_the_codebooks_factor_lowers_its_rounding_error(dtype, bits):
    book = torch.from_numpy(CODEBOOKS["nf4"]).double()

    def error(factor: float) -> float:
        return float(((book * factor).to(dtype).double() / factor - book).norm())

    assert error(best_factor("nf4", bits)) < 0.7 * error(1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_codebooks_table_holds_its_values_as_patterns_and_by_bytes(dtype):
    book = codebook("nf4", dtype, torch.device("cpu"))
    values = (torch.from_numpy(CODEBOOKS["nf4"]).double() * book.factor).to(dtype).view(torch.uint16).tolist()
    assert book.table[10, :16].tolist() == values
    for row, lane in itertools.product(range(4), (0, 31)):
        low, high = (int(book.table[plane + row, lane]) & 0xFFFFFFFF for plane in (0, 4))
        for code in range(4):
            assert (low >> 8 * code & 255) | (high >> 8 * code & 255) << 8 == values[4 * row + code]


@pytest.mark.parametrize("capability", machine_code.GPUS)
def test_every_plan_is_among_those_compiled(capability):
    """Whatever the number of tokens, the plan is one that `test_every_launch_fits_the_gpu` compiles."""
    d, gpu = GPT_OSS_20B, machine_code.GPUS[capability]

    def plans(tokens: Iterable[int]) -> set[Plan]:
        return {plan_experts(each, d.experts_per_token, d.experts, gpu) for each in tokens}

    assert plans(range(1, 20000)) == plans(machine_code.TOKENS)
    for outputs, inputs in ((d.q_rows + 2 * d.kv_rows, d.hidden), (d.hidden, d.q_rows)):
        size = outputs // tiles.ROWS, inputs // tiles.tile_inputs(64)
        compiled = {plan_linear(rows, *size, gpu) for rows in machine_code.LINEAR_ROWS}
        assert {plan_linear(rows, *size, gpu) for rows in range(1, 200)} == compiled


@pytest.mark.parametrize("multiprocessors", [16, 114, 132, 144])
def test_parts_of_a_linear_layer_are_whole_tiles_that_run_at_once(multiprocessors):
    gpu = replace(machine_code.GPUS[90], multiprocessors=multiprocessors)
    split = set()
    for row_tiles, input_tiles in itertools.product(
        (1, 7, 8, 9, 40, 80, 160, 180, 320, 999, 2500), (1, 3, 4, 9, 45, 64, 139)
    ):
        plan = plan_linear(64, row_tiles, input_tiles, gpu)
        if isinstance(plan, Small):
            continue
        programs = math.ceil(row_tiles / 8)
        assert 1 <= plan.parts <= input_tiles
        assert plan.parts == 1 or plan.stages * plan.parts <= input_tiles
        assert plan.parts == 1 or plan.parts * programs <= 2 * multiprocessors
        assert plan.parts * programs >= 1.5 * multiprocessors
        split.add(plan.parts)
    assert max(split) > 1


def test_programs_share_the_inputs_where_that_was_faster():
    """q/k/v and o of 33 to 64 rows, on one GPU and as one of two has them."""
    gpu = machine_code.GPUS[90]
    assert plan_linear(40, 320, 45, gpu) == Large(rows=64, stages=4, parts=6)
    assert plan_linear(40, 180, 64, gpu) == Large(rows=64, stages=4, parts=11)
    assert plan_linear(40, 160, 45, gpu) == Large(rows=64, stages=4, parts=11)
    assert isinstance(plan_linear(40, 180, 32, gpu), Small)
    assert isinstance(plan_linear(32, 320, 45, gpu), Small)
    assert plan_linear(65, 320, 45, gpu) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "cases"), [("kernel_cases.py", 35), ("lora_kernel_cases.py", 22), ("routing_kernel_cases.py", 8)]
)
def test_results(script, cases):
    """On a GPU the kernels themselves; elsewhere their logic, in float16, through Triton's interpreter."""
    seed = random.randrange(1 << 30)
    done = subprocess.run([sys.executable, ROOT / "tests" / script, str(seed)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(results) >= cases
    for result in results:
        for kernel, error in result["errors"].items():
            exact = result["dtype"] == "torch.int32" or kernel.endswith(("base", "exact"))
            limit = 0 if exact else LIMITS[result["dtype"]] * (2 if kernel in BOTH_PRODUCTS else 1)
            assert error <= limit, (
                seed,
                result["case"],
                result["dtype"],
                kernel,
                error,
            )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "chosen", "dtype", "blocksize", "lora_rank", "blocks_along"),
    [
        (86, None, torch.bfloat16, 64, None, INPUTS),
        (86, None, torch.bfloat16, 64, 16, INPUTS),
        (86, None, torch.bfloat16, 64, 16, OUTPUTS),
        (86, None, torch.float16, 64, None, OUTPUTS),
        (80, None, torch.bfloat16, 32, None, INPUTS),
        (90, None, torch.bfloat16, 64, None, INPUTS),
        (90, Decoding.PERMUTES, torch.float16, 64, None, INPUTS),  # where the table in shared memory failed
        (90, None, torch.bfloat16, 64, 16, OUTPUTS),
        (90, None, torch.float16, 64, None, OUTPUTS),
        (120, None, torch.bfloat16, 64, None, INPUTS),
    ],
)
def test_every_launch_fits_the_gpu(capability, chosen, dtype, blocksize, lora_rank, blocks_along):
    """For an RTX 3090 and others, with no GPU here: all that gpt-oss-20b launches, at all batch sizes."""
    gpu = replace(machine_code.GPUS[capability], chosen=chosen)
    found = machine_code.launches(GPT_OSS_20B, dtype, gpu, blocksize, lora_rank, blocks_along)
    expected = KERNELS | (LORA_KERNELS if lora_rank else ROUTING_KERNELS) | (WGMMA_KERNELS if gpu.wgmma else set())
    assert {each.kernel for each in found} == expected
    for each in found:
        takes = machine_code.resources(each, each.compiled(capability))
        kept = lora_rank or "one slot a block" in takes.label  # adapters; the routing weight of a token alone
        assert takes.spilled_bytes <= (TWO_REGISTERS if kept else 0), takes
        assert takes.static_bytes <= MAX_STATIC_BYTES, takes
        assert takes.static_bytes + takes.dynamic_bytes <= MAX_SHARED_BYTES[capability], takes


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "lora_rank"), [(torch.float16, None), (torch.bfloat16, 16)])
@pytest.mark.parametrize("blocks_along", DIRECTIONS)
def test_products_of_many_rows_run_beside_the_decoding(blocks_along, dtype, lora_rank):
    """The compiler has not serialized the products: the loop waits once for two of them, at most."""
    gpu = machine_code.GPUS[90]
    found = machine_code.launches(GPT_OSS_20B, dtype, gpu, lora_rank=lora_rank, blocks_along=blocks_along)
    large = [each for each in found if each.kernel.startswith("large.")]
    assert {each.arguments["BM"] for each in large} == {16, 32, 64, 128}
    for each in large:
        compiled = each.compiled(90)
        waited, products = machine_code.waits(machine_code.instructions(machine_code.disassembled(compiled, "-sass")))
        assert 0 < 2 * waited <= products, each.label
        assert machine_code.resources(each, compiled).spilled_bytes <= (TWO_REGISTERS if lora_rank else 0), each.label


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: there is none on this machine")
@pytest.mark.parametrize(("rows", "plan"), [(4, None), (40, Large(rows=64, parts=2))])
def test_no_launch_waits_for_the_gpu(rows, plan):
    from benchmarks import kernels

    weight = kernels.random_packed(1, 64, 128)
    x = torch.randn(rows, 128, device="cuda", dtype=torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    linear_launch.linear(x, weight, 64, plan)
    with torch.cuda.graph(graph):  # raises on any synchronisation
        out = linear_launch.linear(x, weight, 64, plan)
    graph.replay()
    assert torch.equal(out, linear_launch.linear(x, weight, 64, plan))
