"""Safetensors files to read: right ones, and ones with faults in their header, as hypothesis draws them."""

import json
import struct

from hypothesis import strategies as st

from gptoss_nf4.format.dtypes import ITEM_BYTES

# What a field may hold instead of what it should.
ODD = [
    None,
    True,
    False,
    0,
    1,
    8,
    -1,
    8.0,
    1e400,
    float("nan"),
    2**53 + 1,
    2**63,
    2**64,
    "8",
    "",
    "\ud800",
    [],
    [0],
    [0, 8, 8],
]
ODD += [
    {},
    [None],
    [[]],
    [0, 8.0],
    [8, 0],
    ["0", "8"],
    [1, 9],
    [0, 2**64],
    [2**32, 2**32],
    [2**63, 2, 0],
    "U8",
    "BF16",
    "C64",
]
ODD += ["F4", "F6_E2M3", "u8", "F8_E5M2"]
TEXTS = ["", " ", "\n", "\t", "\0", ",", "{", "}", "[", '"', ":", "0", "-", "e", "\\", "\ufeff", "é", "\x01", "//", "null"]


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """The bytes of a file with up to four small tensors, and up to two faults."""
    header, end = {}, 0
    for number in range(draw(st.integers(0, 4))):
        dtype = draw(st.sampled_from(sorted(ITEM_BYTES)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        size = ITEM_BYTES[dtype]
        for n in shape:
            size *= n
        name = draw(st.sampled_from(["w", "model.norm.weight", "", "é", "\U0001f600", '"', "a/b"])) + str(number)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    if draw(st.booleans()):
        header["__metadata__"] = {"format": "pt"}
    data = bytes(range(256))[:end] + bytes(max(0, end - 256))
    for fault in draw(st.lists(st.sampled_from(FAULTS), max_size=2)):
        fault(draw, header)
    text = json.dumps(header, ensure_ascii=draw(st.booleans()))
    encoded = text.encode(errors="surrogatepass")
    length = len(encoded)
    damage = draw(st.sampled_from(["none"] * 4 + ["text", "replaced", "encoding", "length", "data", "padded", "twice"]))
    if damage == "text":
        at = draw(st.integers(0, length))
        encoded = encoded[:at] + draw(st.sampled_from(TEXTS)).encode() + encoded[at + draw(st.integers(0, 1)) :]
    elif damage == "replaced":
        at = draw(st.integers(0, length - 1))
        encoded = encoded[:at] + bytes([draw(st.integers(0, 255))]) + encoded[at + 1 :]
    elif damage == "encoding":
        encoded = text.encode(draw(st.sampled_from(["utf-8-sig", "utf-16", "utf-16-le", "utf-32-be", "utf-7"])), "replace")
    elif damage == "padded":
        encoded = encoded + draw(st.sampled_from([b" ", b"\n", b"\0", b"\r\n\t ", b"x"])) * draw(st.integers(1, 9))
    elif damage == "twice" and len(header) > 0:
        key = json.dumps(next(iter(header)))
        encoded = text.replace(key, f"{key}: {json.dumps(next(iter(header.values())))}, {key}", 1).encode(errors="replace")
    elif damage == "data":
        data = data[: -draw(st.integers(1, 9))] if draw(st.booleans()) else data + bytes(draw(st.integers(1, 9)))
    length = len(encoded)
    if damage == "length":
        length = draw(
            st.sampled_from([0, 1, length - 1, length + 1, length + 8, 1 << 25, 100_000_001, 1 << 63, (1 << 64) - 1])
        )
    return struct.pack("<Q", length) + encoded + data


def _odd_field(draw: st.DrawFn, header: dict) -> None:
    entry = _entry(draw, header)
    entry[draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))] = draw(st.sampled_from(ODD))


def _lost_field(draw: st.DrawFn, header: dict) -> None:
    _entry(draw, header).pop(draw(st.sampled_from(["dtype", "shape", "data_offsets"])), None)


def _moved(draw: st.DrawFn, header: dict) -> None:
    """Offsets or sizes that may overlap, leave holes or lie outside."""
    entry = _entry(draw, header)
    for field in ("data_offsets", "shape"):
        numbers = entry.get(field)
        if isinstance(numbers, list) and numbers and type(numbers[0]) is int:
            entry[field] = [n + draw(st.sampled_from([0, 0, 1, -1, 8])) if type(n) is int else n for n in numbers]


def _odd_entry(draw: st.DrawFn, header: dict) -> None:
    header[draw(st.sampled_from(["w0", "new"]))] = draw(st.sampled_from(ODD))


def _odd_metadata(draw: st.DrawFn, header: dict) -> None:
    header["__metadata__"] = draw(st.sampled_from([*ODD, {"format": 1}, {"format": None}, {"a": {"b": "c"}}, {"": ""}]))


def _entry(draw: st.DrawFn, header: dict) -> dict:
    entries = [entry for name, entry in header.items() if isinstance(entry, dict) and name != "__metadata__"]
    return draw(st.sampled_from(entries)) if entries else {}


FAULTS = [_odd_field, _lost_field, _moved, _odd_entry, _odd_metadata]
