"""Comparing what an engine generated with the reference's log-probabilities."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Generation:
    """One greedy continuation. `logprobs[i]` maps token ids to the engine's log-probability of token i of
    prompt + continuation, i from 1; empty where the engine gave none."""

    prompt: str
    text: str
    token_ids: list[int]
    prompt_tokens: int
    logprobs: list[dict[int, float]]

    @property
    def finite(self) -> bool:
        return all(not math.isnan(value) and value < math.inf for step in self.logprobs for value in step.values())


@dataclass
class Agreement:
    """Top-1 choices that agree, and the worst difference in log-probability over all tokens that the engine listed."""

    positions: int = 0
    agreeing: int = 0
    worst_difference: float = 0.0

    def add(self, generation: Generation, reference: torch.Tensor) -> None:
        """`reference`: float32 [tokens, vocabulary] of `generation.token_ids`, row i for token i + 1."""
        for position, engine in enumerate(generation.logprobs):
            if position == 0 or not engine:
                continue
            expected = reference[position - 1]
            self.positions += 1
            self.agreeing += max(engine, key=lambda token: engine[token]) == int(expected.argmax())
            differences = [abs(value - float(expected[token])) for token, value in engine.items() if value > -math.inf]
            self.worst_difference = max(self.worst_difference, *differences)

    def as_dict(self) -> dict:
        return {
            "positions": self.positions,
            "top1_agreement": self.agreeing / self.positions if self.positions else None,
            "worst_logprob_difference": self.worst_difference,
        }
