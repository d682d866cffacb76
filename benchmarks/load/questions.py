"""Questions that have one right answer: nothing that float32 rounds can change it."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from gptoss_nf4.check import reference
from gptoss_nf4.source.interface import Source

# Of the reference: between the likeliest token and the next, in log-probability; and between the last expert that is
# chosen and the first that is not, in the router's logits. vLLM differs from it by 1e-5 or so.
TOKEN_MARGIN, ROUTER_MARGIN = 1e-2, 1e-3
SHARED_TOKENS = 64  # with which half of the prompts begin, so that some find a prefix in the cache
LENGTHS = range(8, 97)


@dataclass(frozen=True)
class Question:
    """Token numbers of a prompt, and those of its answer."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def random_prompts(count: int, tokens: int, seed: int = 0) -> list[tuple[int, ...]]:
    """`count` prompts of token numbers below `tokens`, of LENGTHS. Every second one begins as its like do."""
    chance = random.Random(seed)
    shared = chance.choices(range(tokens), k=SHARED_TOKENS)
    return [
        (*(shared if number % 2 else ()), *chance.choices(range(tokens), k=chance.choice(LENGTHS)))
        for number in range(count)
    ]


def clear(source: Source, asked: Sequence[Question]) -> list[Question]:
    """Those of `asked` whose every margin in the reference is large enough. ValueError where one's answer is another."""
    sequences = [[*question.prompt, *question.answer] for question in asked]
    with router_margins() as margins:
        rows = [list(each) for each in reference.log_probabilities(source, sequences)]
    kept = []
    for number, question in enumerate(asked):
        of_routers = margins[number :: len(asked)]  # each layer is given one sequence after the other
        best = torch.stack(rows[number][len(question.prompt) - 1 : -1]).topk(2)
        if min(of_routers) <= ROUTER_MARGIN or (best.values[:, 0] - best.values[:, 1]).min() <= TOKEN_MARGIN:
            continue
        if tuple(best.indices[:, 0].tolist()) != question.answer:
            raise ValueError(f"the quiet server answers {question.answer}, transformers {best.indices[:, 0].tolist()}")
        kept.append(question)
    return kept


@contextmanager
def router_margins() -> Iterator[list[float]]:
    """Within it, each router of transformers' gpt-oss adds its smallest margin over the tokens that it is given."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter

    found: list[float] = []

    def look(module: torch.nn.Module, inputs: tuple, output: tuple) -> None:
        if isinstance(module, GptOssTopKRouter) and module.top_k < module.num_experts:
            best = output[0].topk(module.top_k + 1).values
            found.append(float((best[:, -2] - best[:, -1]).min()))

    hook = torch.nn.modules.module.register_module_forward_hook(look)
    try:
        yield found
    finally:
        hook.remove()
