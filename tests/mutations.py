"""Ways to damage a checkpoint: functions of (directory, random), and how often each is tried."""

import json
import random
import struct
from pathlib import Path

from json_mutations import retyped

from gptoss_nf4.storage.checkpoint import INDEX_FILE, Checkpoint

STATE = "quant_state.bitsandbytes__nf4"


def shard_of(directory: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(directory.glob("*.safetensors")))


def header_of(file: Path) -> tuple[int, dict]:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return length, json.loads(data[8 : 8 + length])


def put_header(file: Path, text: bytes) -> None:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def flip(file: Path, start: int, end: int, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[rng.randrange(start, end)] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def truncate(directory, rng):
    file = shard_of(directory, rng)
    file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])


def grow(directory, rng):
    file = shard_of(directory, rng)
    file.write_bytes(file.read_bytes() + rng.randbytes(rng.randrange(1, 64)))


def flip_header(directory, rng):
    file = shard_of(directory, rng)
    flip(file, 0, 8 + header_of(file)[0], rng)


def edit_header(directory, rng):
    """Wrong dtype or shape, moved offsets, missing, extra and duplicated tensors, absurd sizes."""
    file = shard_of(directory, rng)
    _, header = header_of(file)
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry, (start, end) = header[name], header[name]["data_offsets"]
    change = rng.randrange(9)
    if change == 0:
        entry["dtype"] = rng.choice(
            [d for d in ("F16", "BF16", "F32", "U8", "I8", "I64", "F8_E5M2", "", None, 7) if d != entry["dtype"]]
        )
    elif change == 1:
        entry["shape"] = rng.choice([[], [1 << 62], [-1], ["a"], None, [*entry["shape"], 2], [*entry["shape"][::-1], 1]])
    elif change == 2:
        entry["data_offsets"] = rng.choice(
            [[end, start - 1], [start + 2, end + 2], [0, 1 << 60], [start], None, [1.5, 2.5]]
        )
    elif change == 3:  # two tensors in one place
        other = rng.choice([key for key in header if key not in ("__metadata__", name)])
        entry["data_offsets"] = header[other]["data_offsets"]
    elif change == 4:
        del header[name]
    elif change == 5:
        header[rng.choice(["rogue", "model.layers.99.rogue", "../../etc", "\x1b[2J", ""])] = {
            "dtype": "U8",
            "shape": [0],
            "data_offsets": [end, end],
        }
    elif change == 6:
        header[rng.choice(["model.rogue", f"{name}\x00"])] = header.pop(name)
    elif change == 7:
        put_header(
            file,
            json.dumps(header)[:-1].encode()
            + b", "
            + json.dumps(name).encode()
            + b": "
            + json.dumps(entry).encode()
            + b"}",
        )
        return
    else:
        put_header(
            file, rng.choice([b"[]", b"{", b"null", b"[" * 100_000, b"\xff\xfe", b'{"a": 1e999}', rng.randbytes(40)])
        )
        return
    put_header(file, json.dumps(header).encode())


def rewrite_tensor(directory: Path, name: str, data: bytes) -> None:
    """Put `data` in the place of a U8 tensor of any length: all later offsets move."""
    info = Checkpoint(directory).tensors[name]
    content = info.file.read_bytes()
    length, header = header_of(info.file)
    base, grown = 8 + length, len(data) - (info.end - info.start)
    for key, entry in header.items():
        if key == name:
            entry["shape"], entry["data_offsets"] = [len(data)], [info.start - base, info.start - base + len(data)]
        elif key != "__metadata__" and entry["data_offsets"][0] >= info.end - base:
            entry["data_offsets"] = [offset + grown for offset in entry["data_offsets"]]
    text = json.dumps(header).encode()
    body = content[base : info.start] + data + content[info.end :]
    info.file.write_bytes(struct.pack("<Q", len(text)) + text + body)


def any_tensor(directory: Path, rng: random.Random, ending: str) -> str:
    return rng.choice(sorted(name for name in Checkpoint(directory).tensors if name.endswith(ending)))


def edit_state(directory, rng):
    name = any_tensor(directory, rng, STATE)
    fields = json.loads(Checkpoint(directory).raw(name).tobytes())
    values = [
        None,
        True,
        -1,
        0,
        7,
        1 << 70,
        10**400,
        1.5,
        "",
        "nf5",
        [],
        {},
        [0],
        [64, -64],
        [64, 32],
        "x" * 5000,
        "\x1b[31m",
    ]
    key = rng.choice(["quant_type", "blocksize", "shape", "nested_blocksize", "nested_offset", "nested_dtype", "dtype"])
    # Another finite offset is another model, which `change_offset` is for.
    fitting = [v for v in values if v != fields[key] and not (key == "nested_offset" and isinstance(v, (int, float)))]
    fields[key] = rng.choice(fitting)
    if rng.random() < 0.3:
        del fields[key]
    rewrite_tensor(directory, name, json.dumps(fields).encode())


def break_state(directory, rng):
    name = any_tensor(directory, rng, STATE)
    texts = [
        b"",
        b"{",
        b"null",
        b"[]",
        b"[" * 50_000 + b"]" * 50_000,
        b"\xff" * 20,
        b'{"blocksize": NaN}',
        b'{"a":' * 3000,
        rng.randbytes(60),
    ]
    rewrite_tensor(directory, name, rng.choice(texts))


def bad_scales(directory, rng):
    """NaN, infinities and negative values in the numbers that absmax is made of."""
    name = any_tensor(directory, rng, rng.choice([".nested_absmax", ".nested_quant_map", ".quant_map"]))
    info = Checkpoint(directory).tensors[name]
    data = bytearray(info.file.read_bytes())
    place = rng.randrange(info.start, info.end, 4)
    data[place : place + 4] = struct.pack("<f", rng.choice([float("nan"), float("inf"), -float("inf"), -1e9, 3e38]))
    info.file.write_bytes(data)


def edit_index(directory, rng):
    index = json.loads((directory / INDEX_FILE).read_text())
    name = rng.choice(sorted(index["weight_map"]))
    change = rng.randrange(6)
    if change == 0:
        index["weight_map"][name] = rng.choice(
            ["absent.safetensors", "../source/x.safetensors", "/etc/passwd", "", ".", "a\x00b", 7, None]
        )
    elif change == 1:
        del index["weight_map"][name]
    elif change == 2:
        index["weight_map"]["model.rogue"] = index["weight_map"][name]
    elif change == 3:
        index["weight_map"] = rng.choice([[], None, "x", {}])
    elif change == 4:
        index = rng.choice([[], None, 5])
    text = json.dumps(index) if change < 5 else rng.choice(["", "{", "[" * 100_000, "\x00"])
    (directory / INDEX_FILE).write_text(text)


def edit_config(directory, rng):
    config = json.loads((directory / "config.json").read_text())
    keys = [
        "hidden_size",
        "intermediate_size",
        "num_local_experts",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "num_experts_per_tok",
        "model_type",
    ]
    key = rng.choice(keys)
    config[key] = rng.choice([v for v in (None, -1, 0, 3, 1 << 40, 10**30, 1.5, "many", [], {}, True) if v != config[key]])
    if rng.random() < 0.2:
        del config[key]
    text = json.dumps(config) if rng.random() < 0.85 else rng.choice(["", "[]", "{", "[" * 100_000, "\ufeff{}"])
    (directory / "config.json").write_text(text)


def retype_header(directory, rng):
    """A dtype, a shape or an offset in another type: 10.0 for 10, a text for a number."""
    file = shard_of(directory, rng)
    _, header = header_of(file)
    name = rng.choice(sorted(header))
    header |= {name: retyped({name: header[name]}, rng).get(name)}
    if rng.random() < 0.05:
        header[f"{name}\ud800"] = header.pop(name)
    put_header(file, json.dumps(header).encode())


def retype_state(directory, rng):
    name = any_tensor(directory, rng, STATE)
    fields = json.loads(Checkpoint(directory).raw(name).tobytes())
    changed = retyped(fields, rng)
    if isinstance(changed.get("nested_offset"), (int, float)) and "nested_offset" in fields:
        # Another finite offset is another model, which `change_offset` is for.
        changed["nested_offset"] = fields["nested_offset"]
    rewrite_tensor(directory, name, json.dumps(changed).encode())


def retype_json(directory, rng):
    """A value in any JSON file beside the weights."""
    file = rng.choice(sorted(path for path in directory.iterdir() if path.suffix == ".json"))
    file.write_text(json.dumps(retyped(json.loads(file.read_text()), rng)))


def lose_a_file(directory, rng):
    rng.choice(sorted(path for path in directory.iterdir() if path.suffix in (".safetensors", ".json"))).unlink()


def flip_content(directory, rng):
    """A bit of a tensor: nothing in the files tells, so the list of digests has to."""
    info = rng.choice(sorted(Checkpoint(directory).tensors.values(), key=lambda info: info.name))
    flip(info.file, info.start, info.end, rng)


def change_offset(directory, rng):
    """Content too, though it stands in JSON."""
    name = any_tensor(directory, rng, STATE)
    fields = json.loads(Checkpoint(directory).raw(name).tobytes())
    fields["nested_offset"] *= rng.choice([0.5, 1.0001, 2, 1000])
    rewrite_tensor(directory, name, json.dumps(fields).encode())


# The bytes of all weights are compared; these say why they may be equal.
WHY_HARMLESS = {
    "flip_header": "in the format's free text, or white space",
    "edit_header": "the same meaning written another way",
    "edit_index": "shards are taken by their headers; the index only has to fit",
    "edit_config": "a key that no weight depends on is carried over",
    "retype_header": "the name of a library in the format's free text",
    "retype_state": "the offset is a number still, and so it is left as it was",
    "retype_json": "a key that no weight depends on is carried over, or left out",
    "lose_a_file": "without an index all shards are read; the tokenizer's and generation's configs have defaults",
}
CONTENT = (flip_content, change_offset)
MUTATIONS = {
    truncate: 30,
    grow: 20,
    flip_header: 90,
    edit_header: 90,
    edit_state: 50,
    break_state: 30,
    bad_scales: 40,
    edit_index: 40,
    edit_config: 50,
    retype_header: 60,
    retype_state: 30,
    retype_json: 60,
    lose_a_file: 10,
    flip_content: 60,
    change_offset: 10,
}
