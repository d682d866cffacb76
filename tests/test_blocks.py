"""The direction of blocks: codes turned into rows of outputs, and what config.json says. bitsandbytes is the judge."""

import copy
import json
from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch

from gptoss_nf4.errors import UserError
from gptoss_nf4.format.blocks import INPUTS, OUTPUTS, absmax_shape, rows_of_outputs, state_shape
from gptoss_nf4.format.result import directions, expected_tensors
from gptoss_nf4.samples.embedded import TINY, model_config
from gptoss_nf4.vllm.settings import Settings

W13, W2 = "model.layers.1.mlp.experts.w13", "model.layers.0.mlp.experts.w2"
QUANTIZATION = {
    "quant_method": "gptoss_nf4",
    "format_version": 2,
    "quant_type": "nf4",
    "blocksize": 64,
    "w13_order": "interleaved",
    "residual_scale": 1.0,
    "modules_to_not_convert": [],
    "blocks_along": {W13: OUTPUTS, W2: OUTPUTS},
}


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(("rows", "columns", "blocksize"), [(128, 6, 64), (64, 2, 32), (192, 320, 64), (256, 34, 256)])
def test_a_code_and_its_absmax_stand_where_bitsandbytes_reads_them_in_the_transposed_weight(
    rows, columns, blocksize, quant_type
):
    transposed = torch.randn(columns, rows, generator=torch.Generator().manual_seed(rows))
    packed, state = bnb.quantize_4bit(transposed, blocksize=blocksize, quant_type=quant_type)
    codes, absmax = rows_of_outputs(packed.numpy(), state.absmax.numpy(), (rows, columns))
    assert codes.shape == (rows, columns // 2)
    assert absmax.shape == absmax_shape((rows, columns), blocksize, OUTPUTS) == (rows // blocksize, columns)
    state.shape = torch.Size([1, rows * columns])  # as one row: see `format/bnb.py`
    expected = bnb.dequantize_4bit(packed, state).view(columns, rows)
    table = bnb.get_4bit_type(quant_type, device="cpu").numpy()
    for o, i in np.random.default_rng(0).integers(0, (rows, columns), (200, 2)):
        byte = codes[o, i // 2]
        code = byte & 15 if i % 2 else byte >> 4  # the first of two inputs in the high nibble
        assert table[code] * absmax[o // blocksize, i] == expected[i, o]


def test_bytes():
    """Two inputs of four outputs: the first input's codes are 1, 2, 3, 4, the second's 5, 6, 7, 8."""
    packed = np.array([0x12, 0x34, 0x56, 0x78], np.uint8)
    codes, absmax = rows_of_outputs(packed, np.array([1, 2, 3, 4], np.float32), (4, 2))  # in blocks of two outputs
    assert codes.tolist() == [[0x15], [0x26], [0x37], [0x48]]
    assert absmax.tolist() == [[1, 3], [2, 4]]


def test_shapes_of_both_directions():
    assert absmax_shape((8, 640, 192), 64, INPUTS) == (8, 640, 3)
    assert absmax_shape((8, 640, 192), 64, OUTPUTS) == (8, 10, 192)
    assert state_shape((8, 640, 192), INPUTS) == (8, 640, 192)
    assert state_shape((8, 640, 192), OUTPUTS) == (8, 192, 640)


def test_settings_say_the_direction_of_each_target():
    settings = Settings.of(QUANTIZATION)
    assert settings.blocks_along(W13) == settings.blocks_along(W2) == OUTPUTS
    assert settings.blocks_along(W13.replace("1", "0", 1)) == INPUTS
    old = {key: value for key, value in QUANTIZATION.items() if key != "blocks_along"} | {"format_version": 1}
    assert Settings.of(old).blocks_along(W13) == INPUTS


def test_tensors_are_expected_in_the_direction_that_config_json_says():
    config = model_config(TINY) | {"dtype": "float16", "quantization_config": QUANTIZATION}
    shapes = {name: shape for name, (_, shape) in expected_tensors(config, Path("config.json")).items()}
    assert shapes[f"{W13}.weight"] == (8, 640, 96)
    assert shapes[f"{W13}.weight.absmax"] == (8, 10, 192)
    assert shapes[f"{W2}.weight.absmax"] == (8, 3, 320)
    assert shapes[f"{W2}.weight.absmax".replace("layers.0", "layers.1")] == (8, 192, 5)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"blocks_along": {W13: "columns"}}, "columns"),
        ({"blocks_along": {W13: ["outputs"]}}, "outputs"),
        ({"blocks_along": "outputs"}, "an object"),
        ({"blocks_along": [W13]}, "an object"),
        ({"blocks_along": {"model.layers.0.self_attn.qkv_proj": OUTPUTS}}, "names of fused experts.*"),
        ({"blocks_along": {"model.layers.0.mlp.experts.w13.weight": OUTPUTS}}, "names of fused experts"),
        ({"blocks_along": {"": OUTPUTS}}, "names of fused experts"),
        ({"format_version": 1}, "format_version=2"),
        ({"w13_order": "concatenated"}, "w13_order=interleaved"),
    ],
)
def test_a_direction_that_is_none_is_one_line(change, told):
    with pytest.raises(UserError, match=rf"bad quantization_config: config.json: got blocks_along.*{told}"):
        Settings.of(QUANTIZATION | change)
    with pytest.raises(UserError, match=told):
        directions(QUANTIZATION | change, "config.json")


def test_w2_alone_leaves_the_order_of_w13_free():
    assert directions(QUANTIZATION | {"w13_order": "concatenated", "blocks_along": {W2: OUTPUTS}}, "here") == {W2: OUTPUTS}


def test_a_layer_that_is_not_there_is_refused():
    config = model_config(TINY) | {"dtype": "float16", "quantization_config": copy.deepcopy(QUANTIZATION)}
    config["quantization_config"]["blocks_along"] |= {"model.layers.2.mlp.experts.w2": OUTPUTS}
    with pytest.raises(UserError, match=r"layers\.2.*experts of 2 layers"):
        expected_tensors(json.loads(json.dumps(config)), Path("config.json"))
