"""Reckoning a GPU's times from machine code, and the report of one, without a GPU."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import cards, directions, prediction, report_gpu, rtx3090
from benchmarks.cards import H100, H200, RTX_3090
from benchmarks.machine_code import GPUS, instructions, launches_of, loop_length, main_loop
from benchmarks.prediction import Code
from benchmarks.weights import GPT_OSS_20B

ROOT = Path(__file__).parent.parent
SASS = """
        /*0000*/                   S2R R0, SR_TID.X ;                       /* 0x0 */
        /*0010*/              @!P0 EXIT ;                                   /* 0x0 */
        /*0020*/                   LDG.E.128 R4, [R2.64] ;                  /* 0x0 */
        /*0030*/                   PRMT R5, R4, 0x5140, R6 ;                /* 0x0 */
        /*0040*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;     /* 0x0 */
        /*0050*/               @P1 BRA 0x30 ;                               /* 0x0 */
        /*0060*/              @!P2 BRA 0x20 ;                               /* 0x0 */
        /*0070*/                   EXIT ;                                   /* 0x0 */
        /*0080*/                   BRA 0x80 ;                               /* 0x0 */
"""


def a_layer(tokens: int, capability: int = 86) -> list:
    return launches_of(GPT_OSS_20B, torch.bfloat16, GPUS[capability], [tokens], [tokens])


def w13_of(tokens: int):
    return next(each for each in a_layer(tokens) if each.kernel == "small.swiglu_experts")


def code(registers: int = 72, shared_bytes: int = 2048, products: int = 16384, **loop: float) -> Code:
    """Of a program of four warps, whose loop is that of w13: eight instructions m16n8k16 a turn."""
    return Code(once={}, loop=loop, products=products, registers=registers, shared_bytes=shared_bytes, warps=4)


def test_machine_code_is_read_with_its_inner_loop():
    read = instructions(SASS)
    assert [opcode for _, opcode, _ in read][:4] == ["S2R", "EXIT", "LDG.E.128", "PRMT"]
    assert main_loop(read) == (0x30, 0x50)
    assert loop_length(SASS) == 3
    assert loop_length(SASS.replace("@P1 BRA 0x30", "    BRA 0x70")) == 5


@pytest.mark.parametrize(
    ("opcode", "pipe", "cycles"),
    [
        ("PRMT", "integer", 2),
        ("HGMMA.64x128x16.F32.BF16", "tensor", 64),
        ("LOP3.LUT", "integer", 2),
        ("FFMA", "float", 1),
        ("IMAD.MOV.U32", "heavy", 2),
        ("IMAD.WIDE.U32", "wide product", 4),
        ("UISETP.GE.AND", "uniform", 2),
        ("MUFU.RCP", "special", 8),
        ("LDG.E.EF.128", "caches", 16),
        ("LDS", "caches", 4),
        ("HMMA.16816.F32.BF16", "tensor", 32),
        ("BAR.SYNC", "control", 0),
    ],
)
def test_instructions_occupy_their_pipes(opcode, pipe, cycles):
    assert cards.pipe_of(opcode) == pipe
    assert cards.cycles(opcode, 86) == cycles


def test_an_unknown_instruction_is_no_guess():
    with pytest.raises(KeyError, match="XYZZY"):
        cards.pipe_of("XYZZY.B32")


def test_occupancy_is_what_cuda_says():
    """By hand: 72 registers are 2304 a warp, 7 warps of 16,384; 35 KiB fit six times into 228."""
    assert prediction.occupancy(code(), RTX_3090) == prediction.Occupancy(7, 28, "registers")
    assert prediction.occupancy(code(shared_bytes=35840), H100) == prediction.Occupancy(6, 24, "shared memory")
    assert prediction.occupancy(code(shared_bytes=35840), RTX_3090) == prediction.Occupancy(2, 8, "shared memory")
    assert prediction.occupancy(code(registers=24, shared_bytes=0), RTX_3090) == prediction.Occupancy(12, 48, "warps")


@pytest.mark.parametrize("tokens", [1, 8, 32])
def test_blocks_are_those_of_random_routing(tokens):
    d = GPT_OSS_20B
    chosen = (
        torch.rand(4000, tokens, d.experts, generator=torch.Generator().manual_seed(0)).topk(d.experts_per_token).indices
    )
    counts = torch.nn.functional.one_hot(chosen, d.experts).sum((1, 2))
    blocks, used = prediction.mean_blocks(tokens, d, 8)
    assert blocks == pytest.approx(float((-(-counts // 8)).sum(1).float().mean()), rel=0.01)
    assert used == pytest.approx(float((counts > 0).sum(1).float().mean()), rel=0.01)


def test_blocks_of_a_long_prompt_are_counted_too():
    """The number of ways to choose them is beyond float64."""
    d = GPT_OSS_20B
    blocks, used = prediction.mean_blocks(2048, d, 8)
    assert used == pytest.approx(d.experts)
    assert 2048 * d.experts_per_token / 8 < blocks < 2048 * d.experts_per_token / 8 + d.experts


def test_work_is_that_of_the_weights():
    """w13 of four experts: 5760 x 2880 codes of half a byte, and a float16 for 64 of them."""
    work = prediction.work_of(w13_of(1), 1, RTX_3090, GPT_OSS_20B)
    weights = 4 * 5760 * 2880
    assert work.bytes == pytest.approx(weights * (0.5 + 2 / 64), rel=0.01)
    assert work.programs == 4 * 180
    assert work.products == pytest.approx(weights * 8)


def test_programs_that_return_at_once_do_not_count():
    work = prediction.work_of(w13_of(8), 8, RTX_3090, GPT_OSS_20B)
    assert work.programs == pytest.approx(180 * prediction.mean_blocks(8, GPT_OSS_20B, 8)[0])


def test_a_kernel_takes_as_long_as_its_slowest_limit():
    launch = w13_of(1)
    fixed = prediction.LAUNCH_US + prediction.ROUND_TRIPS * RTX_3090.latency_ns / 1e3
    work = prediction.work_of(launch, 1, RTX_3090, GPT_OSS_20B)
    slow = prediction.predict(launch, code(issue=100.0), 1, RTX_3090)
    assert slow.limit == "memory"
    assert slow.us == pytest.approx(fixed + work.bytes / RTX_3090.read_gb_s / 1e3)
    # 12 turns; a scheduler has a warp of each program: 7 in the first wave, 2 in the second, of 574 and 146 programs.
    busy = prediction.predict(launch, code(issue=100.0, integer=5000.0), 1, RTX_3090)
    assert busy.limit == "integer"
    assert busy.us == pytest.approx(fixed + (7 + 2) * 12 * 5000 / RTX_3090.clock_ghz / 1e3)


def test_few_programs_wait_for_memory():
    """With one program on a multiprocessor what is in flight arrives once in a latency."""
    found = prediction.predict(w13_of(1), code(shared_bytes=90 * 1024, issue=1.0), 1, RTX_3090)
    assert found.held.programs == 1
    assert found.limit == "latency"
    assert found.in_flight < found.needed


def test_the_cache_and_the_head_by_hand():
    assert rtx3090.cache_bytes(1, GPT_OSS_20B, context=1000) == 24576 * (1000 + 128)
    assert rtx3090.head_bytes(GPT_OSS_20B, 12) == 0.75 * 201088 * 2880 * 2


@pytest.mark.slow
@pytest.mark.parametrize("tokens", rtx3090.BATCHES)
def test_an_h200_is_predicted_within_its_known_error(tokens):
    """What makes a prediction for another GPU worth reading. Measured with Triton 3.7.1, which compiles a little better."""
    for name, (predicted, measured) in rtx3090.compared(tokens).items():
        if name not in ("top-k and sorting", "router"):  # 3 us, of which the assumed gap and latencies are more
            assert 0.6 < measured / predicted < 1.6, name


@pytest.mark.slow
def test_an_rtx_3090_is_limited_by_memory():
    for tokens in rtx3090.BATCHES:
        found = prediction.predictions(tokens, RTX_3090)
        for name in ("w13", "w2"):  # to a tenth: Triton 3.9 takes half as many instructions again as 3.7.1
            parts = found[name].parts
            assert parts["memory"] > 0.9 * max(parts.values()), (tokens, name, parts)
        plain, careful = (rtx3090.step(tokens, RTX_3090, 16, off) for off in ({}, rtx3090.off_by(tokens)))
        assert 0.8 * plain.us < careful.us < 1.5 * plain.us
        floor = sum(each.mb for each in found.values()) * 24 + rtx3090.head_bytes(GPT_OSS_20B, 16) / 1e6
        assert plain.us > floor / RTX_3090.read_gb_s * 1e3


@pytest.mark.slow
@pytest.mark.parametrize("card", [RTX_3090, H200], ids=lambda card: card.name)
def test_blocks_along_the_outputs_keep_the_pace(card):
    """Of decoding and prefill, by their machine code. How both compare on a GPU `benchmarks.kernels` measures."""
    place = directions.COLUMNS.index("inputs / outputs")
    rows = directions.rows(card)
    assert len(rows) == len(directions.TOKENS) * len(directions.PRODUCTS)
    for row in rows:
        assert float(row[place]) >= 0.9, row


# ---- the report ----


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an NVIDIA GPU: the report would measure it")
def test_without_a_gpu_the_report_is_one_line():
    done = subprocess.run([sys.executable, "-m", "benchmarks.report_gpu"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "no NVIDIA GPU" in done.stderr


@pytest.fixture
def a_gpu(monkeypatch):
    """Torch says that there is an RTX 3090; no kernel runs on it."""
    properties = SimpleNamespace(
        major=8,
        minor=6,
        multi_processor_count=82,
        shared_memory_per_multiprocessor=100 << 10,
        L2_cache_size=6 << 20,
        uuid="0",
    )
    for name, value in {
        "is_available": True,
        "get_device_capability": (8, 6),
        "get_device_name": "NVIDIA GeForce RTX 3090",
        "mem_get_info": (23 << 30, 24 << 30),
        "get_device_properties": properties,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    return properties


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("get_device_capability", (7, 5), "compute capability 7.5"), ("mem_get_info", (5 << 30, 24 << 30), "5.0 GiB free")],
)
def test_a_gpu_that_cannot_is_refused_in_one_line(a_gpu, monkeypatch, name, value, message):
    assert report_gpu.reason_to_refuse() is None
    monkeypatch.setattr(torch.cuda, name, lambda *_: value)
    refused = report_gpu.reason_to_refuse()
    assert message in refused
    assert refused.startswith("error: benchmarks.report_gpu: ")
    assert "\n" not in refused


def test_nvidia_smi_is_read_by_name_and_may_not_know():
    said = "550.1, 1695 MHz, 2100 MHz, 9751 MHz, 349.1 W, 350.00 W, 63, [N/A], 24576 MiB, 1030 MiB\n"
    assert report_gpu.parsed(said) == {
        "driver": "550.1",
        "clock under load": "1695 MHz",
        "highest clock": "2100 MHz",
        "memory clock": "9751 MHz",
        "power under load": "349.1 W",
        "power limit": "350.00 W",
        "temperature, C": "63",
        "memory": "24576 MiB",
        "memory in use": "1030 MiB",
    }
    assert report_gpu.parsed("No devices were found\n") == {}


def test_this_card_is_the_known_one_as_it_was_measured(a_gpu):
    card = report_gpu.this_card(0.88, {"clock under load": "1920 MHz"})
    assert (card.multiprocessors, card.read_gb_s, card.clock_ghz, card.l2_bytes) == (82, 880, 1.92, 6 << 20)
    assert report_gpu.this_card(0.88, {}).clock_ghz == RTX_3090.clock_ghz
    a_gpu.major, a_gpu.minor = 12, 0
    assert report_gpu.this_card(1.7, {}) is None


@pytest.mark.parametrize("known", [True, False])
def test_the_report_fits_into_an_issue(a_gpu, monkeypatch, known):
    """With the numbers of rows that the measurements have, and predictions from a made-up machine code."""
    expert_rows = [[tokens, "4.0", "1 (1-1)", "1 (1-1)", "1", "1%", "1%", "1"] for tokens in rtx3090.BATCHES]
    linear_rows = [[rows, name, *"123", "1", "2"] for name in ("qkv", "o") for rows in rtx3090.BATCHES]
    monkeypatch.setattr(report_gpu.kernels, "expert_times", lambda *_: expert_rows)
    monkeypatch.setattr(report_gpu.kernels, "linear_times", lambda *_: linear_rows)
    monkeypatch.setattr(report_gpu.kernels, "errors", lambda **_: [["torch.bfloat16", "w13 1e-3, w2 1e-3"]] * 6)
    monkeypatch.setattr(report_gpu, "head", lambda _: ["Head"])
    monkeypatch.setattr(report_gpu, "gpu_of", lambda _: GPUS[86])
    monkeypatch.setattr(prediction, "layer", lambda tokens, _: [(each, code(issue=300.0)) for each in a_layer(tokens)])
    card = report_gpu.this_card(0.88, {}) if known else None
    report = report_gpu.lines(0.8, 0.88, {"driver": "550.1"}, card)
    assert len(report) < 60
    assert max(map(len, report)) < 400
    text = "\n".join(report)
    for said in ("RTX 3090", "driver 550.1", "torch 2", "reads 880 GB/s", "permutes", "w13 us", "q", "float64"):
        assert said in text
    assert ("No predictions" in text) == (not known)
    columns = [line.count("|") for line in report if line.startswith("|")]
    assert all(count > 2 for count in columns)
