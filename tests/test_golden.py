"""The bytes of a converted checkpoint, kept in tests/golden: a change of the format is a choice, and shows in its diff.

    RENEW_GOLDEN=1 pytest tests/test_golden.py

writes them anew. Kept are config.json and the index themselves, and of each safetensors file its header and digests.
The source is made of whole numbers alone: neither a random generator nor a sum depends on the machine.
"""

import hashlib
import json
import os
import zlib
from pathlib import Path

import pytest
import torch
from conftest import local
from safetensors.torch import load_file, save_file

from gptoss_nf4.convert.plan import RequantOptions
from gptoss_nf4.flow import convert
from gptoss_nf4.format.dimensions import Dimensions
from gptoss_nf4.samples import embedded
from gptoss_nf4.storage.checkpoint import INDEX_FILE

GOLDEN = Path(__file__).parent / "golden"
MINIMAL = Dimensions(
    layers=1, hidden=64, intermediate=128, experts=2, experts_per_token=1, heads=2, kv_heads=1, head_dim=64, vocabulary=262
)
CHOICE = (
    "the bytes of a converted checkpoint are others than those in tests/golden. If that is no accident: raise "
    "FORMAT_VERSION (gptoss_nf4/format/result.py) where an older plugin would read them wrongly, then renew them by "
    "`RENEW_GOLDEN=1 pytest tests/test_golden.py` and commit the difference"
)


def plain(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` with values that follow from `name` alone, and that float16 holds."""
    if name.endswith("nested_quant_map"):
        return (torch.arange(256) - 128) / 128
    if name.endswith("quant_map"):  # constants
        return tensor
    if "quant_state" in name:  # its offset is a mean, whose last bit depends on the machine
        state = json.loads(bytes(tensor.numpy())) | {"nested_offset": 0.03125}
        return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    number = torch.arange(tensor.numel()) * 37 + zlib.crc32(name.encode()) % 251
    if tensor.dtype == torch.uint8:
        return (number % 256).to(torch.uint8).view(tensor.shape)
    if name.endswith("nested_absmax"):
        return ((number % 16 + 1) / 1024).view(tensor.shape)
    return ((number % 255 - 127) / 64).to(tensor.dtype).view(tensor.shape)


def described(file: Path) -> str:
    """A line for a safetensors file, and one for each entry of its header, in its order."""
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    lines = [f"{file.name}: {len(data)} bytes, header to byte {start}, sha256 {hashlib.sha256(data).hexdigest()}"]
    for name, entry in json.loads(data[8:start]).items():
        if name == "__metadata__":
            lines.append(f"  {name}: {entry}")
            continue
        first, end = entry["data_offsets"]
        digest = hashlib.sha256(data[start + first : start + end]).hexdigest()
        lines.append(f"  {name}: {entry['dtype']} {entry['shape']} at {first}, sha256 {digest}")
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("golden")
    embedded.write_checkpoint(root / "source", MINIMAL)
    for file in (root / "source").glob("*.safetensors"):
        save_file({name: plain(name, tensor) for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    model, artifacts = local(root / "source", root / "artifacts")
    convert(model, artifacts, RequantOptions(), "float16")
    return artifacts.checkpoint


def test_a_converted_checkpoint_has_the_bytes_that_it_had(checkpoint):
    texts = {"tensors.txt": "".join(map(described, sorted(checkpoint.glob("*.safetensors"))))}
    texts |= {name: (checkpoint / name).read_text() for name in ("config.json", INDEX_FILE)}
    if os.environ.get("RENEW_GOLDEN"):
        for name, text in texts.items():
            (GOLDEN / name).write_text(text)
    assert sorted(file.name for file in GOLDEN.iterdir()) == sorted(texts)
    for name, text in texts.items():
        assert text == (GOLDEN / name).read_text(), f"{name}: {CHOICE}"
