"""Comparing what an engine generated with the reference's log-probabilities."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Generation:
    """One greedy continuation of `prompt` by `text`.

    `token_ids` are those of prompt and continuation, the first `prompt_tokens` of them the prompt's. `logprobs` has an
    entry for each of them: the engine's log-probabilities (natural logarithm) of some candidates, by token id. It is empty
    for the first token, and where the engine gave none.
    """

    prompt: str
    text: str
    token_ids: list[int]
    prompt_tokens: int
    logprobs: list[dict[int, float]]

    @property
    def finite(self) -> bool:
        """Whether no log-probability is NaN or +infinity. That of an impossible token is -infinity."""
        return all(not math.isnan(value) and value < math.inf for step in self.logprobs for value in step.values())


@dataclass
class Agreement:
    """How an engine agrees with the reference, over `positions` token positions.

    `agreeing` counts equal top-1 choices. `worst_difference` is the largest difference in log-probability over all
    candidates that the engine listed. `by_position` has that of each position.
    """

    positions: int = 0
    agreeing: int = 0
    worst_difference: float = 0.0
    by_position: list[dict] = field(default_factory=list)

    def add(self, generation: Generation, reference: Iterable[torch.Tensor]) -> None:
        """Count one generation. `reference`: rows of log-probabilities, float32 [vocabulary], row i of token i + 1."""
        pairs = zip(generation.logprobs[1:], reference, strict=False)  # the last row is of no token
        for position, (engine, expected) in enumerate(pairs, start=1):
            if not engine:
                continue
            self.positions += 1
            agrees = max(engine, key=lambda token: engine[token]) == int(expected.argmax())
            self.agreeing += agrees
            differences = [abs(value - float(expected[token])) for token, value in engine.items() if value > -math.inf]
            worst = max(differences, default=0.0)
            self.worst_difference = max(self.worst_difference, worst)
            self.by_position.append(
                {"prompt": generation.prompt, "position": position, "difference": worst, "same_choice": agrees}
            )

    def as_dict(self) -> dict:
        return {
            "positions": self.positions,
            "top1_agreement": self.agreeing / self.positions if self.positions else None,
            "worst_logprob_difference": self.worst_difference,
        }
