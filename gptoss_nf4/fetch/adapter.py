"""Stage adapter: bringing one adapter, checking all of it against the base, and describing what it changes.

The adapter is not rewritten: vLLM reads the directory that it was saved in.
"""

import math
from pathlib import Path

import numpy as np

from gptoss_nf4.adapters.adapter import Adapter
from gptoss_nf4.adapters.base import Verdict
from gptoss_nf4.errors import UserError
from gptoss_nf4.fetch import hub
from gptoss_nf4.format import names
from gptoss_nf4.source.interface import Source
from gptoss_nf4.source.model import AdapterSource, Model
from gptoss_nf4.storage.artifacts import Artifacts
from gptoss_nf4.storage.checkpoint import ADAPTER_CONFIG
from gptoss_nf4.storage.writing import describe_file, write_json

OTHER_BASE = (Verdict.OTHER_MODEL, Verdict.OTHER_WEIGHTS)


def fetch_adapter(source: AdapterSource, model: Model, base: Source, artifacts: Artifacts) -> dict:
    """Bring the adapter, check every tensor of it against `base`, and write and return its description.

    UserError for an adapter that is damaged, of another base or not supported. Nothing is written then.
    """
    directory, origin = _make_available(source)
    adapter = Adapter(directory)
    match = adapter.base_matches(*_names_of(model))
    if match.verdict in OTHER_BASE and not source.any_base:
        raise UserError(
            "adapter of another base",
            where=directory,
            got=f"base_model_name_or_path {adapter.config.base_model!r}",
            expected=f"the base that is converted here, {model.repository or model.path or model.name}",
            next_step=f"convert that base, or, if you accept other results, add any_base: true to adapters.{source.name}",
        )
    described = adapter.describe(base.dimensions)
    for name, about in described["modules"].items():
        about["relative_size"] = _relative_size(base, name, about["frobenius_norm"])
    files = [describe_file(path) for path in (directory / ADAPTER_CONFIG, adapter.weights_file)]
    description = {
        "name": source.name,
        "source": origin,
        "base": {"verdict": match.verdict.value, "statement": match.statement},
        "files": files,
        **described,
    }
    write_json(artifacts.adapter(source.name), description)
    return description


def _make_available(source: AdapterSource) -> tuple[Path, dict]:
    """(directory of the adapter, its origin as the description records it)."""
    if source.repository:
        directory, commit = hub.download(source.repository, source.revision)
        return directory, {"kind": "hub", "repository": source.repository, "commit": commit}
    return Path(str(source.path)), {"kind": "local", "path": source.path}


def _names_of(model: Model) -> list[str]:
    """The names by which an adapter's configuration may call the base."""
    return [name for name in (model.repository, model.path, model.name) if name]


def _relative_size(base: Source, name: str, delta_norm: float) -> float | None:
    """Frobenius norm of the delta divided by that of the weight that it changes, to three digits.

    Of the experts only the first is read, and stands for all: reading every weight would take as long as the proof. None
    where the weight is all zeros.
    """
    layer = names.layer_of(name)
    if layer is None:
        raise ValueError(f"{name} is in no layer")
    within = name.removeprefix(names.prefix(layer))
    fusion = next((each for each in names.FUSIONS if each.target == within and each.stacked), None)
    if fusion is not None:
        norm = _weight_norm(base, names.parts_of(fusion, layer, 1)[0]) * math.sqrt(base.dimensions.experts)
    else:
        norm = _weight_norm(base, name)
    return float(f"{delta_norm / norm:.3g}") if norm else None


def _weight_norm(base: Source, name: str) -> float:
    """Frobenius norm of one weight of the base, by its canonical name."""
    for _, module_name, shape in names.modules_of(base.dimensions, names.layer_of(name) or 0):
        if module_name == name:
            module = base.module(name, shape)
            if module.state is not None:
                return float(np.linalg.norm(base.dequantized(module)))
    return float(base.floating(f"{name}.weight").tensor().float().norm())
