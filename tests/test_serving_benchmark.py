"""What `python -m benchmarks.serving` does around its engines, which need a GPU: turns, budget, and contenders that fail.

One test lets real engines take turns, on the CPU.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from benchmarks import weights
from benchmarks.serving import __main__ as command_line
from benchmarks.serving import engine, rounds
from benchmarks.serving.cells import ADAPTERS, DECODE, PREFILL, Cell, adapter_cells, decode_cell
from benchmarks.serving.jobs import CONTENDERS, DEFAULT_GIB, SHARED_KV_GIB, Job, grouped
from benchmarks.serving.rounds import Plan, measure_all, turns_of
from benchmarks.serving.tables import report
from gptoss_nf4.samples.embedded import TINY

ROOT = Path(__file__).resolve().parent.parent
# A contender's side of the conversation. What each is asked goes to a file; its n-th value of a cell is n milliseconds.
# mxfp4-marlin dies while it starts, mxfp4-triton with its third question. mxfp4-humming is never ready. mxfp4-flashinfer
# does not answer.
STAND_IN = """\
import json, sys, time
from pathlib import Path
job = json.loads(sys.argv[1])
name, asked, counts = job["contender"], 0, {}
if name == "mxfp4-marlin":
    sys.exit("INFO starting\\nValueError: no such backend\\nINFO ending")
if name == "mxfp4-humming":
    time.sleep(600)
print("READY " + json.dumps({"ready_seconds": 1.5, "kv_cache_tokens": 10000}), flush=True)
for line in sys.stdin:
    question, asked = json.loads(line), asked + 1
    if name == "mxfp4-triton" and asked == 3:
        sys.exit("CUDA error")
    if name == "mxfp4-flashinfer":
        time.sleep(600)
    with (Path(job["directory"]) / "asked").open("a") as file:
        file.write(json.dumps([name, question]) + "\\n")
    cell = json.dumps(question.get("cell"))
    counts[cell] = counts.get(cell, -1) + 1
    answers = {
        "wall": {"ms": float(counts[cell])},
        "device": {"device_ms": 0.5, "kernels_us": {"linear": 500.0}},
        "state": {"compiled_after_ready": ["linear"]},
        "routing": {"distinct_experts": None},
    }
    print("not for the parent", flush=True)
    print("RESULT " + json.dumps(answers[question["do"]]), flush=True)
"""
ONE, EIGHT, PROMPT = Cell(DECODE, 128, 1), Cell(DECODE, 128, 8), Cell(PREFILL, 2048)
PLAN = Plan(cells=(ONE, EIGHT, PROMPT), rounds=3, steps=16, budget=None, start=30)


def job(name: str, directory: Path = Path("weights"), **fields: object) -> Job:
    made = Job(name, directory, gib=24, kv_gib=None, max_model_len=1024, max_num_seqs=8)
    return replace(made, **fields)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    script = tmp_path / "contender.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(engine, "CONTENDER", [sys.executable, str(script)])
    return tmp_path


def questions(directory: Path) -> list[tuple[str, dict]]:
    return [tuple(json.loads(line)) for line in (directory / "asked").read_text().splitlines()]


def test_engines_take_turns_cell_by_cell(stand_in):
    names = ["plugin", "plugin-bf16", "dequantize-all"]
    results = measure_all([[job(name, stand_in) for name in names]], PLAN, save=lambda results: None)
    asked = [
        (name, question["do"], question["cell"]["batch"]) for name, question in questions(stand_in) if "cell" in question
    ]
    one_round = [(name, batch) for batch in (1, 8, 1) for name in names]  # the last is the prompt
    walls = [(name, batch) for name, do, batch in asked if do == "wall"]
    assert walls == one_round * (1 + PLAN.rounds)
    assert [(name, batch) for name, do, batch in asked if do == "device"] == one_round
    assert [do for _, do, _ in asked] == ["wall"] * len(walls) + ["device"] * len(one_round)
    for name in names:
        assert [*results[name]["cells"]] == ["decode 1x128", "decode 8x128", "prefill 2048"]
        for cell in results[name]["cells"].values():
            assert cell == {"ms": [1, 2, 3], "device_ms": 0.5, "kernels_us": {"linear": 500.0}}  # the first, 0, is warm-up
        assert results[name]["ready_seconds"] == 1.5
        assert results[name]["together"] == 3


def test_a_slow_contender_measures_fewer_steps_and_all_warm_up_briefly(stand_in):
    measure_all([[job(name, stand_in) for name in ("plugin", "dequantize-all")]], PLAN, save=lambda results: None)
    steps = {"plugin": [], "dequantize-all": []}
    for name, question in questions(stand_in):
        if question["do"] == "wall":
            steps[name].append(question["steps"])
    assert steps["plugin"] == [rounds.WARM_UP_STEPS] * 3 + [16] * 9
    assert steps["dequantize-all"] == [rounds.WARM_UP_STEPS] * 3 + [4] * 9


@pytest.mark.slow
def test_what_fails_is_one_line_and_the_others_go_on(stand_in, monkeypatch, capsys):
    monkeypatch.setattr(engine, "ANSWER_SECONDS", 2.0)
    saved = []
    group = [job(name, stand_in) for name in CONTENDERS if name != "plugin-bf16"]
    results = measure_all([group], replace(PLAN, start=5.0), save=lambda results: saved.append(json.dumps(results)))
    failures = {name: result["failed"] for name, result in results.items() if "failed" in result}
    assert failures == {
        "mxfp4-marlin": "ended with status 1: ValueError: no such backend",
        "mxfp4-triton": "ended with status 1: CUDA error",
        "mxfp4-humming": "was not ready in time (--start-minutes)",
        "mxfp4-flashinfer": "did not answer for 2 s",
    }
    for name in ("plugin", "dequantize-all"):
        assert [cell["ms"] for cell in results[name]["cells"].values()] == [[1, 2, 3]] * 3
    assert f"mxfp4-marlin: failed: ended with status 1: ValueError: no such backend; its log is {stand_in}" in (
        capsys.readouterr().out
    )
    # Before the first round, after the warm-up, each round, the state, each cell's device time, and at the end.
    assert len(saved) == 2 + PLAN.rounds + 1 + 3 + 1
    assert json.loads(saved[5])["plugin"]["compiled_after_ready"] == ["linear"]
    assert json.loads(saved[2])["plugin"]["cells"]["prefill 2048"] == {"ms": [1]}
    assert json.loads(saved[-1]) == json.loads(json.dumps(results))
    facts = {"gpu": "a GPU", "versions": {}, "read_tb_per_second": 3.0, "settings": "so"}
    text = report(facts | {"files_gb_per_second": dict.fromkeys(weights.KINDS, 5.0), "contenders": results})
    assert "mxfp4-humming: failed: was not ready in time (--start-minutes)" in text


def test_results_so_far_stay_when_a_contender_dies(stand_in):
    cells = tuple(Cell(PREFILL, tokens) for tokens in (1, 2))
    results = measure_all([[job("mxfp4-triton", stand_in)]], replace(PLAN, cells=cells), save=lambda results: None)
    assert results["mxfp4-triton"]["failed"]
    # Its third question, the first after the warm-up of two cells, killed it.
    assert results["mxfp4-triton"]["cells"] == {}
    results = measure_all([[job("mxfp4-triton", stand_in)]], replace(PLAN, cells=cells[:1]), save=lambda results: None)
    assert results["mxfp4-triton"]["cells"] == {"prefill 1": {"ms": [1]}}


def test_a_killed_process_is_named_by_its_signal(stand_in):
    contender = engine.Engine(job("plugin", stand_in))
    contender.wait_until_ready(time.monotonic() + 30)
    contender._process.kill()
    assert contender.wall_ms(ONE, 1) is None
    assert contender.failure == "ended with SIGKILL: no word"
    assert contender.device(ONE) is None
    contender.dismiss()
    contender.end()


def test_what_a_failed_contender_started_ends_with_it(tmp_path, monkeypatch):
    """A compiler that goes on would slow down those that measure."""
    script = tmp_path / "contender.py"
    child = "[sys.executable, '-c', 'import time; time.sleep(600)']"
    script.write_text(f"import subprocess, sys\nprint(subprocess.Popen({child}).pid, file=sys.stderr)\nsys.exit(3)")
    monkeypatch.setattr(engine, "CONTENDER", [sys.executable, str(script)])
    contender = engine.Engine(job("plugin", tmp_path))
    contender.wait_until_ready(time.monotonic() + 60)  # the child holds the pipe open
    pid = int(contender.job.log.read_text())
    assert contender.failure == f"ended with status 3: {pid}"
    contender.dismiss()
    contender.end()
    until = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("a\n  raise ValueError(x)\nvllm.Error2: no\nValueError: got 3\n", "ValueError: got 3"),
        (
            "ERROR 11-25 17:00 [core.py:1] torch.OutOfMemoryError: CUDA out of memory.\nbye\n",
            "torch.OutOfMemoryError: CUDA",
        ),
        ("one\nlast words\n\n", "last words"),
        ("killed here\nWARNING 11-25 [base.py:380] ValueError: survived\n", "killed here"),
        ("killed here\n(Main pid=1) WARNING 11-25 [base.py:380] ValueError: survived\n", "killed here"),
        ("RuntimeError: " + "x" * 500, "RuntimeError: " + "x" * (engine.REASON_LENGTH - len("RuntimeError: "))),
    ],
)
def test_the_reason_is_the_last_error_of_the_log(log, said):
    assert engine.reason(1, log).startswith(f"ended with status 1: {said}")
    assert "\n" not in engine.reason(1, log)
    assert len(engine.reason(1, log)) < 250


class Clock:
    """Each look at it takes a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (None, 3),
        (0, 1),  # one round is always measured
        (3.5, 1),  # the clock is looked at once before, and rounds begin 1, 3 and 5 seconds later; each takes one
        (4.5, 2),
        (100, 3),
    ],
)
def test_no_round_starts_that_would_end_after_the_budget(stand_in, capsys, budget, expected):
    results = measure_all(
        [[job("plugin", stand_in)]], replace(PLAN, budget=budget), save=lambda results: None, clock=Clock()
    )
    assert len(results["plugin"]["cells"]["prefill 2048"]["ms"]) == expected
    assert results["plugin"]["cells"]["prefill 2048"]["device_ms"] == 0.5  # measured all the same
    assert ("is left out: it would not end in time" in capsys.readouterr().out) == (expected < 3)


def test_each_group_gets_its_share_of_the_budget(stand_in, monkeypatch):
    seen = []
    monkeypatch.setattr(rounds, "_measure", lambda engines, plan, deadline, *rest: seen.append(deadline))
    groups = [[job(name, stand_in)] for name in ("plugin", "plugin-bf16")]
    measure_all(groups, replace(PLAN, budget=100.0), save=lambda results: None, clock=lambda: 1000.0)
    assert seen == [1050, 1100]


def test_a_cell_that_a_cache_cannot_hold_is_left_out(capsys):
    jobs = [job("plugin"), job("mxfp4-triton")]
    needs = 8 * EIGHT.length(PLAN.steps)
    results = {"plugin": {"kv_cache_tokens": needs}, "mxfp4-triton": {"kv_cache_tokens": needs - 1}}
    turns = turns_of(jobs, replace(PLAN, cells=(ONE, EIGHT)), results)
    assert turns == [(ONE, ["plugin", "mxfp4-triton"]), (EIGHT, ["plugin"])]
    assert f"mxfp4-triton: decode 8x128 is left out: it needs {needs} tokens" in capsys.readouterr().out
    failed = {"plugin": {}, "mxfp4-triton": {"kv_cache_tokens": None}}
    assert [names for _, names in turns_of(jobs, PLAN, failed)] == [["plugin", "mxfp4-triton"]] * 3


def test_only_engines_with_lora_are_asked_for_adapters():
    jobs = [job("plugin"), job("plugin", lora_rank=16)]
    turns = turns_of(jobs, PLAN, {"plugin": {}, "plugin-lora": {}})
    assert {cell.name: names for cell, names in turns} == {
        "decode 1x128": ["plugin", "plugin-lora"],
        "decode 8x128": ["plugin", "plugin-lora"],
        "prefill 2048": ["plugin", "plugin-lora"],
        "decode 1x128, 1 adapter": ["plugin-lora"],
        "decode 8x128, 1 adapter": ["plugin-lora"],
        f"decode 8x128, {ADAPTERS} adapters": ["plugin-lora"],
    }
    assert adapter_cells([ONE])[-1] == Cell(DECODE, 128, 1, ADAPTERS)


@pytest.mark.parametrize(
    ("together", "kv_gib", "sizes", "cache"),
    [
        (1, None, [1] * 9, None),
        (5, None, [5, 4], SHARED_KV_GIB),
        (9, 1.6, [9], 1.6),
        (2, 1.6, [2, 2, 2, 2, 1], 1.6),
    ],
)
def test_who_is_up_with_others_has_a_cache_of_fixed_size(together, kv_gib, sizes, cache):
    groups = grouped([job(name, kv_gib=kv_gib) for name in CONTENDERS], together)
    assert [each.contender for group in groups for each in group] == [*CONTENDERS]
    assert [len(group) for group in groups] == sizes
    assert {each.kv_gib for group in groups for each in group} == {cache}


def test_a_job_reaches_its_process_as_it_is():
    sent = job("mxfp4-triton", Path("some where"), kv_gib=1.5, lora_rank=8)
    assert Job.from_json(sent.to_json()) == sent
    assert sent.checkpoint == Path("some where/mxfp4")


@pytest.mark.parametrize("text", ["8", "0x128", "8x", "x8", "8x128x1", "-1x5"])
def test_a_cell_on_the_command_line_is_batch_and_tokens(text):
    assert decode_cell("8x128") == EIGHT
    with pytest.raises(argparse.ArgumentTypeError, match="BATCHxTOKENS"):
        decode_cell(text)


def test_the_command_line_makes_the_plan():
    args = command_line.parser().parse_args([])
    plan = command_line.plan_of(args)
    assert [cell.name for cell in plan.cells] == [
        *(f"decode {batch}x128" for batch in (1, 8, 32, 64, 128)),
        "decode 1x8192",
        "prefill 2048",
        "prefill 8192",
    ]
    assert plan.batches == [1, 8, 32, 64, 128]
    assert (plan.budget, args.gib) == (None, DEFAULT_GIB)
    jobs = command_line.jobs_of(args, max_num_seqs=128)
    assert [each.name for each in jobs] == [*CONTENDERS]
    with_lora = command_line.parser().parse_args(["--lora", "16", "--contenders", "plugin", "--minutes", "2"])
    assert [each.name for each in command_line.jobs_of(with_lora, 8)] == ["plugin", "plugin-lora"]
    assert command_line.plan_of(with_lora, spent_seconds=30).budget == 90


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--decode", "--prefill"], "nothing to measure"),
        (["--rounds", "0"], "nothing to measure"),
        (["--together", "0"], "nothing to measure"),
        (["--max-model-len", "4096"], "--max-model-len is 4096"),
        (["--decode", "1x131000"], "decode 1x131000 takes 131170 tokens"),
        (["--kv-gib", "1"], "--max-model-len 131072 takes 3.00 GiB and more, --kv-gib is 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        command_line.plan_of(command_line.parser().parse_args(words))


def test_a_run_ends_in_tables_and_a_file(stand_in, monkeypatch, capsys):
    facts = {"gpu": "a GPU", "versions": {"vllm": "0.32.0"}, "read_tb_per_second": 3.0}
    facts["files_gb_per_second"] = dict.fromkeys(weights.KINDS, 5.0)
    monkeypatch.setattr(command_line, "prepare", lambda jobs: facts)
    words = "serving --contenders plugin mxfp4-marlin dequantize-all --together 3 --rounds 2 --minutes 5 --kernels plugin"
    monkeypatch.setattr(sys, "argv", [*words.split(), "--directory", str(stand_in)])
    monkeypatch.chdir(stand_in)
    command_line.main()
    results = json.loads((stand_in / "metrics" / "serving.json").read_text())
    assert results["contenders"]["plugin"]["cells"]["decode 1x8192"]["ms"] == [1, 2]
    assert "failed" in results["contenders"]["mxfp4-marlin"]
    said = capsys.readouterr().out
    assert "| decode 32x128 " in said
    assert "plugin: decode 64x128 is left out: it needs 17280 tokens of KV cache, there are 10000" in said
    assert f"{SHARED_KV_GIB} GiB of KV cache each, max_model_len 131072" in said
    assert "plugin, decode 1x128: device time of a step" in said


@pytest.mark.slow
def test_real_engines_take_turns(tmp_path, monkeypatch):
    """On the CPU, where a profiler of the GPU sees nothing."""
    monkeypatch.setattr(engine, "CONTENDER", [sys.executable, str(ROOT / "tests" / "contender_on_cpu.py")])
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{sys.path[0]}")
    names = ("plugin", "plugin-bf16")
    for name in names:
        weights.ensure(tmp_path, CONTENDERS[name].weights, TINY, "cpu")
    cells = (Cell(DECODE, 20, 1), Cell(DECODE, 20, 3), Cell(PREFILL, 100))
    jobs = [job(name, tmp_path, max_num_seqs=4, kv_gib=1.0) for name in names]
    results = measure_all([jobs], Plan(cells, rounds=2, steps=6, budget=None, start=900), save=lambda results: None)
    for name in names:
        assert "failed" not in results[name], results[name]["failed"]
        assert [*results[name]["cells"]] == ["decode 1x20", "decode 3x20", "prefill 100"]
        assert all(len(cell["ms"]) == 2 and min(cell["ms"]) > 0 for cell in results[name]["cells"].values())
        assert all(cell["device_ms"] == 0 and cell["kernels_us"] == {} for cell in results[name]["cells"].values())
        assert results[name]["load_seconds"] is not None
        assert results[name]["prepared_gb_per_second"] <= results[name]["load_gb_per_second"]
        values = 3 * TINY.hidden * TINY.intermediate
        codes, absmax, bias = values / 2, values / 64 * 4, 2 * (2 * TINY.intermediate + TINY.hidden)
        assert results[name]["expert_bytes"] == TINY.layers * TINY.experts_per_token * (codes + absmax + bias)
        assert results[name]["distinct_experts"]["1"] == TINY.experts_per_token
        assert results[name]["distinct_experts"]["3"] >= TINY.experts_per_token
