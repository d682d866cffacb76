"""What the tables of `python -m benchmarks.serving` say of given results."""

import pytest

from benchmarks.serving.compare import EXPERT_KERNELS, bandwidth_share, best_other
from benchmarks.serving.tables import kernels, report
from benchmarks.values import Values


def result(decode_ms: list[float], prefill_ms: list[float], **fields: object) -> dict:
    cells = {
        "decode 1x128": {"ms": decode_ms, "device_ms": decode_ms[0] / 2, "kernels_us": {"linear": 100.0}},
        "decode 8x128": {"ms": [2 * ms for ms in decode_ms], "device_ms": decode_ms[0]},
        "prefill 2048": {"ms": prefill_ms, "device_ms": 40.0},
    }
    told = {
        "together": 3,
        "cells": cells,
        "ready_seconds": 30.0,
        "load_gb_per_second": 2.5,
        "prepared_gb_per_second": 2.0,
        "model_gib": 12.04,
        "kv_cache_tokens": 1000,
        "full_length_requests": 3.03,
        "peak_gib": 20.5,
        "compiled_after_ready": [],
        "distinct_experts": {"1": 4.0, "8": 18.9},
        "expert_bytes": 1_200_000_000,
    }
    return told | fields


def results(**contenders: dict) -> dict:
    return {
        "gpu": "a GPU",
        "versions": {"vllm": "0.32.0", "torch": "2.11"},
        "read_tb_per_second": 3.0,
        "files_gb_per_second": {"nf4-float16": 5.0, "nf4-bfloat16": 5.0, "mxfp4": 10.0},
        "settings": "24 GiB each",
        "contenders": {name.replace("_", "-"): contender for name, contender in contenders.items()},
    }


def three() -> dict:
    return results(
        plugin=result([2.0, 2.1, 2.0], [50.0, 50.0, 50.0]),
        mxfp4_marlin=result([3.0, 3.0, 3.3], [75.0, 70.0, 80.0], distinct_experts=None, load_gb_per_second=None),
        dequantize_all=result([25.0, 25.0, 25.0], [40.0, 41.0, 42.0]),
    )


def table(text: str, corner: str) -> dict[str, list[str]]:
    """The cells of the table whose first column is called `corner`, by their row's first one."""
    lines = text.splitlines()
    (start,) = [number for number, line in enumerate(lines) if line.startswith(f"| {corner} ")]
    rows = {}
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        first, *others = [cell.strip() for cell in line.strip("|").split("|")]
        if first.strip("-"):  # not the rule below the heading
            rows[first] = others
    return rows


def test_values_are_a_median_with_what_they_spread_over():
    assert Values((2.0, 3.0, 10.0)).median == 3
    assert Values((10.0, 10.5, 11.0)).spread == pytest.approx(1 / 10.5)
    assert Values((9.5, 10.0, 10.4)).text(1) == "10.0 (9.5-10.4)"
    assert Values((9.5, 10.0, 10.6)).text(1) == "10.0 (9.5-10.6)!"  # 11 %
    assert not Values((9.5, 10.0, 10.5)).wide  # 10 % is not above 10 %
    assert Values((2.0, 4.0)).rates(8) == Values((4.0, 2.0))
    assert Values((7.0,)).text(0) == "7 (7-7)"


def test_decoding_is_told_in_tokens_a_second_against_the_best_other():
    text = report(three())
    decode = table(text, "tokens/s")
    assert decode["tokens/s"] == ["plugin", "mxfp4-marlin", "dequantize-all", "plugin / best other"]
    assert decode["decode 1x128"] == ["500 (476-500)", "333 (303-333)", "40 (40-40)", "1.50 (mxfp4-marlin)"]
    assert decode["decode 8x128"] == ["2000 (1905-2000)", "1333 (1212-1333)", "160 (160-160)", "1.50 (mxfp4-marlin)"]
    on_device = next(part for part in text.split("\n\n") if "device ms" in part)
    assert table(on_device, "device ms")["decode 1x128"] == ["1.00", "1.50", "12.50", "1.50 (mxfp4-marlin)"]


def test_prefill_is_told_in_milliseconds_and_its_best_other_may_be_another():
    prefill = table(report(three()), "ms to the first token")
    assert prefill["prefill 2048"] == ["50.0 (50.0-50.0)", "75.0 (70.0-80.0)!", "41.0 (40.0-42.0)", "0.82 (dequantize-all)"]


def test_wide_spreads_are_listed():
    text = report(three())
    assert "mxfp4-marlin: spread above 10%: prefill 2048" in text
    assert "plugin: spread" not in text


def test_setups_tell_configuration_loading_and_memory():
    rows = table(report(three()), "contender")
    assert rows["plugin"] == [
        *("NF4, float16, residual_scale 1/64", "2.5", "50%", "2.0", "30", "12.04", "20.5", "1000", "0", "3"),
    ]
    assert rows["dequantize-all"][0] == "NF4, bfloat16, every expert dequantized"
    assert rows["mxfp4-marlin"][:3] == ["MXFP4, bfloat16, marlin", "-", "-"]


def test_routing_leaves_out_who_routes_in_its_kernel():
    rows = table(report(three()), "distinct experts a layer")
    assert rows == {
        "distinct experts a layer": ["batch 1", "batch 8"],
        "plugin": ["4.0", "18.9"],
        "dequantize-all": ["4.0", "18.9"],
    }


def test_both_configurations_of_the_plugin_have_a_ratio_and_neither_is_an_other():
    both = results(
        plugin=result([2.0], [50.0]), plugin_bf16=result([1.0], [50.0]), mxfp4_triton=result([3.0], [50.0]), failed={}
    )
    del both["contenders"]["failed"]
    decode = table(report(both), "tokens/s")
    assert decode["tokens/s"][-2:] == ["plugin / best other", "plugin-bf16 / best other"]
    assert decode["decode 1x128"][-2:] == ["1.50 (mxfp4-triton)", "3.00 (mxfp4-triton)"]
    assert best_other({"plugin": 1.0, "plugin-bf16": 1.0}) is None
    assert best_other({"plugin": 1.0, "mxfp4-marlin": None, "mxfp4-triton": 3.0}) == ("mxfp4-triton", 3.0)


def test_engines_with_lora_are_compared_among_themselves():
    with_lora = results(
        plugin=result([2.0], [50.0]),
        plugin_lora=result([2.5], [50.0]),
        mxfp4_marlin=result([3.0], [50.0]),
        mxfp4_marlin_lora=result([5.0], [50.0]),
    )
    for name, ms in (("plugin-lora", 2.0), ("mxfp4-marlin-lora", 8.0)):
        with_lora["contenders"][name]["cells"]["decode 8x128, 8 adapters"] = {"ms": [ms]}
    text = report(with_lora)
    without, lora = (part for part in text.split("\n\n") if part.startswith("| tokens/s"))
    assert table(without, "tokens/s")["tokens/s"] == ["plugin", "mxfp4-marlin", "plugin / best other"]
    rows = table(lora, "tokens/s")
    assert rows["decode 1x128"][-1] == "2.00 (mxfp4-marlin-lora)"
    assert rows["decode 8x128, 8 adapters"] == ["4000 (4000-4000)", "1000 (1000-1000)", "4.00 (mxfp4-marlin-lora)"]


def test_who_failed_is_a_line_and_keeps_what_it_measured():
    found = three()
    found["contenders"]["mxfp4-humming"] = {"together": 4, "cells": {}, "failed": "ended with SIGKILL: no memory"}
    found["contenders"]["mxfp4-marlin"]["failed"] = "did not answer for 120 s"
    del found["contenders"]["mxfp4-marlin"]["cells"]["prefill 2048"]
    del found["contenders"]["plugin"]["cells"]["prefill 2048"]["device_ms"]
    text = report(found)
    assert "mxfp4-humming: failed: ended with SIGKILL: no memory" in text
    assert table(text, "contender")["mxfp4-humming"] == ["MXFP4, bfloat16, humming", *["-"] * 8, "4"]
    assert table(text, "tokens/s")["decode 1x128"][1] == "333 (303-333)"
    assert table(text, "ms to the first token")["prefill 2048"][:2] == ["50.0 (50.0-50.0)", "-"]


def test_compilations_after_ready_are_counted_and_named():
    found = three()
    found["contenders"]["plugin"]["compiled_after_ready"] = ["shrink", "linear", "linear"]
    text = report(found)
    assert table(text, "contender")["plugin"][-2] == "3"
    assert "plugin: compiled after it was ready: linear, shrink" in text


def test_who_took_turns_is_told():
    found = three()
    assert "All took turns, cell by cell." in report(found)
    found["contenders"]["plugin"]["together"] = 1
    assert "Only those up together took turns." in report(found)
    assert "plugin: 3.03 requests of the full length fit" in report(found)  # of the cache that --gib leaves


def test_the_expert_kernels_share_of_the_bandwidth_is_of_one_token():
    profile = {"swiglu_experts": 400.0, "down_experts": 200.0, "linear": 900.0}
    plugin = result([2.0], [50.0])
    plugin["cells"]["decode 1x128"]["kernels_us"] = profile
    plugin["cells"]["decode 8x128"]["kernels_us"] = {"swiglu_experts": 1.0}
    # 1.2 GB in 600 us are 2 TB/s, of 3.
    assert bandwidth_share(plugin, 3.0) == {"us": 600, "bytes": 1_200_000_000, "share": pytest.approx(2 / 3)}
    rows = table(report(results(plugin=plugin, mxfp4_marlin=plugin)), "expert kernels at one token")
    assert rows["plugin"] == ["1200", "600", "67%"]
    assert "mxfp4-marlin" not in rows
    assert bandwidth_share(result([2.0], [50.0]), 3.0) is None
    del plugin["cells"]["decode 1x128"]
    assert bandwidth_share(plugin, 3.0) is None


def test_the_expert_kernels_are_called_so():
    from gptoss_nf4.vllm.kernels import small

    for name in EXPERT_KERNELS:
        assert getattr(small, name).fn.__name__ == name


def test_the_time_of_kernels_is_printed_for_those_asked_for():
    text = kernels(three()["contenders"], ["plugin"])
    assert "plugin, decode 1x128: device time of a step" in text
    assert table(text, "kernel")["linear"] == ["100"]
    assert kernels(three()["contenders"], []) == ""
