"""What is compared, and which engines are up together. Imports neither torch nor vLLM."""

import json
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path

from gptoss_nf4.format.residual import AUTO, resolve

# vLLM's default gpu_memory_utilization, of the memory that CUDA reports for a 24 GB card: 24,576 MiB less what the driver
# keeps, as an RTX 3090 shows it.
UTILIZATION, CARD_GIB = 0.92, 23.69
DEFAULT_GIB = round(UTILIZATION * CARD_GIB, 1)
SHARED_KV_GIB = 5.0  # of each engine that is up with others; one request of the full length needs 3.1


@dataclass(frozen=True)
class Contender:
    """A way to serve.

    weights: a kind of `benchmarks.weights.ensure`. dtype, engine_args: vLLM's arguments. steps: share of the decode steps
    that are measured, for one whose step takes many times as long.
    """

    weights: str
    dtype: str
    engine_args: dict[str, str] = field(default_factory=dict)
    plugin: bool = False
    dequantize_all: bool = False
    steps: float = 1.0

    @property
    def configuration(self) -> str:
        """In words, for tables."""
        words = [self.weights.split("-")[0].upper(), self.dtype, *self.engine_args.values()]
        if self.plugin:
            words.append(f"residual_scale {Fraction(resolve(AUTO, self.dtype))}")
        if "-fused-" in self.weights:
            words.append("blocks along the outputs")
        if self.dequantize_all:
            words.append("every expert dequantized")
        return ", ".join(words)


PLUGIN = "plugin"  # in the configuration that a conversion makes by default
CONTENDERS = {
    PLUGIN: Contender("nf4-float16", "float16", plugin=True),
    "plugin-bf16": Contender("nf4-bfloat16", "bfloat16", plugin=True),
    "plugin-fused": Contender("nf4-fused-float16", "float16", plugin=True),
    "plugin-fused-bf16": Contender("nf4-fused-bfloat16", "bfloat16", plugin=True),
    "mxfp4-marlin": Contender("mxfp4", "bfloat16", {"moe_backend": "marlin"}),
    "mxfp4-triton": Contender("mxfp4", "bfloat16", {"moe_backend": "triton"}),
    "mxfp4-humming": Contender("mxfp4", "bfloat16", {"moe_backend": "humming"}),
    "mxfp4-flashinfer": Contender("mxfp4", "bfloat16", {"moe_backend": "flashinfer_cutlass"}),
    "dequantize-all": Contender("nf4-bfloat16", "bfloat16", dequantize_all=True, steps=0.25),
}


@dataclass(frozen=True)
class Job:
    """What one contender's process is to serve. Sizes are in GiB of GPU memory, lengths in tokens."""

    contender: str
    directory: Path  # of all weights and logs
    gib: float
    kv_gib: float | None  # None: what `gib` leaves
    max_model_len: int
    max_num_seqs: int
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
    """`jobs` in groups of at most `together`, whose engines are up at the same time.

    Where there are several in a group, none could tell whose memory grows: each gets a KV cache of fixed size.
    """
    groups = [jobs[start : start + together] for start in range(0, len(jobs), together)]
    return [
        [replace(job, kv_gib=job.kv_gib or SHARED_KV_GIB) for job in group] if len(group) > 1 else group for group in groups
    ]
