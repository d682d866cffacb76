"""What is compared, and which engines start together. Imports neither torch nor vLLM."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

BATCHES = (1, 8, 32)
PREFILLS = (2048, 8192)  # tokens of a prompt
ADAPTERS = 8  # that an engine with LoRA holds
SHARED_KV_GIB = 5.0  # of each engine that starts with others; one request of the full length needs 3.1


@dataclass(frozen=True)
class Contender:
    """A way to serve: which weights (a kind of `benchmarks.weights.ensure`), and vLLM's arguments for it."""

    weights: str
    engine_args: dict[str, str] = field(default_factory=dict)
    dequantize_all: bool = False


OURS = "nf4"
CONTENDERS = {
    OURS: Contender("nf4"),
    "mxfp4-marlin": Contender("mxfp4", {"moe_backend": "marlin"}),
    "mxfp4-triton": Contender("mxfp4", {"moe_backend": "triton"}),
    "nf4-dequantize-all": Contender("nf4", dequantize_all=True),
}


@dataclass(frozen=True)
class Job:
    """What one contender's process is to do. Sizes are in GiB of GPU memory, lengths in tokens."""

    contender: str
    directory: Path  # of all weights and logs
    gib: float
    kv_gib: float | None  # None: what `gib` leaves
    max_model_len: int
    rounds: int
    long_prompt: bool
    profile: bool
    lora_rank: int | None = None  # None: an engine without LoRA

    @property
    def name(self) -> str:
        """Of its results and its log."""
        return self.contender if self.lora_rank is None else f"{self.contender}-lora"

    @property
    def adapter(self) -> Path:
        return self.directory / f"adapter-{self.lora_rank}"

    @property
    def checkpoint(self) -> Path:
        return self.directory / CONTENDERS[self.contender].weights

    @property
    def log(self) -> Path:
        return self.directory / f"{self.name}.log"

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"directory": str(self.directory)})

    @classmethod
    def from_json(cls, text: str) -> "Job":
        fields = json.loads(text)
        return cls(**fields | {"directory": Path(fields["directory"])})


def grouped(jobs: list[Job], together: int) -> list[list[Job]]:
    """`jobs` in the groups whose engines start together, at most `together` each.

    The plugin's are groups of their own where a cache takes what is left of the memory. Whoever starts with others gets a
    cache of fixed size.
    """
    alone = [job for job in jobs if job.contender == OURS and not job.kv_gib]
    others = [job for job in jobs if job not in alone]
    groups = [[job] for job in alone]
    for start in range(0, len(others), together):
        group = others[start : start + together]
        if len(group) > 1:
            group = [replace(job, kv_gib=job.kv_gib or SHARED_KV_GIB) for job in group]
        groups.append(group)
    return groups
