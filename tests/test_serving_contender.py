"""A contender of `python -m benchmarks.serving` without its engine: its weights, its log, and what it counts."""

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import weights
from benchmarks.serving import adapters
from benchmarks.serving.contender import WHOLE_LOAD, compilations, graph_sizes, read_log
from benchmarks.serving.jobs import CONTENDERS, UTILIZATION
from benchmarks.serving.measuring import busy
from benchmarks.serving.routing import ROUTED_TOKENS, distinct_experts
from gptoss_nf4.adapters.adapter import Adapter
from gptoss_nf4.check.fitting import require_fitting
from gptoss_nf4.format.blocks import INPUTS, OUTPUTS, absmax_shape
from gptoss_nf4.format.dimensions import Dimensions
from gptoss_nf4.samples.embedded import TINY
from gptoss_nf4.storage.checkpoint import Checkpoint

# As vLLM 0.32 writes them (model_loader/default_loader.py, v1/worker/gpu_model_runner.py, v1/core/kv_cache_utils.py).
LOG = f"""\
INFO 11-25 17:00:00 [default_loader.py:502] Loading weights took 5.40 seconds
{WHOLE_LOAD.format(10.8)}
INFO 11-25 17:00:02 [gpu_model_runner.py:5150] Model loading took 12.04 GiB memory and 11.301234 seconds
INFO 11-25 17:00:09 [kv_cache_utils.py:2328] GPU KV cache size: 396,995 tokens, \
Maximum concurrency for 131,072 tokens per request: 3.03x
"""


def test_graphs_are_captured_for_every_batch():
    assert graph_sizes(128) == [1, 2, 4, 8, 16, 32, 64, 128]
    assert graph_sizes(100) == [1, 2, 4, 8, 16, 32, 64, 100]
    assert graph_sizes(1) == [1]


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


def test_the_weights_of_both_dtypes_fit_their_config_and_share_what_is_4_bit(tmp_path):
    for kind, dtype in weights.NF4_DTYPES.items():
        checkpoint = Checkpoint(weights.ensure(tmp_path, kind, TINY, "cpu"))
        require_fitting(checkpoint)
        assert checkpoint.config["dtype"] == dtype
        scale = checkpoint.config["quantization_config"]["residual_scale"]
        assert scale == {"float16": 1 / 64, "bfloat16": 1}[dtype]
        for layer in range(TINY.layers):
            name = f"layer-{layer}.safetensors"
            assert (tmp_path / kind / name).samefile(tmp_path / weights.layers_of(kind) / name)
    made = (tmp_path / "nf4-float16" / "dense.safetensors").stat().st_mtime_ns
    weights.ensure(tmp_path, "nf4-float16", TINY, "cpu")
    assert (tmp_path / "nf4-float16" / "dense.safetensors").stat().st_mtime_ns == made
    assert {contender.weights for contender in CONTENDERS.values()} == {*weights.KINDS}


def test_the_weights_of_both_layouts_are_the_same(tmp_path):
    """And only what is said to run along the outputs does."""
    inputs, outputs = (
        load_file(weights.ensure(tmp_path, f"nf4-{kind}", TINY, "cpu") / "layer-1.safetensors")
        for kind in ("float16", "fused-float16")
    )
    assert inputs.keys() == outputs.keys()
    for name in inputs:
        if name.endswith(".absmax"):
            along = INPUTS if "self_attn" in name else OUTPUTS
            assert outputs[name].shape == absmax_shape(tuple(codes_shape(inputs, name)), weights.BLOCKSIZE, along)
            assert outputs[name].unique() == inputs[name].unique()
        elif name.endswith(".weight"):
            assert torch.equal(inputs[name], outputs[name])


def codes_shape(tensors: dict[str, torch.Tensor], absmax: str) -> list[int]:
    """The logical shape of the weight of an absmax."""
    *rows, half = tensors[absmax.removesuffix(".absmax")].shape
    return [*rows, 2 * half]


def test_the_log_tells_of_loading_and_of_memory(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(5400))
    assert read_log(LOG, tmp_path) == {
        "load_seconds": 5.4,
        "load_gb_per_second": pytest.approx(1e-6),
        "prepared_gb_per_second": pytest.approx(0.5e-6),
        "model_gib": 12.04,
        "kv_cache_tokens": 396995,
        "full_length_requests": 3.03,
    }
    assert set(read_log("", tmp_path).values()) == {None}


def test_compilations_are_counted_and_vllms_own_hook_is_called(monkeypatch):
    from triton import knobs

    class Function:
        name = "linear"

    heard = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **event: heard.append(event))
    found = compilations()
    knobs.runtime.jit_post_compile_hook(fn=Function, repr="linear[...]")
    assert (found, len(heard)) == (["linear"], 1)


def test_distinct_experts_are_counted_in_each_batch():
    same = torch.tensor([[0, 1]]).repeat(ROUTED_TOKENS, 1)
    other = torch.arange(2 * ROUTED_TOKENS).view(ROUTED_TOKENS, 2)  # no expert twice
    batches = [1, 8, 128]
    assert distinct_experts([same], batches) == dict.fromkeys(batches, 2)
    assert distinct_experts([same, other], batches) == {batch: (2 + 2 * batch) / 2 for batch in batches}


def test_the_devices_time_is_that_of_the_union_with_short_gaps():
    assert busy([]) == 0
    assert busy([(0, 10), (2, 8)]) == 10  # one within another
    assert busy([(5, 10), (0, 6)]) == 10  # in any order
    assert busy([(0, 10), (15, 20)]) == 20  # a gap of 5
    assert busy([(0, 10), (110, 120)]) == 20  # one of 100


@pytest.mark.slow
def test_what_contenders_ask_of_vllm_and_the_plugin_is_there():
    from vllm.config import CacheConfig, KernelConfig

    from gptoss_nf4.vllm.moe import Nf4MoEMethod

    assert callable(Nf4MoEMethod.packs)  # exchanged by name, to dequantize all
    assert CacheConfig().gpu_memory_utilization == UTILIZATION
    for contender in CONTENDERS.values():
        KernelConfig(**contender.engine_args)  # raises for a backend that vLLM does not know
