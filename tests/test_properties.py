"""What must hold for every input, on inputs that hypothesis draws: files, quantization states, packing, sorting, paths.

HYPOTHESIS_PROFILE=thorough draws a hundred times as many (tests/profiles.py).
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import safetensors
import torch
from configuring import written
from hypothesis import given, settings
from hypothesis import strategies as st
from project_imports import ROOT
from safetensors_headers import ODD, files

from gptoss_nf4.errors import UserError
from gptoss_nf4.format.dtypes import ITEM_BYTES
from gptoss_nf4.format.quant_state import BLOCKSIZES, Nested, QuantState
from gptoss_nf4.storage.tensor_reader import read_header
from gptoss_nf4.vllm.kernels import tiles

# Refused on purpose, though the safetensors library reads it: a name that comes twice, and dtypes of less than a byte.
STRICTER = ("a key that comes twice", "unknown dtype")


def answer(call: Callable[[], Any], refusal: type[BaseException] = UserError) -> tuple[Any, str | None]:
    """(what `call` returns, None), or (None, the one line by which it refuses)."""
    try:
        return call(), None
    except refusal as error:
        line = str(error)
    assert line.isprintable()
    return None, line


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("headers") / "model.safetensors"


@given(files())
def test_headers_are_read_as_the_safetensors_library_reads_them(file, data):
    try:
        theirs = {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in safetensors.deserialize(data)}
    except (safetensors.SafetensorError, UnicodeDecodeError):
        theirs = None
    file.write_bytes(data)
    ours, refusal = answer(lambda: read_header(file))
    if refusal:
        assert theirs is None or any(reason in refusal for reason in STRICTER)
    else:
        assert {t.name: (t.dtype, t.shape, data[t.start : t.end]) for t in ours.values()} == theirs


def test_every_dtype_has_the_safetensors_librarys_size(file):
    """By a file that the library accepts, which checks the size."""
    for dtype, size in ITEM_BYTES.items():
        header = json.dumps({"w": {"dtype": dtype, "shape": [3], "data_offsets": [0, 3 * size]}}).encode()
        assert safetensors.deserialize(len(header).to_bytes(8, "little") + header + bytes(3 * size))


@st.composite
def states_of_bitsandbytes(draw) -> bnb.QuantState:
    blocksize, kind = draw(st.sampled_from(BLOCKSIZES)), draw(st.sampled_from(["nf4", "fp4"]))
    shape = torch.Size(draw(st.lists(st.integers(1, 1 << 20), min_size=1, max_size=3)))
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
    nested, offset = None, None
    if draw(st.booleans()):
        offset = torch.tensor(draw(st.floats(0, 8, width=32)))
        nested = bnb.QuantState(torch.ones(1), blocksize=draw(st.sampled_from(BLOCKSIZES)), code=torch.zeros(256))
        nested.dtype = torch.float32
    return bnb.QuantState(
        torch.ones(1), shape=shape, code=torch.zeros(16), blocksize=blocksize, quant_type=kind, dtype=dtype, offset=offset,
        state2=nested,
    )  # fmt: skip


@given(states_of_bitsandbytes())
def test_states_of_bitsandbytes_are_read_and_written_alike(theirs):
    key = f"quant_state.bitsandbytes__{theirs.quant_type}"
    data = bytes(theirs.as_dict(packed=True)[key].numpy())
    found = QuantState.from_json(data, key)
    assert found == QuantState(
        theirs.quant_type,
        theirs.blocksize,
        str(theirs.dtype).removeprefix("torch."),
        tuple(theirs.shape),
        Nested(theirs.state2.blocksize, float(theirs.offset)) if theirs.state2 else None,
    )
    assert found.elements == theirs.shape.numel()
    assert found.blocks == -(-theirs.shape.numel() // theirs.blocksize)
    if found.nested is None:
        assert found.to_json().tobytes() == data


FIELDS = ("quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset")
STATE = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [4, 128], "nested_blocksize": 256}
STATE |= {"nested_dtype": "float32", "nested_offset": 0.5}
VALUES = [*ODD, "fp4", "float16", "float64", 32, 64, 100, 4096, 64.0, [4, 128], [4.0, 128], [True], [0, 4], [-1], [1 << 50]]


@given(st.dictionaries(st.sampled_from(FIELDS), st.sampled_from(VALUES), max_size=2), st.sets(st.sampled_from(FIELDS)))
def test_odd_states_are_refused_or_mean_what_bitsandbytes_reads(changed, lost):
    fields = {key: value for key, value in (STATE | changed).items() if key not in lost or key in changed}
    data = json.dumps(fields).encode()
    found, refusal = answer(lambda: QuantState.from_json(data, "w"))
    if refusal:
        assert changed or lost
        return
    packed = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    tensors = {"w.quant_state.bitsandbytes__nf4": packed, "w.absmax": torch.ones(1), "w.quant_map": torch.zeros(16)}
    if found.nested:
        tensors |= {"w.nested_absmax": torch.ones(1), "w.nested_quant_map": torch.zeros(256)}
    theirs = bnb.QuantState.from_dict(tensors, torch.device("cpu"))
    assert (found.quant_type, found.blocksize, found.shape) == (theirs.quant_type, theirs.blocksize, tuple(theirs.shape))
    assert getattr(torch, found.dtype) == theirs.dtype
    assert (found.nested is None) == (theirs.state2 is None)
    if found.nested:
        assert found.nested == Nested(theirs.state2.blocksize, pytest.approx(float(theirs.offset)))


weights = st.tuples(st.integers(0, 2), st.integers(1, 40), st.integers(1, 3), st.sampled_from([32, 64]), st.integers(0, 99))


@given(weights)
def test_a_nibble_lies_where_the_table_of_tiles_says(weight):
    """Row 8r + g and input 32q + 8t + 4e + 2h + p of a tile: lane 4g + t, word 2q + e, nibble 4h + 2r + p."""
    experts, rows, input_tiles, inputs, seed = weight
    batch = (experts,) if experts else ()
    codes = np.random.default_rng(seed).integers(0, 256, (*batch, rows, input_tiles * inputs // 2), np.uint8)
    packed = tiles.pack_codes(torch.from_numpy(codes), inputs)
    assert packed.shape == (*batch, -(-rows // 16), input_tiles, 32, inputs // 16)
    assert np.array_equal(tiles.unpack_codes(packed, rows).numpy(), codes)
    row, column = np.arange(16 * packed.shape[-4])[:, None], np.arange(input_tiles * inputs)[None, :]
    r, g = row % 16 // 8, row % 8
    q, t, e, h, p = (column % inputs // size % count for size, count in ((32, 2), (8, 4), (4, 2), (2, 2), (1, 2)))
    words = packed.numpy().view(np.uint32)[..., row // 16, column // inputs, 4 * g + t, 2 * q + e]
    nibbles = words >> (4 * (4 * h + 2 * r + p)).astype(np.uint32) & 15
    assert np.array_equal(nibbles[..., :rows, :], np.stack((codes >> 4, codes & 15), -1).reshape(*batch, rows, -1))
    assert not nibbles[..., rows:, :].any()


@given(weights)
def test_absmax_lies_beside_its_rows(weight):
    experts, rows, blocks, _, seed = weight
    batch = (experts,) if experts else ()
    absmax = np.random.default_rng(seed).random((*batch, rows, blocks), np.float32) * 255
    packed = tiles.pack_absmax(torch.from_numpy(absmax)).numpy()
    assert packed.shape == (*batch, -(-rows // 16), blocks, 16)
    row, block = np.arange(16 * packed.shape[-3])[:, None], np.arange(blocks)[None, :]
    found = packed[..., row // 16, block, 2 * (row % 8) + row % 16 // 8]  # rows g and g + 8 side by side
    assert np.array_equal(found[..., :rows, :], (absmax * 256).astype(np.float16))
    assert not found[..., rows:, :].any()


@given(st.integers(1, 3), st.integers(1, 40), st.sampled_from([32, 64]), st.integers(1, 3), st.booleans())
def test_rows_of_w13_and_activations_are_put_where_the_kernels_look(experts, half, inputs, input_tiles, wgmma):
    rows = torch.arange(1, experts * 2 * half + 1).view(experts, 2 * half)
    tiled = tiles.gate_and_up_tiles(rows, 1)
    padded = -(-half // 16) * 16
    assert tiled.shape == (experts, 2 * padded)
    for part in (0, 1):  # gate, up
        found = tiled.view(experts, -1, 2, 16)[:, :, part].reshape(experts, padded)
        assert torch.equal(found[:, :half], rows[:, part::2])
        assert not found[:, half:].any()
    x = torch.arange(input_tiles * inputs)
    ordered = tiles.operand_order(x.repeat(experts, 1), inputs, wgmma)
    keys = [
        (n // 32, n // 4 % 2, *((n // 2 % 2, n // 8 % 4) if wgmma else (n // 8 % 4, n // 2 % 2)), n % 2) for n in x.tolist()
    ]
    assert ordered.tolist() == [sorted(x.tolist(), key=keys.__getitem__)] * experts


@pytest.mark.slow
def test_slots_are_sorted_as_python_sorts_them():
    """In Triton's interpreter, which has to be chosen before the kernels are imported."""
    command = [sys.executable, ROOT / "tests/sort_cases.py"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]


# What a name may be made of: any character, those with a meaning to a shell, Hydra or YAML more often, and bytes that are
# no UTF-8, as Python has them.
LETTERS = st.one_of(
    st.characters(exclude_characters="/\0", exclude_categories=["Cs"]),
    st.sampled_from(" =,[]{}()'\"\\~$#:;&|*?!%@-+.<>`^"),
    st.sampled_from(["\udcff", "\x85", "\u2028", "\n", "\x1b"]),
)
NAMES = st.lists(LETTERS | st.just("${"), min_size=1, max_size=40).map("".join)
NAMES = NAMES.filter(lambda name: name not in (".", "..") and len(os.fsencode(name)) < 256)


@pytest.fixture(scope="module")
def directory(tiny, tmp_path_factory) -> Iterator[Path]:
    """An empty working directory, with a checkpoint in data/first."""
    root = tmp_path_factory.mktemp("paths")
    (root / "data/first").mkdir(parents=True)
    for name in ("config.json", "model-00001-of-00003.safetensors"):
        os.link(tiny / name, root / "data/first" / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        yield root


@settings(max_examples=settings().max_examples // 3)
@given(NAMES, st.booleans())
def test_every_path_survives_params_yaml_and_hydra(directory, name, as_adapter):
    """Or is refused in one line, which only `${` and what is no text are."""
    (place,) = (directory / "data").iterdir()
    path = place.rename(directory / "data" / name)
    typed = [f"adapters.mine={path}"] if as_adapter else ["model=local", f"model.path={path}"]
    (directory / "params.yaml").unlink(missing_ok=True)
    if as_adapter:
        written(directory)
    found, refusal = answer(lambda: written(directory, *typed), SystemExit)
    if refusal:
        assert "${" in name or not is_text(name)
        return
    assert (found["adapters"]["mine"] if as_adapter else found["model"])["path"] == str(path)


def is_text(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False
