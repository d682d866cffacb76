"""Changed copies of a converted checkpoint, and what the proof says of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptoss_nf4.errors import UserError
from gptoss_nf4.proof.config import Asked
from gptoss_nf4.proof.prove import Exactness, prove, require_proved

ASKED = Asked("exact", "interleaved", "nf4", 64, "float16", "auto")


def all_tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()}


Change = Callable[[dict], object]


def rewritten(origin: Path, target: Path, change: Change, config: Change = dict) -> Path:
    """A copy of a checkpoint in one file without an index, after `change(tensors)` and `config(config.json)`."""
    target.mkdir()
    tensors = all_tensors(origin)
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(origin / name, target / name)
    content = json.loads((target / "config.json").read_text())
    config(content)
    (target / "config.json").write_text(json.dumps(content))
    return target


def proved(source: Path, result: Path, asked: Asked = ASKED) -> Exactness:
    found = prove(source, result, asked)
    require_proved(found, result)
    return found


def require_found(source: Path, result: Path, named: str, asked: Asked = ASKED) -> None:
    with pytest.raises(UserError, match=named) as caught:
        proved(source, result, asked)
    assert str(caught.value).isprintable()
    assert "; " in str(caught.value)


def config_changed(origin: Path, target: Path, config: Change) -> Path:
    """A directory with links to the weights of `origin`, and another config.json."""
    target.mkdir()
    for file in origin.iterdir():
        (target / file.name).symlink_to(file)
    content = json.loads((origin / "config.json").read_text())
    config(content)
    (target / "config.json").unlink()
    (target / "config.json").write_text(json.dumps(content))
    return target
