"""Numbers and names of a safetensors header and a quantization state that no writer makes: one line, at once."""

import json
import struct

import pytest

from gptoss_nf4.errors import UserError, first_line
from gptoss_nf4.format.quant_state import QuantState
from gptoss_nf4.storage.tensor_reader import read_header

GOOD = {"dtype": "U8", "shape": [2, 5], "data_offsets": [0, 10]}
STATE = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 2]}
# One list for both: numbers of a shape.
NUMBERS = [10.0, True, -10, 2**63, 10**400, 10**4000, float("nan"), float("inf"), "10", None, [10], {}]


def refused(tmp_path, text: str | bytes) -> str:
    data = text.encode() if isinstance(text, str) else text
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(data)) + data + bytes(10))
    with pytest.raises(UserError) as caught:
        read_header(file)
    line = str(caught.value)
    assert line.isprintable()
    assert len(line) < 1500
    return line


def test_the_header_itself_is_read(tmp_path):
    data = json.dumps({"w": GOOD}).encode()
    (tmp_path / "a").write_bytes(struct.pack("<Q", len(data)) + data + bytes(10))
    assert read_header(tmp_path / "a")["w"].shape == (2, 5)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_number_of_another_kind_is_refused(tmp_path, number):
    changes: list[dict] = [{"data_offsets": [0, number]}, {"data_offsets": [number, 10]}, {"shape": [1, number]}]
    for change in changes if isinstance(number, list) else [*changes, {"shape": number}]:
        assert "w" in refused(tmp_path, json.dumps({"w": GOOD | change}))
    for change in ({"shape": [64, number]}, {"shape": str(number)}, {"blocksize": number}, {"quant_type": number}):
        with pytest.raises(UserError):
            QuantState.from_json(json.dumps(STATE | change).encode(), "w")


@pytest.mark.parametrize(
    ("number", "times"), [(2**62, 100), (10**1500, 4), (2**62, 200_000), (1, 9)], ids=["100", "long", "many", "ones"]
)
def test_a_shape_of_too_many_large_numbers_is_refused_and_not_multiplied(tmp_path, number, times):
    refused(tmp_path, json.dumps({"w": GOOD | {"shape": [number] * times}}))
    with pytest.raises(UserError):
        QuantState.from_json(json.dumps(STATE | {"shape": [min(number, 2**39)] * max(times, 9)}).encode(), "w")


@pytest.mark.parametrize("container", ["", {}, "ab", {"a": 1, "b": 2}])
def test_another_container_is_no_list(tmp_path, container):
    """An empty text or object would be the shape of a scalar."""
    scalar = {"dtype": "F64", "shape": [], "data_offsets": [0, 10]}
    refused(tmp_path, json.dumps({"w": GOOD | {"shape": container}}))
    refused(tmp_path, json.dumps({"w": scalar | {"data_offsets": container}}))
    data = json.dumps({"w": {"dtype": "U8", "shape": container, "data_offsets": [0, 1]}}).encode()
    (tmp_path / "b").write_bytes(struct.pack("<Q", len(data)) + data + bytes(1))
    with pytest.raises(UserError):
        read_header(tmp_path / "b")


def test_numbers_beyond_what_is_in_json_are_refused(tmp_path):
    for literal in ("1e400", "-1e400", "NaN", "Infinity", "9" * 5000, "0x10", "1_0", "01"):
        refused(tmp_path, f'{{"w": {{"dtype": "U8", "shape": [10], "data_offsets": [0, {literal}]}}}}')


@pytest.mark.parametrize("name", [b'"\\ud800"', b'"a\\udfffb"', b'"\xed\xa0\x80"', b'"\xff"'])
def test_half_a_character_in_a_name_is_refused(tmp_path, name):
    refused(tmp_path, b"{" + name + b": " + json.dumps(GOOD).encode() + b"}")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_another_encoding_than_utf_8_is_refused(tmp_path, encoding):
    """As the safetensors library does, and bitsandbytes with a state."""
    assert "not JSON" in refused(tmp_path, json.dumps({"w": GOOD}).encode(encoding))
    with pytest.raises(UserError, match="not JSON"):
        QuantState.from_json(json.dumps(STATE).encode(encoding), "w")


def test_keys_that_come_twice_and_deep_nesting_are_refused(tmp_path):
    entry = json.dumps(GOOD)
    assert "twice" in refused(tmp_path, f'{{"w": {entry}, "w": {entry}}}')
    assert "twice" in refused(tmp_path, f'{{"w": {entry[:-1]}, "shape": [10]}}}}')
    for deep in ("[" * 100_000, '{"a":' * 100_000, f'{{"w": {"[" * 900}{"]" * 900}}}'):
        refused(tmp_path, deep)


def test_what_came_is_shown_at_a_bounded_length():
    line = str(UserError("x", where="w", got="y" * 10_000, expected="z", next_step="do it"))
    assert len(line) < 700
    assert line.endswith(", expected z; do it")


def test_of_a_librarys_error_the_first_line_is_shown():
    assert first_line(ValueError("\n first\nsecond")) == "first"
    assert first_line(ValueError("x" * 1000)) == "x" * 200
    assert first_line(ValueError()) == first_line(ValueError(" \n")) == "ValueError"
