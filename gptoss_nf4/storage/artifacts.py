"""Where every file of a conversion lies. Only this module and dvc.yaml know the names."""

from dataclasses import dataclass
from pathlib import Path

from gptoss_nf4.errors import UserError

CARD = "README.md"  # the name by which the Hub finds a model card


@dataclass(frozen=True)
class Artifacts:
    """The paths below `root`, which is `artifacts/<model name>/` in the pipeline. No path is promised to exist."""

    root: Path

    @classmethod
    def of(cls, name: str) -> "Artifacts":
        return cls(Path("artifacts") / name)

    @property
    def source(self) -> Path:
        """A sample's checkpoint, which stage fetch writes. Other sources stay where they are."""
        return self.root / "source"

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"

    @property
    def origin(self) -> Path:
        """Which source these artifacts belong to: see `fetch/owner.py`. It is no output, so DVC leaves it there."""
        return self.root / "origin.json"

    @property
    def seen(self) -> Path:
        """Digests that stage fetch remembers. It is a cache, not an output: deleting it costs only time."""
        return self.root / "seen.json"

    @property
    def digests(self) -> Path:
        return self.root / "digests"

    @property
    def dense_digests(self) -> Path:
        """Digests of the tensors that stage normalize reads."""
        return self.root / "dense-digests.json"

    def digest(self, layer: int | None) -> Path:
        return self.digests / ("outside.json" if layer is None else f"layer-{layer}.json")

    def absmax(self, layer: int) -> Path:
        return self.root / "absmax" / f"layer-{layer}.safetensors"

    @property
    def reports(self) -> Path:
        return self.root / "reports"

    def report(self, layer: int) -> Path:
        return self.reports / f"layer-{layer}.json"

    @property
    def adapters(self) -> Path:
        return self.root / "adapters"

    def adapter(self, name: str) -> Path:
        """What stage adapter found in adapter `name`. The adapter itself stays where it was saved."""
        return self.adapters / f"{name}.json"

    @property
    def checkpoint(self) -> Path:
        return self.root / "checkpoint"

    def layer_weights(self, layer: int) -> Path:
        return self.checkpoint / f"layer-{layer}.safetensors"

    def seconds(self, stage: str, layer: int | None = None) -> Path:
        """How long a stage took when it last ran. It is no output: two runs of one conversion would have other outputs."""
        return self.root / "seconds" / f"{stage}{'' if layer is None else f'-{layer}'}.json"

    @property
    def logprobs(self) -> Path:
        """By how much vLLM and transformers differ at each position: see `check.agreement.Agreement.by_position`."""
        return self.root / "logprobs.json"

    @property
    def card(self) -> Path:
        """The model card. A copy of it lies in the checkpoint: see `checkpoint_card`."""
        return self.root / CARD

    @property
    def checkpoint_card(self) -> Path:
        return self.checkpoint / CARD

    @property
    def page(self) -> Path:
        """The report for people, one HTML file."""
        return self.root / "report.html"

    @property
    def digest_list(self) -> Path:
        """SHA-256 of every file of the checkpoint but its card, as `sha256sum` writes and checks them."""
        return self.root / "checkpoint.sha256"

    @property
    def dense_weights(self) -> Path:
        return self.checkpoint / "dense.safetensors"

    def require(self, path: Path, stage: str) -> Path:
        """Return `path` if it exists. Else UserError names `stage`, which writes it."""
        if not path.exists():
            raise UserError(
                "missing input",
                where=path.parent,
                got=f"no {path.name}",
                expected=f"the output of stage {stage}",
                next_step=f"run `dvc repro {stage}`",
            )
        return path
