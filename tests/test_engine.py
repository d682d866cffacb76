"""What is told to vLLM, and what is made of its answers: with outputs as vLLM has them, and without vLLM."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from gptoss_nf4.engine import generate, measure
from gptoss_nf4.engine.forecast import forecast_on_cpu
from gptoss_nf4.engine.serve import Memory, ServedAdapter, cache_bytes, cpu_cache_gib, lora_rank, serve_arguments
from gptoss_nf4.format.dimensions import Dimensions

GIB = 1 << 30
GPT_OSS_20B = Dimensions(
    layers=24, hidden=2880, intermediate=2880, experts=32, experts_per_token=4, heads=64, kv_heads=8, head_dim=64,
    vocabulary=201088,
)  # fmt: skip
HERE = Path("artifacts/mine/checkpoint")
CONFIG = {
    "model_type": "gpt_oss",
    "num_hidden_layers": 24,
    "num_local_experts": 32,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "dtype": "float16",
}
# One request of 131,072 tokens: keys and values of 8 heads of 64, 2 bytes each, in 12 layers.
CACHE = 131072 * 12 * 2 * 8 * 64 * 2


def adapter(rank: int, directory: str = "/data/mine") -> ServedAdapter:
    return ServedAdapter("mine", Path(directory), rank)


@pytest.mark.parametrize(("ranks", "allowed"), [((1,), 1), ((2, 8), 8), ((9,), 16), ((320,), 320), ((4, 321), 512)])
def test_the_rank_is_the_smallest_that_vllm_allows(ranks, allowed):
    assert lora_rank([adapter(rank) for rank in ranks]) == allowed


def test_a_plain_checkpoint_needs_no_argument():
    assert serve_arguments(HERE, CONFIG, 12 * GIB) == [str(HERE)]
    assert serve_arguments(HERE, CONFIG | {"dtype": "float32"}, 12 * GIB) == [str(HERE), "--dtype", "float32"]


def test_adapters_come_last_and_any_path_arrives():
    found = serve_arguments(HERE, CONFIG, 0, [adapter(12), adapter(4, "/data/a=b, {c} ü")])
    assert found[:6] == [str(HERE), "--enable-lora", "--max-lora-rank", "16", "--lora-modules", "mine=/data/mine"]
    assert json.loads(found[6]) == {"name": "mine", "path": "/data/a=b, {c} ü"}
    assert "ü" in found[6]
    assert len(found) == 7


def test_the_cache_of_a_whole_request_is_counted_by_hand():
    assert cache_bytes(CONFIG, HERE) == CACHE
    everywhere = {key: value for key, value in CONFIG.items() if key != "layer_types"}
    assert cache_bytes(everywhere, HERE) == 2 * CACHE


@pytest.mark.parametrize(
    ("memory", "weights", "told"),
    [
        (Memory(24 * GIB, 24 * GIB, gpu=True), 12 * GIB, []),
        # Weights, 3 GiB for vLLM and the cache fill 92 % of the GPU to the last byte; then one byte more.
        (Memory(100 * GIB, 100 * GIB, gpu=True), 92 * GIB - 3 * GIB - CACHE, []),
        (Memory(100 * GIB, 100 * GIB, gpu=True), 92 * GIB - 3 * GIB - CACHE + 1, ["--max-model-len", "auto"]),
        # Others hold half of it: a quarter of a GiB is left to them besides.
        (Memory(50 * GIB, 100 * GIB, gpu=True), 12 * GIB, ["--gpu-memory-utilization", "0.49"]),
        (
            Memory(19 * GIB, 100 * GIB, gpu=True),
            14 * GIB,
            ["--gpu-memory-utilization", "0.18", "--max-model-len", "auto"],
        ),
        # What is left to vLLM, 79 hundredths, is filled to the last byte; then one byte more.
        (Memory(80 * GIB, 100 * GIB, gpu=True), 79 * GIB - 3 * GIB - CACHE, ["--gpu-memory-utilization", "0.79"]),
        (
            Memory(80 * GIB, 100 * GIB, gpu=True),
            79 * GIB - 3 * GIB - CACHE + 1,
            ["--gpu-memory-utilization", "0.79", "--max-model-len", "auto"],
        ),
        (Memory(0, 24 * GIB, gpu=True), 12 * GIB, []),
        (Memory(GIB, 100 * GIB, gpu=True), 12 * GIB, []),  # less than a hundredth: vLLM says best that nothing is free
        # No GPU: all that is free.
        (Memory(12 * GIB + 3 * GIB + CACHE, 99 * GIB, gpu=False), 12 * GIB, []),
        (Memory(12 * GIB + 3 * GIB + CACHE - 1, 99 * GIB, gpu=False), 12 * GIB, ["--max-model-len", "auto"]),
    ],
)
def test_memory_decides_what_has_to_be_told(memory, weights, told):
    assert serve_arguments(HERE, CONFIG, weights, memory=memory) == [str(HERE), *told]


@pytest.mark.parametrize(
    ("weights", "free", "gib"),
    [
        (12 * GIB, 99 * GIB, 4 * CACHE // GIB),
        (12 * GIB, 20 * GIB, 5),
        (12 * GIB, 16 * GIB - 1, 0),
        (12 * GIB, 16 * GIB, 1),
        (12 * GIB, 10 * GIB, 0),
    ],
)
def test_without_a_gpu_the_cache_has_a_size(weights, free, gib):
    assert cpu_cache_gib(HERE, CONFIG, weights, free) == gib


def test_without_a_gpu_the_cache_of_a_small_model_has_a_gib():
    assert cpu_cache_gib(HERE, CONFIG | {"max_position_embeddings": 64}, GIB, 20 * GIB) == 1


def test_the_forecast_is_what_was_measured():
    """Two layers of the 20b, two cores: 7.7 s for 122 tokens of prompts, 0.35 s for each further token of 4 requests."""
    d = replace(GPT_OSS_20B, layers=2)
    prompts = ["x" * 24, "é" * 8 + "x", "x" * 74, "x" * 7]  # 122 bytes
    none, some = (forecast_on_cpu(d, 10, 20, prompts, tokens, cores=2) for tokens in (0, 10))
    assert none.seconds - 40 == pytest.approx(7.7, rel=0.1)
    assert (some.seconds - none.seconds) / 10 == pytest.approx(0.35, rel=0.1)
    assert none.memory_bytes == 10 + 20 + 3 * GIB
    assert forecast_on_cpu(d, 10, 20, prompts, 0, cores=4).seconds - 40 == pytest.approx(7.7 / 2, rel=0.1)
    long = forecast_on_cpu(d, 10, 20, ["x" * 2049], 0, cores=2).seconds
    more = long - forecast_on_cpu(d, 10, 20, ["x" * 2048], 0, cores=2).seconds
    assert more > 2 * 32 * 3 * 2880**2 / 3e9 / 2  # all experts once more, at 3e9 weights a second and core


FEW = Dimensions(  # of attention 3,000,000 weights a layer, of an expert 300,000, of the head 700,000
    layers=3, hidden=1000, intermediate=100, experts=4, experts_per_token=2, heads=10, kv_heads=5, head_dim=100,
    vocabulary=700,
)  # fmt: skip


@pytest.mark.parametrize(
    ("prompts", "new_tokens", "cores", "dequantized", "products"),
    [
        # Two prefills of all 4 experts, then 7 steps of 2: 22 experts and 9 times attention in each layer.
        (["x" * 2049], 7, 1, 3 * (22 * 300_000 + 9 * 3_000_000), 2056 * (3 * 3_600_000 + 700_000)),
        # One prefill, then 10 steps in which 3 requests use all 4 experts.
        (["x", "y", "z"], 10, 2, 3 * (44 * 300_000 + 11 * 3_000_000), 33 * (3 * 3_600_000 + 700_000)),
    ],
)
def test_the_weights_and_products_of_a_forecast_are_counted_by_hand(prompts, new_tokens, cores, dequantized, products):
    seconds = 40 + (dequantized / 3e9 + products / 7.2e9) / cores
    assert forecast_on_cpu(FEW, 0, 0, prompts, new_tokens, cores).seconds == pytest.approx(seconds, rel=1e-12)


def test_a_forecast_says_what_is_too_much():
    forecast = forecast_on_cpu(GPT_OSS_20B, 12 * GIB, GIB, ["x"], 1, cores=2)
    assert forecast.too_much(16 * GIB, forecast.seconds / 60) is None
    assert forecast.too_much(16 * GIB - 1, 99) == "vLLM, which needs about 16.0 GiB of memory; 16.0 are free"
    assert "minutes here; engine.max_minutes is 0.1" in (forecast.too_much(16 * GIB, 0.1) or "")


def test_an_output_of_vllm_becomes_a_generation():
    entries = [None, {5: SimpleNamespace(logprob=-1.5), 6: SimpleNamespace(logprob=float("-inf"))}]
    completion = SimpleNamespace(text=" 4", token_ids=(7,), logprobs=[{7: SimpleNamespace(logprob=-0.25)}])
    output = SimpleNamespace(prompt="2 + 2", prompt_token_ids=[1, 2], prompt_logprobs=entries, outputs=[completion])
    found = generate.generation(output)
    assert (found.prompt, found.text, found.token_ids, found.prompt_tokens) == ("2 + 2", " 4", [1, 2, 7], 2)
    assert found.logprobs == [{}, {5: -1.5, 6: float("-inf")}, {7: -0.25}]
    assert found.finite


class Engine:
    """vLLM's LLM: notes how it is made and asked, and answers with prompt and adapter."""

    def __init__(self, made: list["Engine"], model: str, **arguments):
        self.model, self.arguments, self.ended = model, arguments, 0
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=self.shutdown))
        made.append(self)

    def shutdown(self) -> None:
        self.ended += 1

    def generate(self, prompts, sampling, use_tqdm, lora_request):
        assert not self.ended
        self.asked = (prompts, sampling, use_tqdm, lora_request)
        return [
            SimpleNamespace(
                prompt=prompt,
                prompt_token_ids=[1],
                prompt_logprobs=[None],
                outputs=[SimpleNamespace(text=f"{prompt} by {adapter}", token_ids=[], logprobs=[])],
            )
            for prompt, adapter in zip(prompts, lora_request or [None] * len(prompts), strict=True)
        ]


@pytest.fixture
def engines(monkeypatch) -> list[Engine]:
    """The engines that are made."""
    made: list[Engine] = []
    vllm = SimpleNamespace(LLM=partial(Engine, made), SamplingParams=lambda **fields: fields)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.lora.request", SimpleNamespace(LoRARequest=lambda *fields: fields))
    return made


# Greedy, to the last token, with as many log-probabilities as vLLM gives by default (max_logprobs of its ModelConfig).
GREEDY = {"temperature": 0, "max_tokens": 5, "ignore_eos": True, "logprobs": 20, "prompt_logprobs": 20}


def test_the_base_is_asked_greedily_and_its_engine_ended(engines):
    found = generate.generate(HERE, ["a", "b"], 5, {"dtype": "float32"})
    assert [each.text for each in found] == ["a by None", "b by None"]
    (engine,) = engines
    assert (engine.model, engine.arguments, engine.ended) == (str(HERE), {"dtype": "float32"}, 1)
    assert engine.asked == (["a", "b"], GREEDY, False, None)


def test_base_and_adapter_are_asked_at_once_and_told_apart(engines):
    arguments = {"dtype": "float32", "enable_lora": False}
    base, adapted = generate.generate_with(HERE, adapter(12), ["a", "b"], 5, arguments)
    lora = ("mine", 1, "/data/mine")
    assert [each.text for each in base] == ["a by None", "b by None"]
    assert [each.text for each in adapted] == [f"a by {lora}", f"b by {lora}"]
    (engine,) = engines
    assert engine.arguments == {"dtype": "float32", "enable_lora": True, "max_loras": 1, "max_lora_rank": 16}
    assert engine.asked == (["a", "a", "b", "b"], GREEDY, False, [None, lora, None, lora])
    assert engine.ended == 1


class Scripted:
    """An engine whose requests take what a script says: (seconds to the first token, seconds from it to the last)."""

    def __init__(self, rounds: list[list[tuple[float, float]]], tokens: int):
        self.rounds, self.tokens, self.asked = iter(rounds), tokens, []

    def generate(self, prompts, sampling, use_tqdm):
        self.asked.append((prompts, sampling))
        return [
            SimpleNamespace(
                outputs=[SimpleNamespace(token_ids=[0] * self.tokens)],
                metrics=SimpleNamespace(first_token_latency=first, first_token_ts=100.0, last_token_ts=100.0 + rest),
            )
            for first, rest in next(self.rounds)
        ]


@pytest.fixture
def sampling(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=lambda **fields: fields))


@pytest.mark.usefixtures("sampling")
def test_a_batch_is_measured_by_medians_without_the_first_round():
    warm_up, one, two, three = (
        [(9.0, 900.0)] * 3,
        [(0.1, 2.0), (0.2, 4.0), (9.0, 8.0)],
        [(0.3, 6.0), (0.3, 6.0), (0.4, 7.0)],
        [(0.8, 8.0), (0.8, 8.0), (0.8, 8.0)],
    )
    llm = Scripted([warm_up, one, two, three], tokens=5)
    found = measure.measure_batch(llm, 3, input_tokens=7, output_tokens=5, rounds=3, vocabulary=11)
    assert found == {
        "batch": 3,
        "output_tokens_per_second": pytest.approx(3 / 1.5),
        "median_time_to_first_token_ms": pytest.approx(300),
        "median_time_per_output_token_ms": pytest.approx(1500),
    }
    assert len(llm.asked) == 4
    for prompts, asked in llm.asked:
        assert [len(each["prompt_token_ids"]) for each in prompts] == [7, 7, 7]
        assert {token for each in prompts for token in each["prompt_token_ids"]} <= set(range(11))
        assert (asked["max_tokens"], asked["ignore_eos"], asked["temperature"]) == (5, True, 1)
    drawn = [tuple(each["prompt_token_ids"]) for prompts, _ in llm.asked for each in prompts]
    assert len(set(drawn)) == 12


@pytest.mark.usefixtures("sampling")
def test_a_request_that_ends_early_is_no_measurement():
    with pytest.raises(RuntimeError, match=r"vLLM produced \[4\] tokens, not 5"):
        measure.generate(Scripted([[(0.1, 1.0)]], tokens=4), [{"prompt_token_ids": [1]}], 5)


def test_the_peak_of_memory_counts_children_and_stays(monkeypatch):
    monkeypatch.setattr(measure, "SAMPLE_SECONDS", 0.01)
    monkeypatch.setattr(measure, "_gpu_handle", lambda: iter([5, 9, *[7] * 10_000]).__next__)
    code = "x = bytearray(200 << 20); print(flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    peak = measure.PeakMemory(os.getpid())
    assert (peak.host_bytes, peak.gpu_bytes) == (0, None)
    peak.start()
    child.stdout.readline()
    mine = peak.process.memory_info().rss
    deadline = time.monotonic() + 60
    while peak.host_bytes < mine + (200 << 20) and time.monotonic() < deadline:
        time.sleep(0.01)
    child.communicate(b"\n")
    time.sleep(0.05)
    peak.stop()
    assert peak.host_bytes >= (200 << 20) + mine * 0.9
    assert peak.gpu_bytes == 9
    assert not peak.is_alive()
