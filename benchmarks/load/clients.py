"""Many clients of one server at once. Some hang up before their answer is whole."""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from openai import AsyncOpenAI, OpenAIError

from benchmarks.load.questions import Question

HANGS_UP = 3  # every third client
ANSWER_SECONDS = 120  # after which an answer counts as lost


@dataclass
class Outcome:
    """What became of the requests of a round.

    `answered` are right and whole, `hung_up` were left by the client, with nothing wrong until then. `wrong` and `lost`
    tell of the others, one line each.
    """

    answered: int = 0
    hung_up: int = 0
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


class HungUp(Exception):
    """The client has left."""


def connected(url: str) -> AsyncOpenAI:
    """A client that never asks twice: an answer that came at the second attempt was lost at the first.

    It opens a connection for each request, as clients do who have nothing to do with each other. So no connection is used
    again that the server, which waits 5 s for a next request, is about to close.
    """
    headers = {"Connection": "close"}
    return AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=ANSWER_SECONDS, default_headers=headers)


async def answer(
    client: AsyncOpenAI, model: str, prompt: Sequence[int], tokens: int, got: list[int], leave_after: int | None = None
) -> str | None:
    """Stream the greedy answer of `tokens` tokens into `got`; returns why it ended.

    With `leave_after` the client closes the connection once it has so many tokens, and `HungUp` is raised.
    """
    reason = None
    stream = await client.completions.create(
        model=model,
        prompt=list(prompt),
        max_tokens=tokens,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    async with stream:
        async for event in stream:
            for choice in event.choices:
                got += choice.token_ids or []
                reason = choice.finish_reason or reason
            if leave_after is not None and len(got) >= leave_after:
                raise HungUp
    return reason


async def one_client(
    client: AsyncOpenAI, model: str, questions: Sequence[Question], number: int, until: float, outcome: Outcome
) -> None:
    """Ask one question after the other, one at least, until the monotonic clock says `until`."""
    chance = random.Random(number)
    while True:
        question = chance.choice(questions)
        if number % HANGS_UP:
            await stay(client, model, question, outcome)
        else:
            await leave(client, model, question, chance, outcome)
        if time.monotonic() >= until:
            return


async def stay(client: AsyncOpenAI, model: str, question: Question, outcome: Outcome) -> None:
    """Ask, and wait for the whole answer."""
    got: list[int] = []
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            reason = await answer(client, model, question.prompt, len(question.answer), got)
    except (OpenAIError, TimeoutError) as error:
        outcome.lost.append(told(error))
        return
    outcome.tokens += len(got)
    if reason != "length" or len(got) < len(question.answer):
        outcome.lost.append(f"{len(got)} of {len(question.answer)} tokens, {reason}")
    elif tuple(got) != question.answer:
        outcome.wrong.append(f"{got}, not {question.answer}")
    else:
        outcome.answered += 1


async def leave(client: AsyncOpenAI, model: str, question: Question, chance: random.Random, outcome: Outcome) -> None:
    """Ask, and hang up: half of the time after some tokens, else after a moment, in which the request may still wait."""
    tokens = len(question.answer)
    by_tokens = chance.random() < 0.5
    got: list[int] = []
    try:
        async with asyncio.timeout(ANSWER_SECONDS if by_tokens else chance.random()):
            leave_after = chance.randrange(1, tokens) if by_tokens else None
            await answer(client, model, question.prompt, tokens, got, leave_after)
    except HungUp:
        pass
    except TimeoutError as error:
        if by_tokens:
            outcome.lost.append(told(error))
            return
    except OpenAIError as error:
        outcome.lost.append(told(error))
        return
    outcome.tokens += len(got)
    if tuple(got) != question.answer[: len(got)]:
        outcome.wrong.append(f"{got}, not {question.answer}")
    elif len(got) == tokens:
        outcome.answered += 1  # it came sooner than the client could leave
    else:
        outcome.hung_up += 1


def told(error: BaseException) -> str:
    """An error in one line, with what the client's library hides behind it."""
    cause = f", {error.__cause__!r}" if error.__cause__ else ""
    return f"{type(error).__name__}: {error}{cause}"


async def crowd(url: str, model: str, questions: Sequence[Question], clients: int, seconds: float) -> Outcome:
    """What becomes of the requests of `clients` clients who ask for `seconds`."""
    outcome = Outcome()
    until = time.monotonic() + seconds
    async with connected(url) as client:
        numbers = range(clients)
        await asyncio.gather(*(one_client(client, model, questions, number, until, outcome) for number in numbers))
    return outcome


async def one_by_one(url: str, model: str, prompts: Sequence[Sequence[int]], tokens: int) -> list[Question]:
    """Each prompt with its answer, asked alone."""
    asked = []
    async with connected(url) as client:
        for prompt in prompts:
            got: list[int] = []
            await answer(client, model, prompt, tokens, got)
            asked.append(Question(tuple(prompt), tuple(got)))
    return asked
