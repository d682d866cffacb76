"""Another layout is a reader in a file of its own and a line in the table: no stage changes."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import local
from safetensors.torch import load_file, save_file

from gptoss_nf4.convert.assemble import assemble
from gptoss_nf4.convert.dequant import dequant
from gptoss_nf4.convert.normalize import normalize
from gptoss_nf4.convert.plan import NF4, RequantOptions
from gptoss_nf4.convert.requant import requant
from gptoss_nf4.errors import UserError
from gptoss_nf4.fetch.fetch import fetch
from gptoss_nf4.format.blocks import OUTPUTS
from gptoss_nf4.source import layouts
from gptoss_nf4.source.interface import Floating, Module, Source
from gptoss_nf4.source.model import open_source
from gptoss_nf4.source.split import SplitSource
from gptoss_nf4.storage.checkpoint import INDEX_FILE, Checkpoint


class Renamed(SplitSource):
    """The split layout under other names: `block` for `layers`, and every tensor prefixed."""

    layout = "renamed"

    @classmethod
    def recognises(cls, checkpoint: Checkpoint) -> bool:
        return "other.norm.weight" in checkpoint.tensors

    def __init__(self, checkpoint: Checkpoint):
        checkpoint.tensors = {name.replace("other.", "model.", 1): info for name, info in checkpoint.tensors.items()}
        super().__init__(checkpoint)


class BiasesInOneTensor(SplitSource):
    """The split layout with the biases of a layer's experts stacked, which no canonical name has a tensor for."""

    layout = "stacked biases"

    @classmethod
    def recognises(cls, checkpoint: Checkpoint) -> bool:
        return "model.layers.0.mlp.experts.gate_up_bias" in checkpoint.tensors

    def validate(self) -> None:
        """Left out: the tensors come from a valid checkpoint."""

    def floating(self, name: str) -> Floating:
        found = re.fullmatch(r"(.*\.mlp\.experts\.)(gate_up|down)_projs\.(\d+)\.bias", name)
        if not found:
            return super().floating(name)
        stored, expert = f"{found[1]}{found[2]}_bias", int(found[3])
        info = self.checkpoint.tensors[stored]
        return Floating(name, stored, info.dtype, info.shape[1:], lambda: iter([self.checkpoint.torch_row(stored, expert)]))


class AcrossRows(SplitSource):
    """Says of its blocks that they run along the outputs."""

    layout = "across rows"

    def module(self, name: str, shape: tuple[int, int]) -> Module:
        module = super().module(name, shape)
        return Module(module.name, module.shape, module.state, OUTPUTS)


def converted(directory: Path, root: Path, options: RequantOptions | None = None) -> dict[str, bytes]:
    """The stages up to assemble, as the pipeline runs them."""
    options = options or RequantOptions()
    model, artifacts = local(directory, root)
    fetch(model, artifacts)
    source = open_source(model, artifacts)
    for layer in range(source.dimensions.layers):
        dequant(source, artifacts, layer)
        requant(source, artifacts, layer, options, "cpu")
    normalize(source, artifacts, options, "bfloat16")
    assemble(source, artifacts, options, "bfloat16")
    return {file.name: file.read_bytes() for file in artifacts.checkpoint.iterdir()}


def rewrite(directory: Path, change) -> None:
    """Apply `change(tensors) -> tensors` to every shard; the index goes, since the names in it would be wrong."""
    for file in directory.glob("*.safetensors"):
        save_file(change(load_file(file)), file, metadata={"format": "pt"})
    (directory / INDEX_FILE).unlink()


def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("model.", "other.", 1): tensor for name, tensor in tensors.items()}


def biases_stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    kept, stacks = {}, {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        stem, _, number = module.rpartition(".")
        if kind == "bias" and number.isdecimal():
            stacks.setdefault(stem.replace("_projs", "_bias"), {})[int(number)] = tensor
        else:
            kept[name] = tensor
    return kept | {name: torch.stack([rows[n] for n in sorted(rows)]) for name, rows in stacks.items()}


@pytest.mark.parametrize(("reader", "change"), [(Renamed, renamed), (BiasesInOneTensor, biases_stacked)])
def test_a_reader_in_the_table_is_all_that_a_layout_needs(tiny, source_copy, tmp_path, monkeypatch, reader, change):
    expected = converted(tiny, tmp_path / "split")
    rewrite(source_copy, change)
    with pytest.raises(UserError):  # without the line in the table nobody reads it
        converted(source_copy, tmp_path / "refused")
    monkeypatch.setattr(layouts, "LAYOUTS", (reader, *layouts.LAYOUTS))
    assert converted(source_copy, tmp_path / "artifacts") == expected
    assert json.loads((tmp_path / "artifacts/manifest.json").read_text())["layout"] == reader.layout


def test_blocks_across_rows_are_not_moved(tiny, tmp_path, monkeypatch):
    """Moving rows would tear their blocks apart."""
    monkeypatch.setattr(layouts, "LAYOUTS", (AcrossRows,))
    with pytest.raises(UserError, match=r"blocks run across rows.*requant\.mode=nf4"):
        converted(tiny, tmp_path / "artifacts")


def test_no_stage_names_a_layout():
    """The table and the samples, which write one, are all that know the split layout."""
    root = Path(__file__).parent.parent
    rooms = [root / "stages", *(root / "gptoss_nf4" / room for room in ("convert", "check", "fetch"))]
    for file in (file for room in rooms for file in room.rglob("*.py")):
        assert "source.split" not in file.read_text(), file


def test_a_source_that_lacks_a_method_cannot_be_made():
    class Incomplete(Source):
        layout = "incomplete"

    with pytest.raises(TypeError, match="abstract"):
        Incomplete(None)


def test_mode_nf4_reads_through_the_same_face(tiny, source_copy, tmp_path, monkeypatch):
    options = RequantOptions(mode=NF4)
    expected = converted(tiny, tmp_path / "split", options)
    rewrite(source_copy, renamed)
    monkeypatch.setattr(layouts, "LAYOUTS", (Renamed, *layouts.LAYOUTS))
    assert converted(source_copy, tmp_path / "artifacts", options) == expected
