"""Stage fetch: bringing a source and describing it.

The description is a manifest and one digest file for each layer. A layer's stages depend on its digest file.
"""

from collections.abc import Callable
from pathlib import Path

from gptoss_nf4.errors import COPY_AGAIN, UserError
from gptoss_nf4.fetch import hub
from gptoss_nf4.fetch.budget import budget, plan_line, synthetic_bytes
from gptoss_nf4.fetch.licence import licence
from gptoss_nf4.fetch.owner import claim, require_own
from gptoss_nf4.fetch.tensor_digests import bytes_to_hash, describe, hashing_speed
from gptoss_nf4.format.config_fields import ignored_keys
from gptoss_nf4.format.dimensions import Dimensions
from gptoss_nf4.format.names import FUSIONS
from gptoss_nf4.source.interface import Source, becomes_dense
from gptoss_nf4.source.layouts import open_checkpoint
from gptoss_nf4.source.model import EMBEDDED_KINDS, SYNTHETIC_KINDS, Model
from gptoss_nf4.source.side_files import require_side_files, side_files, unread
from gptoss_nf4.storage.artifacts import Artifacts
from gptoss_nf4.storage.digests import verify
from gptoss_nf4.storage.machine import require_disk
from gptoss_nf4.storage.reading import read_json_object
from gptoss_nf4.storage.writing import describe_file, write_json


def fetch(model: Model, artifacts: Artifacts, say: Callable[[str], None] = lambda line: None) -> dict:
    """Bring the source, validate all of it, write its digests and its manifest, and return the manifest.

    `say` gets a line on what the conversion will take, before the first byte is hashed, and one for whatever is left out.
    UserError for a source that is damaged or not supported, and for a full disk; no description is written then. The
    source's own files stay where they are.
    """
    require_own(artifacts, model.origin)
    directory, origin = _make_available(model, artifacts, say)
    if model.expected:
        verify(directory, Path(model.expected), next_step=COPY_AGAIN)
    source = open_checkpoint(directory)
    source.validate()
    require_side_files(directory)
    plan = budget(source, artifacts)
    require_disk(plan.disk_bytes, artifacts.root, "the converted checkpoint")
    size = sum(file.stat().st_size for file in source.checkpoint.weight_files)
    # Where only a part is new, how much there is to convert is not known yet.
    all_new = bytes_to_hash(source.checkpoint, artifacts.seen) > size / 2
    say(plan_line(plan, size, artifacts.root, hashing_speed(source.checkpoint) if all_new else None))
    if ignored := ignored_keys(source.checkpoint.config):
        say(f"config.json has {', '.join(ignored)}, which neither transformers nor vLLM reads; the result goes without")
    notes = [*source.notes(), *unread(directory)]
    for note in notes:
        say(note)
    digests = describe(source.checkpoint, list(source.stored_by_layer.values()), artifacts.seen)
    claim(artifacts, model.origin)
    for layer, digest in zip(source.stored_by_layer, digests, strict=True):
        write_json(artifacts.digest(layer), digest)
    moved = _moved_by_layer(source)
    write_json(artifacts.dense_digests, {name: d[name] for d in digests for name in d if name not in moved})
    for stale in set(artifacts.digests.glob("layer-*.json")) - {artifacts.digest(k) for k in source.stored_by_layer}:
        stale.unlink()  # a longer model of the same name was here before
    manifest = {
        "model": model.name,
        "source": origin,
        **licence(directory),
        "layout": source.layout,
        "notes": notes,
        "dimensions": source.dimensions.as_dict(),
        "tensors": len(source.checkpoint.tensors),
        "files": _describe_files(source),
    }
    write_json(artifacts.manifest, manifest)
    return manifest


def _make_available(model: Model, artifacts: Artifacts, say: Callable[[str], None]) -> tuple[Path, dict]:
    """(directory of the source, its origin as the manifest records it)."""
    if model.kind in EMBEDDED_KINDS:
        from gptoss_nf4.samples import embedded

        massive = model.kind == "embedded_massive"
        dimensions = embedded.MASSIVE_DIMENSIONS if massive else embedded.TINY
        embedded.write_checkpoint(artifacts.source, dimensions, massive=massive, stacked=model.kind == "embedded_fused")
        return artifacts.source, {"kind": model.kind}
    if model.kind in SYNTHETIC_KINDS and model.dimensions:
        from gptoss_nf4.samples import synthetic

        if not _holds(artifacts.source, model.dimensions):
            require_disk(synthetic_bytes(model.dimensions), artifacts.source, "the synthetic source")
            synthetic.write_checkpoint(artifacts.source, model.dimensions, stacked=model.kind == "synthetic_fused")
        return artifacts.source, {"kind": model.kind, "values": "random: for measuring the conversion only"}
    if model.kind == "hub":
        directory, commit = hub.download(str(model.repository), model.revision, say)
        return directory, {"kind": model.kind, "repository": model.repository, "commit": commit}
    return Path(str(model.path)), {"kind": model.kind, "path": model.path}


def _holds(directory: Path, dimensions: Dimensions) -> bool:
    """Whether `directory` holds a whole synthetic source of these dimensions: its config.json is written last."""
    config = directory / "config.json"
    try:
        return config.is_file() and Dimensions.from_config(read_json_object(config), config) == dimensions
    except UserError:  # written by an older version
        return False


def _describe_files(source: Source) -> list[dict]:
    """Name and size of each weight file, whose tensors have digests of their own. Other files also by digest."""
    weights = [{"name": path.name, "bytes": path.stat().st_size} for path in source.checkpoint.weight_files]
    return [*weights, *(describe_file(path) for path in side_files(source.checkpoint.directory))]


def _moved_by_layer(source: Source) -> set[str]:
    """Stored names of the tensors that stage normalize never reads: those of weights that are 4-bit in the result."""
    moved: set[str] = set()
    for layer in range(source.dimensions.layers):
        for fusion in FUSIONS:
            parts = source.modules(layer, fusion)
            if not becomes_dense(fusion, parts):
                for part in parts:
                    if part.state:
                        moved |= {name for kind, name in source.stored(part).items() if kind != "quant_state"}
                    else:
                        moved.add(source.floating(part.weight).stored)
    return moved
