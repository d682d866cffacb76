"""The codec against bitsandbytes itself, bit for bit."""

import sys

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch

from gptoss_nf4 import eager_bnb
from gptoss_nf4.errors import UserError
from gptoss_nf4.format.codec import CODEBOOKS, denest_absmax, dequantize, unpack_codes
from gptoss_nf4.format.quant_state import QuantState


def test_bitsandbytes_without_the_compiler_keeps_its_functions():
    """As torch.compile is called there: with a function, and as a decorator with settings."""

    def function() -> None: ...

    assert eager_bnb._as_it_is(function) is function
    assert eager_bnb._as_it_is(dynamic=True)(function) is function
    assert torch.compile is not eager_bnb._as_it_is


def test_a_kernel_of_bitsandbytes_is_hidden_from_the_compiler_once_it_is_loaded(monkeypatch):
    hidden = []

    def hides(function):
        return lambda *arguments: hidden.append(arguments) or function(*arguments)

    monkeypatch.setattr(eager_bnb, "_disable_dynamo", hides)
    call = eager_bnb._hidden_once_it_is_loaded(lambda number: number + 1)
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    assert (call(1), hidden) == (2, [])
    monkeypatch.setitem(sys.modules, "torch._dynamo", sys)
    assert (call(1), hidden) == (2, [(1,)])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_codebooks_are_those_of_bitsandbytes(kind):
    assert np.array_equal(CODEBOOKS[kind], bnb.get_4bit_type(kind, device="cpu").numpy())


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_every_byte_dequantizes_as_in_bitsandbytes(kind):
    packed = torch.arange(256, dtype=torch.uint8)
    absmax = torch.rand(512 // 64) + 0.5
    state = bnb.QuantState(absmax=absmax, shape=torch.Size((4, 128)), dtype=torch.float32, blocksize=64, quant_type=kind)
    expected = bnb.dequantize_4bit(packed.reshape(-1, 1), state).numpy()
    got = dequantize(packed.numpy(), absmax.numpy(), CODEBOOKS[kind], 64, (4, 128))
    assert np.array_equal(got, expected)


def test_the_first_element_is_in_the_high_nibble():
    """Not only in our reading: bitsandbytes packs a row of (1, -1) into one byte 0xF0."""
    packed, _ = bnb.quantize_4bit(torch.tensor([[1.0, -1.0] * 32]), blocksize=64, quant_type="nf4")
    assert packed.flatten()[0] == 0xF0
    assert unpack_codes(packed.numpy().flatten())[:2].tolist() == [15, 0]


def test_absmax_of_every_byte_denests_as_in_bitsandbytes():
    code = bnb.create_dynamic_map()
    nested_absmax, offset = torch.rand(3), 0.0371
    absmax = torch.arange(256, dtype=torch.uint8).repeat(3)[:700]  # the last nested block is not whole
    state = bnb.QuantState(absmax=nested_absmax, blocksize=256, code=code, dtype=torch.float32)
    expected = bnb.dequantize_blockwise(absmax, state) + torch.tensor(offset)
    got = denest_absmax(absmax.numpy(), code.numpy(), nested_absmax.numpy(), 256, offset)
    assert got.dtype == np.float32
    assert np.array_equal(got, expected.numpy())


@pytest.mark.parametrize("shape", [(640, 192), (192, 320), (64, 2880), (6, 80)])
def test_real_sidecars_denest_as_in_bitsandbytes(shape):
    """Sidecars as bitsandbytes writes them, read by its own from_dict, against ours; and the weights they give."""
    packed, state = bnb.quantize_4bit(torch.randn(shape).bfloat16(), compress_statistics=True, quant_type="nf4")
    sidecars = state.as_dict(packed=True)
    (json_key,) = (key for key in sidecars if "quant_state" in key)
    parsed = QuantState.from_json(sidecars[json_key].numpy().tobytes(), "test")
    absmax = denest_absmax(
        sidecars["absmax"].numpy(),
        sidecars["nested_quant_map"].numpy(),
        sidecars["nested_absmax"].numpy(),
        parsed.nested.blocksize,
        parsed.nested.offset,
    )
    theirs = bnb.QuantState.from_dict(dict(sidecars), device=torch.device("cpu"))
    theirs.dtype = torch.float32  # it would round to bfloat16
    assert np.array_equal(absmax, (bnb.dequantize_blockwise(theirs.absmax, theirs.state2) + theirs.offset).numpy())
    values = dequantize(packed.numpy(), absmax, sidecars["quant_map"].numpy(), parsed.blocksize, shape)
    if shape[1] % 64:  # bitsandbytes' CPU kernel misreads such rows, see gptoss_nf4/bnb.py: ask for one long row
        theirs.shape = torch.Size([1, shape[0] * shape[1]])
        values = values.reshape(1, -1)
    assert np.array_equal(values, bnb.dequantize_4bit(packed, theirs).numpy())
    assert parsed.shape == shape
    assert parsed.blocks == absmax.size


def test_our_states_are_read_by_bitsandbytes():
    state = QuantState("nf4", 64, "float16", (8, 4, 128))
    tensors = {"quant_state.bitsandbytes__nf4": torch.from_numpy(state.to_json().copy())}
    tensors |= {"absmax": torch.ones(64), "quant_map": torch.from_numpy(CODEBOOKS["nf4"])}
    theirs = bnb.QuantState.from_dict(tensors, device=torch.device("cpu"))
    assert (theirs.quant_type, theirs.blocksize, theirs.dtype, tuple(theirs.shape)) == (
        "nf4",
        64,
        torch.float16,
        (8, 4, 128),
    )


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"\xff not json", "not JSON"),
        (b"[1]", "list"),
        (b'{"quant_type": "int8", "blocksize": 64, "dtype": "float16", "shape": [2, 64]}', "int8"),
        (b'{"quant_type": "nf4", "blocksize": 63, "dtype": "float16", "shape": [2, 64]}', "blocksize=63"),
        (b'{"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [2, -64]}', "shape"),
        (b'{"quant_type": "nf4", "blocksize": 64, "dtype": "int4", "shape": [2, 64]}', "int4"),
        (
            b'{"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [2, 64], "nested_blocksize": 256, '
            b'"nested_dtype": "float32", "nested_offset": NaN}',
            "nested_offset",
        ),
    ],
)
def test_bad_states_are_named(data, named):
    with pytest.raises(UserError, match=named) as caught:
        QuantState.from_json(data, "model.x")
    assert "model.x" in str(caught.value)
    assert "\n" not in str(caught.value)
