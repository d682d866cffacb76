"""The head in 12 bits: packing loses no bit, the kernels give them back, and what does not fit stays dense."""

import json
import logging
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from project_imports import ROOT

from benchmarks import machine_code
from benchmarks.weights import GPT_OSS_20B
from gptoss_nf4.errors import UserError
from gptoss_nf4.vllm.kernels import head_launch, twelve_bits
from gptoss_nf4.vllm.kernels.twelve_bits import TwelveBits, pack, unpack

DTYPES = (torch.bfloat16, torch.float16)
LIMITS = {"torch.bfloat16": 4e-3, "torch.float16": 1e-3}
MAX_SHARED_BYTES = {86: 99 * 1024, 90: 227 * 1024}  # of a program, by compute capability
TWO_REGISTERS = 8  # bytes; with 8 rows of float16, under Triton 3.9 alone


def normal(rows: int, inputs: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(rows, inputs) * 0.02).bfloat16().to(dtype)


def assert_exact(weight: torch.Tensor, packed: TwelveBits | str) -> None:
    assert isinstance(packed, TwelveBits), packed
    assert torch.equal(unpack(packed).view(torch.int16), weight.view(torch.int16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["sorted", "shuffled"])
def test_every_finite_pattern_comes_back(dtype, order, monkeypatch):
    """Signed zeros and subnormal values too, as nibbles where their exponents are frequent, and as escapes elsewhere."""
    monkeypatch.setattr(twelve_bits, "MAX_ESCAPES", 1)
    monkeypatch.setattr(twelve_bits, "CHUNK", 7)
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    if order == "shuffled":
        patterns = patterns[torch.randperm(len(patterns))]
    weight = patterns.view(dtype)
    weight = torch.where(weight.isfinite(), weight, 0).view(-1, 128)
    packed = pack(weight)
    assert_exact(weight, packed)
    assert 0 < len(packed.places) < weight.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "inputs"), [(16, 64), (100, 192), (1, 64), (33, 2880)])
def test_shapes_with_padding(dtype, rows, inputs, monkeypatch):
    monkeypatch.setattr(twelve_bits, "MAX_ESCAPES", 1)
    weight = normal(rows, inputs, dtype)
    packed = pack(weight)
    assert_exact(weight, packed)
    assert packed.rows == rows
    assert packed.words.shape == (-(-rows // 16), inputs // 64, 3, 32, 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_normal_weights_take_three_quarters(dtype):
    weight = normal(512, 2880, dtype)
    packed = pack(weight)
    assert_exact(weight, packed)
    assert packed.nbytes < 0.755 * weight.nbytes
    assert len(packed.places) < 1e-3 * weight.numel()


def test_rows_of_different_size_have_tables_of_their_own():
    weight = normal(64, 2880, torch.bfloat16)
    weight[16:32] *= 2.0**-30
    weight[32:48] *= 2.0**30
    weight[48:] = 0
    packed = pack(weight)
    assert_exact(weight, packed)
    assert len(packed.places) < 1e-3 * weight.numel()


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_escape_at_every_place_of_a_tile(dtype, monkeypatch):
    """16 in each of 64 row tiles: together all places of a tile, in its first, second or third input tile."""
    monkeypatch.setattr(twelve_bits, "MAX_ESCAPES", 1)
    weight = torch.full((64 * 16, 192), 0.02, dtype=torch.bfloat16).to(dtype)
    for binade in range(7):  # so frequent that the tables are full
        weight[:, 100 + 4 * binade : 104 + 4 * binade] *= 2.0 ** (-2 * binade)
    place = torch.randperm(16 * 64)
    tile = torch.arange(16 * 64) // 16
    row, column = tile * 16 + place // 64, 64 * (tile % 3) + place % 64
    weight[row, column] = 1.0
    packed = pack(weight)
    assert_exact(weight, packed)
    listed = torch.arange(64).repeat_interleave(packed.starts.diff())
    found = {(int(t) * 16 + int(p) % 16, int(p) // 16) for t, p in zip(listed, packed.places, strict=True)}
    assert found == set(zip(row.tolist(), column.tolist(), strict=True))


@pytest.mark.parametrize(("dtype", "shift"), [(torch.bfloat16, 0), (torch.float16, 3)])
def test_a_lane_holds_what_the_tensor_core_wants(dtype, shift):
    """The order as PTX documents it: one weight set, looked for where the formula says."""
    weight = torch.zeros(16, 128, dtype=dtype)
    row, column = 13, 64 + 32 + 8 * 3 + 4 * 0 + 2 * 1 + 1
    weight[row, column] = -1.5
    packed = pack(weight)
    bits = int((weight[row, column] * packed.scale).view(torch.int16)) & 0x7FFF
    lane, s, h, j = 4 * (row % 8) + 3, 2 * 1 + 0, 1, 2 * (row // 8) + 1
    code = int(packed.words[0, 1, 0, lane, s]) & 0xFFFFFFFF
    index = code >> 4 * (4 * h + j) & 7
    assert code == index << 4 * (4 * h + j) | 1 << 8 * j + 7 - 4 * h
    assert int(packed.table.view(torch.uint8)[0, index]) == bits >> 8 + shift
    assert int(packed.words[0, 1, 1 + 1, lane, 2 * 0 + h]) & 0xFFFFFFFF == (bits >> shift & 255) << 8 * j
    assert packed.words.count_nonzero() == 2


def test_float16_is_lifted_above_its_subnormal_values():
    """Else one weight in 600 would be an escape: bfloat16's eight bits at 2^-20 are not a multiple of 2^-21 in float16."""
    weight = normal(256, 2880, torch.float16)
    assert pack(weight).scale == 1024
    assert len(pack(weight).places) < 6e-4 * weight.numel()
    weight[0, 0] = 40000  # no room
    assert pack(weight).scale == 1
    assert_exact(weight, pack(weight))


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.zeros(16, 64), "float32"),
        (torch.zeros(16, 96, dtype=torch.bfloat16), "multiple of 64"),
        (torch.zeros(0, 64, dtype=torch.bfloat16), "shape"),
        (torch.full((16, 64), float("nan"), dtype=torch.bfloat16), "no number"),
        (torch.full((16, 64), float("-inf"), dtype=torch.float16), "infinite"),
        (torch.exp2(torch.rand(64, 640) * 60 - 30).bfloat16(), "spread"),  # uniform over 60 binades
        (torch.rand(64, 640).half(), "spread"),  # float16 with all its bits
    ],
)
def test_what_does_not_fit_says_why(weight, reason):
    packed = pack(weight)
    assert isinstance(packed, str)
    assert reason in packed


@pytest.mark.slow
def test_kernels():
    """On a GPU the kernels themselves; elsewhere their logic, through Triton's interpreter."""
    seed = random.randrange(1 << 30)
    script = [sys.executable, ROOT / "tests" / "head_cases.py", str(seed)]
    done = subprocess.run(script, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, (seed, done.stderr)
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(results) >= 20
    for result in results:
        assert result.get("different", 0) == 0, (seed, result)
        assert result.get("error", 0) <= LIMITS[result["dtype"]], (seed, result)
    cases = {(each["case"], each["dtype"]): each for each in results}
    for dtype in LIMITS:
        assert cases["escapes in a tile", dtype]["most"] > 64
        assert cases["escapes in a tile", dtype]["none"] == 0
    proof = cases["proof", "torch.float16"]
    assert proof["right"] is None
    assert all(proof[field] for field in ("words", "table", "places", "escapes")), proof


def test_every_number_of_rows_has_a_plan_among_those_proven():
    for gpu in machine_code.GPUS.values():
        plans = {head_launch.plan_product(rows, gpu) for rows in range(1, 2000)}
        proven = {head_launch.plan_product(rows, gpu) for rows in head_launch.VARIANTS}
        assert None not in proven
        assert plans == {None, *proven}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [86, 90])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_launch_fits_the_gpu(capability, dtype):
    found = machine_code.head_launches(GPT_OSS_20B, dtype, machine_code.GPUS[capability])
    assert {each.kernel for each in found} == {"head.product", "head_large.product", "head.unpack", "head.unpack_escapes"}
    for each in found:
        takes = machine_code.resources(each, each.compiled(capability))
        assert takes.spilled_bytes <= TWO_REGISTERS, takes
        assert takes.static_bytes + takes.dynamic_bytes <= MAX_SHARED_BYTES[capability], takes


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_many_rows_go_from_registers_into_wgmma(dtype):
    """In the loop over the inputs nothing is exchanged between lanes, stored to shared memory or spilled."""
    found = machine_code.head_launches(GPT_OSS_20B, dtype, machine_code.GPUS[90])
    many = [each for each in found if each.kernel == "head_large.product"]
    planned = {head_launch.plan_product(rows, machine_code.GPUS[90]) for rows in head_launch.VARIANTS}
    assert len(many) == len([plan for plan in planned if isinstance(plan, head_launch.Many)]) == 3
    for each in many:
        code = machine_code.instructions(machine_code.disassembled(each.compiled(90), "-sass"))
        loops = [
            {opcode.split(".")[0] for place, opcode, _ in code if a <= place <= b} for a, b in machine_code.loops(code)
        ]
        (loop,) = [opcodes for opcodes in loops if "LDGSTS" in opcodes]
        assert "HGMMA" in loop
        assert not loop & {"SHFL", "STS", "STL", "LDL"}


# ---- the method in vLLM ----


def config(dtype: torch.dtype = torch.bfloat16, head_dtype: torch.dtype = torch.bfloat16) -> SimpleNamespace:
    model = SimpleNamespace(dtype=dtype, head_dtype=head_dtype)
    return SimpleNamespace(model_config=model, speculative_config=None)


@pytest.fixture
def head(monkeypatch):
    """The module `gptoss_nf4.vllm.head`, as on a GPU; kernels are replaced by torch."""
    pytest.importorskip("vllm")
    import gptoss_nf4.vllm.head as module

    monkeypatch.delenv(module.VARIABLE, raising=False)
    monkeypatch.setattr(module, "runs_on_kernels", lambda dtype: dtype in DTYPES)
    monkeypatch.setattr(head_launch, "flaw", lambda packed, weight: None)
    monkeypatch.setattr(head_launch, "linear", lambda x, packed, bias: torch.nn.functional.linear(x, unpack(packed), bias))
    monkeypatch.setattr(module.UnquantizedEmbeddingMethod, "process_weights_after_loading", lambda self, layer: None)
    return module


def layer_of(weight: torch.Tensor) -> torch.nn.Module:
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer


def test_the_method_packs_and_frees_the_dense_weight(head, plugin_log):
    weight = normal(200, 2880, torch.bfloat16)
    layer, method = layer_of(weight), head.HeadMethod(config())
    with plugin_log.at_level(logging.INFO, "vllm.gptoss_nf4"):
        method.process_weights_after_loading(layer)
    assert not hasattr(layer, "weight")
    assert "12 bits" in plugin_log.text
    x = torch.randn(2, 3, 2880).bfloat16()
    assert torch.equal(method.apply(layer, x), torch.nn.functional.linear(x, weight))


@pytest.mark.parametrize("reason", ["tied", "spread", "flaw", "kernels", "float32", "head_dtype", "variable", "draft"])
def test_the_method_leaves_the_weight_dense(head, monkeypatch, reason):
    weight = normal(200, 2880, torch.bfloat16)
    layer, vllm_config = layer_of(weight), config()
    if reason == "spread":
        layer = layer_of(torch.exp2(torch.rand(64, 640) * 60 - 30).bfloat16())
    elif reason == "flaw":
        monkeypatch.setattr(head_launch, "flaw", lambda packed, weight: "other bits")
    elif reason == "kernels":
        monkeypatch.setattr(head_launch, "flaw", lambda packed, weight: 1 / 0)
    elif reason == "float32":
        vllm_config = config(torch.float32, torch.float32)
    elif reason == "head_dtype":
        vllm_config = config(head_dtype=torch.float32)
    elif reason == "variable":
        monkeypatch.setenv(head.VARIABLE, "dense")
    elif reason == "draft":
        vllm_config.speculative_config = SimpleNamespace(use_eagle=lambda: True)
    method = head.HeadMethod(vllm_config)
    if reason == "tied":
        method.tie_weights(layer, layer_of(weight))
    before = layer.weight
    method.process_weights_after_loading(layer)
    assert method.packed is None
    assert layer.weight is before


def test_a_wrong_variable_is_named(head, monkeypatch):
    monkeypatch.setenv(head.VARIABLE, "thin")
    with pytest.raises(UserError, match=r"GPTOSS_NF4_HEAD: got 'thin', expected one of"):
        head.HeadMethod(config())
