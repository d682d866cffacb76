"""Coverage-guided fuzzing of what reads a stranger's bytes: python tests/fuzz/fuzz.py header|state|config [options]

`header` opens a checkpoint whose only shard is the input; `state` parses the input as a quantization state; `config` reads
the input as config.json, and writes what the result would have of it. `options` are libFuzzer's. A UserError is the answer
to bad input; any other exception, or an answer that contradicts the input, ends the run with the input on disk.
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["gptoss_nf4", "json"]):
    from gptoss_nf4.errors import UserError
    from gptoss_nf4.format.config_fields import ignored_keys, served_config
    from gptoss_nf4.format.quant_state import BLOCKSIZES, QuantState
    from gptoss_nf4.storage.checkpoint import Checkpoint
    from gptoss_nf4.storage.reading import read_json_object
    from gptoss_nf4.storage.writing import write_json

CORPUS = Path(__file__).parent / "corpus"
MAX_BYTES = 4096
directory = Path(tempfile.mkdtemp(prefix="fuzz-"))
(directory / "config.json").write_text("{}")
shard = directory / "model.safetensors"


def header(data: bytes) -> None:
    shard.write_bytes(data)
    try:
        checkpoint = Checkpoint(directory)
    except UserError as error:
        require(str(error).isprintable(), "one line")
        return
    for name, info in checkpoint.tensors.items():
        require(8 <= info.start <= info.end <= len(data), "inside the file")
        require(len(name.encode()) <= len(data), "a name that can be written")
        require(checkpoint.raw(name).tobytes() == data[info.start : info.end], "the file's own bytes")
    require(sum(info.bytes for info in checkpoint.tensors.values()) <= len(data), "no byte twice")


def state(data: bytes) -> None:
    try:
        found = QuantState.from_json(data, "fuzz")
    except UserError as error:
        require(str(error).isprintable(), "one line")
        return
    require(found.blocksize in BLOCKSIZES and found.blocks * found.blocksize >= found.elements > 0, "whole blocks")
    if found.nested is None:
        require(QuantState.from_json(found.to_json().tobytes(), "again") == found, "the same when written and read")


def config(data: bytes) -> None:
    file, written = directory / "input.json", directory / "written.json"
    file.write_bytes(data)
    try:
        found = read_json_object(file)
        write_json(written, found)  # what is read can be written: half a character could not
        require(list(read_json_object(written)) == list(found), "the same keys when written and read")
        write_json(written, {"result": served_config(found, file), "ignored": ignored_keys(found)})
    except UserError as error:
        require(str(error).isprintable(), "one line")


def require(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)


TARGETS = {"header": header, "state": state, "config": config}


def main() -> None:
    target, *options = sys.argv[1:]
    atheris.Setup([sys.argv[0], f"-max_len={MAX_BYTES}", *options], TARGETS[target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
