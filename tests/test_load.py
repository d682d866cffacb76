"""`benchmarks.load`: a short run of it against vLLM; and that it sees what is wrong, with a server that is."""

import asyncio
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import warm_vllm
from conftest import local
from whole_model import whole_model

from benchmarks.load import __main__ as command_line
from benchmarks.load.clients import Outcome, crowd, one_by_one
from benchmarks.load.questions import ROUTER_MARGIN, TOKEN_MARGIN, Question, clear, random_prompts
from benchmarks.load.rounds import MOST_GROWTH, Report, Round, under_load
from benchmarks.load.watching import RUNNING, WAITING, metrics
from gptoss_nf4.convert.plan import RequantOptions
from gptoss_nf4.flow import convert
from gptoss_nf4.source.layouts import open_checkpoint

POLL_SECONDS = 0.01  # a server that is told to end looks as often; by default each test would wait half a second

CLIENTS, SECONDS = 200, 8
CROWD = 12  # of the stand-in: some of those who leave do so by tokens, whatever else the machine does
QUESTION = Question((1, 2, 3), tuple(range(40, 60)))


@pytest.mark.slow
def test_a_crowd_that_hangs_up_disturbs_nobody(tiny, tmp_path):
    """`python -m benchmarks.load` does it for minutes."""
    model, artifacts = local(tiny, tmp_path / "artifacts")
    convert(model, artifacts, RequantOptions(), "float32")
    log = tmp_path / "serve.log"
    report = under_load(open_checkpoint(tiny), artifacts.checkpoint, log, CLIENTS, SECONDS, rounds=2, start=warm_vllm.popen)
    print(report)
    assert list(report.faults()) == []
    assert report.questions >= 4
    for each in report.rounds:
        told = each.outcome
        assert told.answered >= CLIENTS * 2 // 3 - 1
        assert told.hung_up >= CLIENTS // 4
        # Some that were left did not run on. About half do: a busy server sees late that nobody listens.
        assert told.answered <= each.run_to_end < told.answered + 0.8 * told.hung_up
        assert each.most_waiting > each.most_running > 8
        assert each.preempted > 0
        assert each.prefix_tokens > 0


@contextmanager
def stand_in(events: Callable[[int], list[dict] | None], gauges: str = "") -> Iterator[str]:
    """A server whose every completion, by its number, is a stream of `events`: choices, or None for an error."""
    asked = iter(range(10**6))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            choices = events(next(asked))
            self.send_response(500 if choices is None else 200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            for choice in choices or ():
                event = {"id": "1", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]}
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            self.wfile.write(b"data: [DONE]\n\n")

        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(gauges.encode())

        def log_message(self, *arguments: object) -> None:
            pass

        def handle(self) -> None:
            with suppress(OSError):  # the client has hung up
                super().handle()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(POLL_SECONDS,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def streamed(tokens: tuple[int, ...], reason: str | None = "length") -> list[dict]:
    """The events of an answer, a token each; the last one says why it ended."""
    reasons = [None] * (len(tokens) - 1) + [reason]
    return [
        {"index": 0, "text": "", "logprobs": None, "finish_reason": why, "token_ids": [token]}
        for token, why in zip(tokens, reasons, strict=True)
    ]


def asked_of(events: Callable[[int], list[dict] | None]) -> Outcome:
    with stand_in(events) as url:
        return asyncio.run(crowd(url, "m", [QUESTION], clients=CROWD, seconds=0.2))


def test_right_answers_and_hanging_up_are_told_apart():
    told = asked_of(lambda number: streamed(QUESTION.answer))
    assert told.wrong == told.lost == []
    assert told.answered >= CROWD * 2 // 3
    assert told.hung_up > 0


@pytest.mark.parametrize(
    ("events", "wrong"),
    [
        (streamed((*QUESTION.answer[:-1], 1)), True),
        (streamed((1, *QUESTION.answer[1:])), True),
        (streamed((*QUESTION.answer, 1)), True),
        (streamed(QUESTION.answer[:-1]), False),
        (streamed(QUESTION.answer[:-1], None), False),
        (streamed(QUESTION.answer, "stop"), False),
        (streamed(QUESTION.answer, None), False),
        ([], False),
        (None, False),
    ],
    ids=["last", "first", "longer", "shorter", "cut", "stopped", "without end", "empty", "error"],
)
def test_a_bad_answer_is_seen(events, wrong):
    """By each of the clients who stay."""
    told = asked_of(lambda number: events)
    assert len(told.wrong if wrong else told.lost) >= CROWD * 2 // 3
    assert told.lost == [] if wrong else told.wrong == []


def test_whoever_leaves_looks_at_what_came_until_then():
    """Every third client leaves, the first one too; here there is no other."""
    with stand_in(lambda number: streamed((1, *QUESTION.answer[1:]))) as url:
        told = asyncio.run(crowd(url, "m", [QUESTION], clients=1, seconds=0.5))
    assert told.wrong
    assert told.answered == 0


def test_the_quiet_server_is_asked_as_it_answers():
    with stand_in(lambda number: streamed((number, 7))) as url:
        assert asyncio.run(one_by_one(url, "m", [[1], [2, 3]], 2)) == [Question((1,), (0, 7)), Question((2, 3), (1, 7))]


def test_metrics_are_summed_over_labels():
    text = f'# HELP a text\n{RUNNING}{{engine="0",model_name="a b"}} 2.0\n{RUNNING}{{engine="1"}} 3.0\n{WAITING} 1e1\n'
    with stand_in(lambda number: None, text) as url:
        found = metrics(url)
    assert (found[RUNNING], found[WAITING], found["another"]) == (5, 10, 0)


def test_only_questions_with_margins_are_kept(tiny):
    """The margins by transformers' whole model. An answer that is not the likeliest is the server's fault."""
    model, asked, expected = whole_model(tiny), [], []
    for prompt in random_prompts(8, model.config.vocab_size):
        tokens = list(prompt)
        for _ in range(4):
            with torch.inference_mode():
                whole = model(torch.tensor([tokens]), output_router_logits=True)
            tokens.append(int(whole.logits[0, -1].argmax()))
        asked.append(Question(prompt, tuple(tokens[len(prompt) :])))
        best = whole.logits[0, len(prompt) - 1 :].topk(2).values
        routers = torch.cat(whole.router_logits).topk(model.config.num_experts_per_tok + 1).values
        if (best[:, 0] - best[:, 1]).min() > TOKEN_MARGIN and (routers[:, -2] - routers[:, -1]).min() > ROUTER_MARGIN:
            expected.append(asked[-1])
    source = open_checkpoint(tiny)
    assert 0 < len(expected) < len(asked)
    assert clear(source, asked) == expected
    other = (expected[0].answer[-1] + 1) % model.config.vocab_size
    with pytest.raises(ValueError, match="transformers"):
        clear(source, [replace(expected[0], answer=(*expected[0].answer[:-1], other))])


GOOD = Round(Outcome(answered=5), 2, 3, 5, 1, 1, left_running=0, left_waiting=0, left_cache=0.0, resident_bytes=10**9)


def faults(*rounds: Round, changed: int = 0) -> list[str]:
    return list(Report(questions=4, resident_bytes=10**8, rounds=list(rounds), changed=changed).faults())


def test_a_report_tells_each_fault():
    grown = replace(GOOD, resident_bytes=GOOD.resident_bytes + MOST_GROWTH)
    assert faults(GOOD, GOOD) == faults(GOOD, grown) == []
    (line,) = faults(GOOD, replace(grown, resident_bytes=grown.resident_bytes + 2**20))
    assert line == f"round 2: the server's memory grew by {MOST_GROWTH / 2**20 + 1:.1f} MiB"
    for bad, said in (
        (replace(GOOD, outcome=Outcome(wrong=["this", "that"])), "2 answers wrong, such as this"),
        (replace(GOOD, outcome=Outcome(lost=["that"])), "1 answers lost, such as that"),
        (replace(GOOD, left_running=2), "2 requests run"),
        (replace(GOOD, left_waiting=3), "3 wait for nobody"),
        (replace(GOOD, left_cache=0.01), "1% of the KV cache"),
    ):
        (line,) = faults(GOOD, bad)
        assert line.startswith("round 2: ")
        assert said in line
    (line,) = faults(GOOD, changed=1)
    assert "1 answers of the quiet server" in line


@pytest.mark.parametrize("left", [0, 1])
def test_the_command_line_says_what_is_wrong(monkeypatch, capsys, left):
    """The server and its crowd are those of `test_a_crowd_that_hangs_up_disturbs_nobody`; here others stand for them."""
    given = []

    def measured(source, checkpoint, log, clients, seconds, rounds) -> Report:
        given.extend([(checkpoint / "config.json").is_file(), clients, seconds, rounds])
        last = replace(GOOD, left_running=left, outcome=Outcome(answered=77, hung_up=33))
        return Report(questions=4, resident_bytes=2**30, rounds=[GOOD] * (rounds - 1) + [last], changed=0)

    monkeypatch.setattr(command_line, "under_load", measured)
    with pytest.raises(SystemExit, match="round 2: 1 requests run") if left else nullcontext():
        command_line.main(["--seconds", "60"])
    assert given == [True, 200, 60, 2]
    printed = capsys.readouterr().out
    assert "4 questions, 200 clients, 60 s" in printed
    assert "| 1024.0" in printed
    assert re.search(r"^\| 2 +\| 77 +\| 33 +\|", printed, re.MULTILINE)
