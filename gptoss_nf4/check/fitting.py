"""The check that a converted checkpoint holds what its config.json says: in its files, or while its tensors come."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from gptoss_nf4.errors import UserError
from gptoss_nf4.format.dtypes import TORCH_DTYPES
from gptoss_nf4.format.residual import scale_of
from gptoss_nf4.format.result import Expected, expected_tensors
from gptoss_nf4.storage.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch

NEXT_STEP = "run `dvc repro assemble` where it was converted, and copy all of it if it is served elsewhere"


def require_fitting(checkpoint: Checkpoint) -> None:
    """Check that a converted checkpoint holds the tensors that its config.json asks for. UserError names one fault."""
    config_file = checkpoint.directory / "config.json"
    expected = expected_tensors(checkpoint.config, config_file)
    scale_of(checkpoint.config["quantization_config"], config_file)
    _require_all(expected, checkpoint.tensors.keys() & checkpoint.weight_map.keys(), checkpoint.directory)
    for name in expected:
        info = checkpoint.tensors[name]
        _require_kind(expected, name, info.dtype, info.shape, info.file)


def fitting(
    tensors: "Iterable[tuple[str, torch.Tensor]]", expected: dict[str, Expected], where: object
) -> "Iterator[tuple[str, torch.Tensor]]":
    """`tensors` by name, as they come. UserError for one that does not fit, and at the end for one that did not come."""
    came = set()
    for name, tensor in tensors:
        came.add(name)
        if name in expected:
            dtype = str(tensor.dtype).removeprefix("torch.")
            stored = next((key for key, torch_name in TORCH_DTYPES.items() if torch_name == dtype), dtype)
            _require_kind(expected, name, stored, tuple(tensor.shape), where)
        yield name, tensor
    _require_all(expected, came, where)


def _require_all(expected: dict[str, Expected], found: set[str], where: object) -> None:
    missing = sorted(expected.keys() - found)
    if missing:
        raise UserError(
            "missing tensor",
            where=where,
            got=f"no {missing[0]} ({len(missing)} in all)",
            expected="every tensor of the model, in the index and in its file",
            next_step=NEXT_STEP,
        )


def _require_kind(expected: dict[str, Expected], name: str, dtype: str, found: tuple[int, ...], where: object) -> None:
    dtypes, shape = expected[name]
    if dtype not in dtypes or shape not in (None, found):
        raise UserError(
            "wrong tensor",
            where=where,
            got=f"{name} {dtype} {list(found)}",
            expected=f"{' or '.join(sorted(dtypes))}{'' if shape is None else f' {list(shape)}'}, by config.json",
            next_step=NEXT_STEP,
        )
