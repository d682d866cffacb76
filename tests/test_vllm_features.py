"""What vLLM does beside plain steps, on converted checkpoints in float32, against transformers.

Chunks of a prompt, prefixes from the cache, experts spread over ranks. Each test sees from vLLM itself that it was in use.
"""

import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import warm_vllm
from conftest import local
from project_imports import ROOT
from safetensors.torch import load_file
from whole_model import log_probabilities, whole_model

from benchmarks.dtypes import PROMPTS
from gptoss_nf4.check.agreement import Agreement, Generation
from gptoss_nf4.convert.plan import RequantOptions
from gptoss_nf4.flow import convert
from gptoss_nf4.samples.embedded import TINY

BLOCK, CHUNK = 16, 40  # tokens. A chunk ends within a block, and within the sliding window of the one before
STORY = (
    "Once upon a time, in a house by the sea, there lived an old clockmaker who had never in his life been late. "
    "His clocks stood in every window, and whoever passed could hear the hours go by. One morning"
)
LETTER = "Dear Sir, the parcel that you sent by the last ship of the year has come, and what was in it was"
ENDINGS = (" all of them stopped.", " it rained, and nobody passed.")
NEW_TOKENS = 16
ENGINE = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 4, "enforce_eager": True}
SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory) -> Path:
    model, artifacts = local(tiny, tmp_path_factory.mktemp("features"))
    convert(model, artifacts, RequantOptions(), "float32")
    return artifacts.checkpoint


@pytest.fixture(scope="module")
def reference(tiny) -> torch.nn.Module:
    return whole_model(tiny)


@dataclass(frozen=True)
class Round:
    """What `features_in_vllm.run` tells of one round."""

    generations: list[Generation]
    cached: list[int]
    steps: list[dict[int, int]]
    counters: dict[str, int]

    @classmethod
    def of(cls, told: dict) -> "Round":
        for each in told["generations"]:
            each["logprobs"] = [{int(token): value for token, value in step.items()} for step in each["logprobs"]]
        return cls(
            [Generation(**each) for each in told["generations"]],
            told["cached"],
            [{int(place): tokens for place, tokens in step.items()} for step in told["steps"]],
            told["counters"],
        )


def ask(checkpoint: Path, directory: Path, rounds: list[list[str]], settings: dict, **engine) -> tuple[list[Round], list]:
    """Each of `rounds` is asked at once, one after the other, of one engine; and what each rank told of its experts."""
    job = {"checkpoint": str(checkpoint), "engine": ENGINE | engine, "rounds": rounds, "max_tokens": NEW_TOKENS}
    (directory / "job.json").write_text(json.dumps(job))
    command = [sys.executable, ROOT / "tests" / "features_in_vllm.py", directory / "job.json"]
    done = warm_vllm.run(command, cwd=ROOT, text=True, env=os.environ | SETTINGS | settings)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    told = json.loads(line.removeprefix("RESULT "))
    return [Round.of(each) for each in told["rounds"]], told["ranks"]


@pytest.fixture(scope="module")
def in_chunks(checkpoint, tmp_path_factory) -> list[Round]:
    """Long prompts in chunks; the same again; then their beginnings with other endings. One engine, one rank."""
    prompts = [STORY, LETTER]
    rounds = [prompts, prompts, [prompt + ending for prompt in prompts for ending in ENDINGS]]
    engine = {"max_num_batched_tokens": CHUNK, "block_size": BLOCK, "enable_prefix_caching": True}
    found, _ = ask(checkpoint, tmp_path_factory.mktemp("chunks"), rounds, {}, **engine)
    return found


def require_close(generations: list[Generation], reference: torch.nn.Module, positions: int) -> None:
    """Against transformers, at `positions` positions at least."""
    agreement = Agreement()
    for generation in generations:
        assert generation.finite
        assert len(generation.token_ids) == generation.prompt_tokens + NEW_TOKENS
        agreement.add(generation, log_probabilities(reference, generation.token_ids))
    assert agreement.positions >= positions
    assert agreement.agreeing == agreement.positions
    assert agreement.worst_difference < 1e-3


@pytest.mark.slow
def test_a_prompt_in_chunks_agrees(in_chunks, reference):
    """Every position of the prompts, and what comes after. Chunks of one prompt run beside another's new tokens."""
    first = in_chunks[0]
    assert first.cached == [0, 0]
    for place, generation in enumerate(first.generations):
        chunks = [step[place] for step in first.steps if place in step][: -(NEW_TOKENS - 1)]
        assert sum(chunks) == generation.prompt_tokens
        assert len(chunks) >= generation.prompt_tokens / CHUNK > 2
    assert max(sum(step.values()) for step in first.steps) == CHUNK
    assert any(step.get(0) == 1 and step.get(1, 0) > 1 for step in first.steps)
    require_close(first.generations, reference, sum(each.prompt_tokens - 1 + NEW_TOKENS for each in first.generations))


@pytest.mark.slow
def test_a_prefix_from_the_cache_changes_no_answer(in_chunks, reference):
    first, second, _ = in_chunks
    for cached, before, after in zip(second.cached, first.generations, second.generations, strict=True):
        assert before.prompt_tokens / 2 < cached < before.prompt_tokens  # vLLM leaves out a block now and then
        assert after.token_ids == before.token_ids
        for old, new in zip(before.logprobs[-NEW_TOKENS:], after.logprobs[-NEW_TOKENS:], strict=True):
            assert new == pytest.approx(old, abs=1e-3)
    assert second.counters["vllm:prefix_cache_hits"] == sum(second.cached)
    require_close(second.generations, reference, NEW_TOKENS * len(second.generations))


@pytest.mark.slow
def test_a_prefix_from_the_cache_goes_on_in_another_way(in_chunks, reference):
    """Two prompts at once on each cached prefix, whose endings differ."""
    first, _, third = in_chunks
    assert len({tuple(each.token_ids[each.prompt_tokens :]) for each in third.generations}) == len(third.generations)
    for place in range(len(third.generations)):
        prefix = first.generations[place // len(ENDINGS)].prompt_tokens
        assert prefix / 2 < third.cached[place] <= prefix
    assert third.counters["vllm:prefix_cache_hits"] == sum(third.cached)
    require_close(third.generations, reference, NEW_TOKENS * len(third.generations))


@pytest.mark.slow
def test_two_ranks_with_half_of_the_experts_each_agree(checkpoint, reference, tmp_path):
    """Each rank holds its half as the checkpoint has it, whole, with all of its biases; and the answers are right."""
    if (os.cpu_count() or 1) < 2:
        pytest.skip("needs two cores: vLLM binds one rank to each")
    settings = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    engine = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    (found,), ranks = ask(checkpoint, tmp_path, [PROMPTS], settings, **engine)
    half = TINY.experts // 2
    assert [[layer["rank"] for layer in rank] for rank in ranks] == [[rank] * TINY.layers for rank in range(2)]
    for number, rank in enumerate(ranks):
        here = range(number * half, (number + 1) * half)
        for layer, told in enumerate(rank):
            assert [expert for expert, local in enumerate(told["map"]) if local >= 0] == list(here)
            assert told["held"] == {
                parameter: [digest(checkpoint, layer, name, told["map"].index(local)) for local in range(half)]
                for parameter, name in PARAMETERS.items()
            }
    require_close(found.generations, reference, 100)


PARAMETERS = {
    "w13_codes": "w13.weight",
    "w2_codes": "w2.weight",
    "w13_expert_bias": "w13.bias",
    "w2_expert_bias": "w2.bias",
}


def digest(checkpoint: Path, layer: int, name: str, expert: int) -> str:
    """SHA-256 of one expert's part of a tensor of the checkpoint."""
    stored = f"model.layers.{layer}.mlp.experts.{name}"
    (tensor,) = [tensors[stored] for tensors in map(load_file, checkpoint.glob("*.safetensors")) if stored in tensors]
    return hashlib.sha256(tensor[expert].numpy().tobytes()).hexdigest()
