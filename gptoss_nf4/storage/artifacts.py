"""Where every file of a conversion lies: `artifacts/<model name>/`, the one place that knows it (dvc.yaml repeats it)."""

from dataclasses import dataclass
from pathlib import Path

from gptoss_nf4.errors import UserError


@dataclass(frozen=True)
class Artifacts:
    root: Path

    @classmethod
    def of(cls, name: str) -> "Artifacts":
        return cls(Path("artifacts") / name)

    @property
    def source(self) -> Path:
        """The embedded model's checkpoint; other models stay where they are."""
        return self.root / "source"

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"

    @property
    def seen(self) -> Path:
        """What stage fetch remembers of the source's files; no output of it, may be deleted."""
        return self.root / "seen.json"

    @property
    def digests(self) -> Path:
        return self.root / "digests"

    @property
    def dense_digests(self) -> Path:
        """Digests of what stage normalize reads."""
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
        """What stage adapter found in an adapter; the adapter itself stays where it was saved."""
        return self.adapters / f"{name}.json"

    @property
    def checkpoint(self) -> Path:
        return self.root / "checkpoint"

    def layer_weights(self, layer: int) -> Path:
        return self.checkpoint / f"layer-{layer}.safetensors"

    @property
    def digest_list(self) -> Path:
        """SHA-256 of every file of the checkpoint, as `sha256sum` writes and checks them."""
        return self.root / "checkpoint.sha256"

    @property
    def dense_weights(self) -> Path:
        return self.checkpoint / "dense.safetensors"

    def require(self, path: Path, stage: str) -> Path:
        """`path`, or a UserError that names the stage which writes it."""
        if not path.exists():
            raise UserError(
                "missing input",
                where=path.parent,
                got=f"no {path.name}",
                expected=f"the output of stage {stage}",
                next_step=f"run `dvc repro {stage}`",
            )
        return path
