"""Everything that the report tells, read from the files that the stages wrote. What no stage has written yet is missing."""

from dataclasses import dataclass, field
from pathlib import Path

from gptoss_nf4.report import series
from gptoss_nf4.storage.artifacts import Artifacts
from gptoss_nf4.storage.checkpoint import INDEX_FILE
from gptoss_nf4.storage.digests import read_digests
from gptoss_nf4.storage.reading import read_json_object
from gptoss_nf4.storage.writing import sha256_of


@dataclass(frozen=True)
class Missing:
    """What the report cannot tell, and the stage that finds it."""

    what: str
    stage: str


@dataclass(frozen=True)
class AdapterFacts:
    """What stages adapter and smoke-adapter found in one adapter; None where they have not run."""

    name: str
    described: dict | None
    smoke: dict | None


@dataclass(frozen=True)
class Facts:
    """What is known of one conversion. A dict is a file of a stage as it wrote it, or None."""

    name: str
    manifest: dict | None
    config: dict | None
    total_bytes: int | None
    """Of the result's tensors."""
    dtypes: dict | None
    exactness: dict | None
    digests: dict[str, str] | None
    """SHA-256 by name of every file that was proved."""
    smoke: dict | None
    benchmark: dict | None
    adapters: list[AdapterFacts] = field(default_factory=list)
    sizes: list[dict] = field(default_factory=list)
    absmax: list[dict] = field(default_factory=list)
    positions: list[dict] = field(default_factory=list)
    layer_seconds: list[dict] = field(default_factory=list)
    stage_seconds: dict[str, float] = field(default_factory=dict)
    missing: list[Missing] = field(default_factory=list)

    @property
    def proved(self) -> bool:
        """Whether stage prove found the result to be the source, in mode nf4 but for what quantizing again changed."""
        return bool(self.exactness and self.digests)


def _of_these_settings(digests: dict[str, str], checkpoint: Path) -> bool:
    """Whether the proof is of a checkpoint with the settings and tensors that are here now. `verify` reads all bytes."""
    files = (checkpoint / "config.json", checkpoint / INDEX_FILE)
    return all(file.exists() and digests.get(file.name) == sha256_of(file) for file in files)


def gather(artifacts: Artifacts, metrics: Path, layers: int, adapters: list[str]) -> Facts:
    """Read what is there of the model with `layers` layers and `adapters`. UserError for a damaged file.

    `metrics` is the directory of metrics. Those of another model, which was converted here before, count as missing.
    """
    name = artifacts.root.name
    missing: list[Missing] = []

    def read(path: Path, stage: str, what: str) -> dict | None:
        found = read_json_object(path) if path.exists() else None
        if found is not None and found.get("model", name) == name:
            return found
        missing.append(Missing(what, stage))
        return None

    def metric(file: str, stage: str, what: str) -> dict | None:
        return read(metrics / file, stage, what)

    manifest = read(artifacts.manifest, "fetch", "The source")
    converted = all(artifacts.report(k).exists() and artifacts.layer_weights(k).exists() for k in range(layers))
    if not converted:
        missing.append(Missing("Size and absmax of each layer", "requant"))
    dtypes = metric("dtypes.json", "normalize", "The dtypes")
    config = read(artifacts.checkpoint / "config.json", "assemble", "The settings of the result")
    index = artifacts.checkpoint / INDEX_FILE
    exactness = metric("exactness.json", "prove", "The proof")
    digests = read_digests(artifacts.digest_list) if exactness and artifacts.digest_list.exists() else None
    if digests and not _of_these_settings(digests, artifacts.checkpoint):
        exactness = digests = None
        missing.append(Missing("The proof of what is here now", "prove"))
    smoke = metric("smoke.json", "smoke", "The comparison with transformers")
    benchmark = metric("benchmark.json", "benchmark", "The speed")
    found = [
        AdapterFacts(
            each,
            read(artifacts.adapter(each), f"adapter@{each}", f"What adapter {each} changes"),
            metric(f"adapters/{each}.json", f"smoke-adapter@{each}", f"Adapter {each} compared with PEFT"),
        )
        for each in adapters
    ]
    return Facts(
        name=name,
        manifest=manifest,
        config=config,
        total_bytes=read_json_object(index)["metadata"]["total_size"] if index.exists() else None,
        dtypes=dtypes,
        exactness=exactness,
        digests=digests,
        smoke=smoke,
        benchmark=benchmark,
        adapters=found,
        sizes=series.sizes(artifacts, layers) if converted else [],
        absmax=series.absmax(series.reports_of(artifacts, layers)) if converted else [],
        positions=series.read(artifacts.logprobs) if smoke else [],
        layer_seconds=series.seconds(artifacts, layers),
        stage_seconds=series.stage_seconds(artifacts),
        missing=missing,
    )
