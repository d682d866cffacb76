"""What `python -m benchmarks.serving` does around its engines, which need a GPU: groups, talking to a process, tables."""

import sys
from pathlib import Path

import pytest
import torch

from benchmarks.serving import adapters, parent
from benchmarks.serving.contender import ROUTED_TOKENS, busy, distinct_experts, read_log
from benchmarks.serving.jobs import BATCHES, CONTENDERS, PREFILLS, Job, grouped
from benchmarks.serving.tables import report
from gptoss_nf4.adapters.adapter import Adapter
from gptoss_nf4.format.dimensions import Dimensions

# As vLLM 0.32 writes them (model_loader/default_loader.py, v1/core/kv_cache_utils.py).
LOG = """\
INFO 11-25 17:00:00 [default_loader.py:502] Loading weights took 5.40 seconds
INFO 11-25 17:00:09 [kv_cache_utils.py:2328] GPU KV cache size: 396,995 tokens, \
Maximum concurrency for 131,072 tokens per request: 3.03x
"""

# A contender's side of the conversation. `mxfp4-marlin` fails while it starts, `mxfp4-triton` while it measures.
STAND_IN = """\
import json, sys
job = json.loads(sys.argv[1])
name = job["contender"]
if name == "mxfp4-marlin":
    sys.exit("out of memory")
print("READY", flush=True)
while sys.stdin.readline() == "GO\\n":
    if name == "mxfp4-triton":
        sys.exit("a bug")
    print("not for the parent", flush=True)
    print("RESULT " + json.dumps({"kv_gib": job["kv_gib"]}), flush=True)
"""


def job(name: str, directory: Path = Path("weights"), kv_gib: float | None = None) -> Job:
    return Job(name, directory, gib=24, kv_gib=kv_gib, max_model_len=1024, rounds=1, long_prompt=False, profile=False)


def result(tokens_per_second: float, prefill_ms: float) -> dict:
    return {
        "batches": [{"batch": batch, "output_tokens_per_second": tokens_per_second * batch} for batch in BATCHES],
        "prefill_ms": {str(tokens): prefill_ms for tokens in PREFILLS},
        "kv_cache_tokens": 1000,
        "load_gb_per_second": None,
        "full_length_requests": 3.03,
        "ready_seconds": 30.0,
        "distinct_experts": {str(batch): 4.0 for batch in BATCHES},
    }


def cells(table: str, first: str) -> list[str]:
    """The cells of the row that begins with `first`."""
    (row,) = [line for line in table.splitlines() if line.startswith(f"| {first} ")]
    return [cell.strip() for cell in row.strip("|").split("|")]


@pytest.mark.parametrize(
    ("together", "kv_gib", "expected"),
    [
        (1, None, [["nf4"], ["mxfp4-marlin"], ["mxfp4-triton"], ["nf4-dequantize-all"]]),
        (2, None, [["nf4"], ["mxfp4-marlin", "mxfp4-triton"], ["nf4-dequantize-all"]]),
        (3, None, [["nf4"], ["mxfp4-marlin", "mxfp4-triton", "nf4-dequantize-all"]]),
        (4, 1.6, [["nf4", "mxfp4-marlin", "mxfp4-triton", "nf4-dequantize-all"]]),
    ],
)
def test_the_plugin_starts_alone_unless_its_cache_is_fixed(together, kv_gib, expected):
    groups = grouped([job(name, kv_gib=kv_gib) for name in CONTENDERS], together)
    assert [[each.contender for each in group] for group in groups] == expected
    for group in groups:
        for each in group:
            assert (each.kv_gib is None) == (kv_gib is None and len(group) == 1)
            assert kv_gib is None or each.kv_gib == kv_gib


def test_a_job_reaches_its_process_as_it_is():
    sent = job("mxfp4-triton", Path("some where"), 1.5)
    assert Job.from_json(sent.to_json()) == sent
    assert sent.checkpoint == Path("some where/mxfp4")


def test_what_fails_is_left_out_and_the_others_measure(tmp_path, monkeypatch, capsys):
    script = tmp_path / "contender.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(parent, "CONTENDER", [sys.executable, str(script)])
    groups = [[job("nf4", tmp_path)], [job(name, tmp_path, 5.0) for name in [*CONTENDERS][1:]]]
    results = parent.measure_all(groups, passes=2)
    assert results == {"nf4": {"kv_gib": None}, "nf4-dequantize-all": {"kv_gib": 5.0}}
    said = capsys.readouterr().out
    assert f"mxfp4-marlin: failed, see {tmp_path}/mxfp4-marlin.log" in said
    assert (tmp_path / "mxfp4-marlin.log").read_text() == "out of memory\n"
    assert "mxfp4-triton: failed" in said


def test_an_engine_that_ended_before_it_was_asked_has_failed(tmp_path, monkeypatch):
    """Both of its passes: it may end at any time between them."""
    script = tmp_path / "contender.py"
    script.write_text('print("READY", flush=True)')
    monkeypatch.setattr(parent, "CONTENDER", [sys.executable, str(script)])
    engine = parent.Engine(job("nf4", tmp_path))
    engine.wait_until_ready()
    engine._process.wait()
    assert engine.ready
    assert [engine.measure(), engine.measure()] == [None, None]
    engine.end()


def test_results_of_several_passes_become_their_medians():
    passes = [{"a": [1.0, n], "b": {"c": n}, "d": None} for n in (5, 1, 3)]
    assert parent.medians(passes) == {"a": [1.0, 3], "b": {"c": 3}, "d": None}


def test_the_adapter_fits_the_model_and_touches_all_of_it(tmp_path):
    d = Dimensions(
        layers=2,
        hidden=32,
        intermediate=16,
        experts=4,
        experts_per_token=2,
        heads=2,
        kv_heads=1,
        head_dim=16,
        vocabulary=64,
    )
    adapters.ensure(tmp_path / "adapter", d, rank=4)
    layers = dict(Adapter(tmp_path / "adapter").layers(d))
    assert [*layers] == [0, 1]
    for layer, deltas in layers.items():
        names = {name.removeprefix(f"model.layers.{layer}.") for name in deltas}
        assert names == {*(f"self_attn.{each}_proj" for each in "qkvo"), "mlp.experts.w13", "mlp.experts.w2"}
        assert all(delta.a.shape[-2] == 4 and delta.b.count_nonzero() for delta in deltas.values())


def test_the_log_tells_of_loading_and_of_the_cache(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(5400))
    assert read_log(LOG, tmp_path) == {
        "load_seconds": 5.4,
        "load_gb_per_second": pytest.approx(1e-6),
        "kv_cache_tokens": 396995,
        "full_length_requests": 3.03,
    }
    assert set(read_log("", tmp_path).values()) == {None}


def test_distinct_experts_are_counted_in_each_batch():
    same = torch.tensor([[0, 1]]).repeat(ROUTED_TOKENS, 1)
    other = torch.arange(2 * ROUTED_TOKENS).view(ROUTED_TOKENS, 2)  # no expert twice
    assert distinct_experts([same]) == dict.fromkeys(BATCHES, 2)
    assert distinct_experts([same, other]) == {batch: (2 + 2 * batch) / 2 for batch in BATCHES}


def test_the_tables_say_how_many_times_as_fast_the_plugin_is():
    contenders = {"nf4": result(300, 50), "mxfp4-marlin": result(200, 75)}
    contenders["mxfp4-marlin"] |= {"distinct_experts": None, "load_gb_per_second": 2.5}
    contenders["nf4"] |= {"full_length_prompt_seconds": 26.7, "kernels_us_per_step": {"1": {"all": 2092.4}}}
    text = report({"gpu": "a GPU", "read_gb_per_second": 5.2, "contenders": contenders})
    speed, against, routing = text.split("\n\n")[1:4]
    assert cells(speed, "nf4") == ["nf4", "300", "2400", "9600", "50.0", "50.0", "1000", "-", "30"]
    assert cells(speed, "mxfp4-marlin")[-2:] == ["2.5", "30"]
    assert cells(against, "mxfp4-marlin") == ["mxfp4-marlin", *["1.50x"] * 5]
    assert cells(against, "nf4") == ["nf4", *["1.00x"] * 5]
    assert cells(routing, "nf4") == ["nf4", *["4.0"] * 3]
    assert cells(routing, "mxfp4-marlin") == ["mxfp4-marlin", *["-"] * 3]
    assert "nf4: a prompt of full length: 26.7 s; 3.03 of full length fit" in text
    assert cells(text, "all") == ["all", "2092"]


def test_the_tables_tell_of_adapters():
    contenders = {"nf4": result(300, 50), "nf4-lora": result(290, 50)}
    contenders["nf4-lora"]["adapters"] = {"one_adapter": [280, 2000, 9000], "spread": 8000}
    text = report({"gpu": "a GPU", "read_gb_per_second": 5.2, "contenders": contenders})
    assert cells(text.split("\n\n")[-1], "nf4-lora") == ["nf4-lora", "280", "2000", "9000", "8000"]


def test_the_tables_need_no_plugin_among_the_contenders():
    text = report({"gpu": "a GPU", "read_gb_per_second": 5.2, "contenders": {"mxfp4-triton": result(200, 75)}})
    assert "plugin against" not in text
    assert cells(text.split("\n\n")[1], "mxfp4-triton")[1] == "200"


def test_the_method_that_dequantizes_all_is_still_there():
    """The contender exchanges it by name."""
    from gptoss_nf4.vllm.moe import Nf4MoEMethod

    assert callable(Nf4MoEMethod.packs)


def test_the_devices_time_is_that_of_the_union_with_short_gaps():
    assert busy([]) == 0
    assert busy([(0, 10), (2, 8)]) == 10  # one within another
    assert busy([(5, 10), (0, 6)]) == 10  # in any order
    assert busy([(0, 10), (15, 20)]) == 20  # a gap of 5
    assert busy([(0, 10), (110, 120)]) == 20  # one of 100
