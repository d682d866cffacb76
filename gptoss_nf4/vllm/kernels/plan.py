"""Which kernels run a product, and how: by its number of rows and by the GPU. Measured on an H100, an H200 (NOTES.md)."""

from dataclasses import dataclass
from enum import Enum
from math import inf
from types import ModuleType
from typing import ClassVar

import torch
import triton

from gptoss_nf4.vllm.kernels import large, small
from gptoss_nf4.vllm.kernels.decode import PAIRS_BYTES
from gptoss_nf4.vllm.kernels.start import cdiv

MAX_LINEAR_ROWS = 64  # beyond, a dense copy of the weight and cuBLAS are faster
LINEAR_STAGES = 4  # of `large.linear`; 3 and 5 are slower


class Decoding(Enum):
    """How codes become weights, from the fastest on."""

    SHARED_TABLE = "shared-table"
    """By `decode.lookup`, where there is room for its table, else by `decode.decode`."""
    PERMUTES = "permutes"
    """By `decode.decode` everywhere."""
    DEQUANTIZE = "dequantize"
    """Not in our kernels: dense weights in every step."""


@dataclass(frozen=True)
class Gpu:
    """What of a GPU the choice depends on, and what was found to work on it (`proving`)."""

    wgmma: bool
    """Hopper's matrix instructions; Triton compiles the same products to mma.sync elsewhere."""
    shared_bytes: int
    """Shared memory of a multiprocessor."""
    starts_early: bool
    """A kernel can be started before the one in front of it has ended, see `ahead`."""
    multiprocessors: int = 0
    """How many it has."""
    chosen: Decoding | None = None
    """In place of the decoding that the shared memory suggests."""

    @property
    def decoding(self) -> Decoding:
        if self.chosen is not None:
            return self.chosen
        # Whether the table leaves room for six programs of four warps, as registers do.
        roomy = self.shared_bytes >= 6 * (PAIRS_BYTES + 2048)
        return Decoding.SHARED_TABLE if roomy else Decoding.PERMUTES

    @property
    def holds_tables(self) -> bool:
        """Whether the kernels of `small` decode by the table of `decode.lookup`."""
        return self.decoding is Decoding.SHARED_TABLE

    @property
    def holds_large_tables(self) -> bool:
        """Whether those of `large` do: they need room for what they read ahead too, and were measured on Hopper only."""
        return self.holds_tables and self.wgmma


@dataclass(frozen=True)
class Small:
    """The kernels of `small`: decoding, of not too many."""

    rows: int
    """Of activations, of a program: 8, 16 or 32."""
    warps: int
    """Of a program; they share its inputs."""
    down_warps: int = 4
    """The same for `down_experts`."""
    ahead: bool = False
    """Programs of a linear layer bring weights into the L2 cache a round before they load them, see `ahead`."""

    kernels: ClassVar[ModuleType] = small

    def options(self, gpu: Gpu, down: bool = False) -> dict:
        """The constants and Triton's launch options of a kernel, of `down_experts` if `down`."""
        warps = self.down_warps if down else self.warps
        options = {"BM": self.rows, "WARPS": warps, "SHARED_TABLE": gpu.holds_tables, "num_warps": warps}
        # Six programs of four warps want 80 registers a thread; Triton's interpreter does not know the option.
        return options | {"maxnreg": 80} if gpu.holds_tables and self.rows == 8 else options


@dataclass(frozen=True)
class Large:
    """The kernels of `large`: prefill, and decoding of large batches."""

    rows: int
    """Of activations, of a program: 16 to 128."""
    stages: int = 3
    """A program reads stages - 1 input tiles ahead."""
    parts: int = 1
    """Among which programs share the inputs of a linear layer."""
    shrinks_slots: bool = False
    """Each slot reads its adapter's lora_A, not each block of slots."""

    kernels: ClassVar[ModuleType] = large

    def options(self, gpu: Gpu, down: bool = False) -> dict:
        """As those of `Small`; the same for both products."""
        return {
            "BM": self.rows,
            "STAGES": self.stages,
            "WGMMA": gpu.wgmma,
            "SHARED_TABLE": gpu.holds_large_tables,
            "num_warps": large.WARPS,
        }


Plan = Small | Large
# Of both products of the experts, each up to a mean number of rows that an expert gets.
WGMMA_PLANS: tuple[tuple[float, Plan], ...] = (
    (5.5, Small(rows=8, warps=4)),
    (8, Large(rows=16, stages=4, shrinks_slots=True)),
    (12, Large(rows=16, stages=4)),
    (24, Large(rows=32)),
    (80, Large(rows=64)),
    (inf, Large(rows=128)),
)
# With mma.sync 128 rows take more registers than there are.
OTHER_PLANS: tuple[tuple[float, Plan], ...] = (
    (4, Small(rows=8, warps=4)),
    (8, Small(rows=16, warps=4)),
    (24, Large(rows=32)),
    (inf, Large(rows=64)),
)

_GPUS: dict[torch.device, Gpu] = {}


def gpu_of(device: torch.device) -> Gpu:
    """The GPU on which kernels run, as `settle` was told, else as `examined`."""
    if device not in _GPUS:
        _GPUS[device] = examined(device)
    return _GPUS[device]


def settle(device: torch.device, gpu: Gpu) -> None:
    """Let kernels on `device` be chosen for `gpu` from now on. `device` may be `meta`, where launches are only recorded."""
    _GPUS[device] = gpu


def examined(device: torch.device) -> Gpu:
    """A CUDA device as it presents itself; without one, and in Triton's interpreter, a GPU that can do none of it."""
    if device.type != "cuda" or triton.knobs.runtime.interpret:
        return Gpu(wgmma=False, shared_bytes=0, starts_early=False)
    properties = torch.cuda.get_device_properties(device)
    return Gpu(
        wgmma=properties.major == 9,
        shared_bytes=properties.shared_memory_per_multiprocessor,
        starts_early=properties.major >= 9,
        multiprocessors=properties.multi_processor_count,
    )


def plan_linear(rows: int, row_tiles: int, input_tiles: int, gpu: Gpu) -> Plan | None:
    """For a linear layer of so many tiles on `rows` rows of activations; None: a dense copy of the weight, and cuBLAS."""
    # Many programs that start early crowd each other out, unless they are small. Asking ahead gains everywhere but with
    # few programs at 17 to 32 rows (NOTES.md).
    crowded = gpu.starts_early and row_tiles >= 2 * gpu.multiprocessors
    if rows <= 8:
        return Small(rows=8, warps=4 if crowded else 8, ahead=gpu.starts_early)
    if rows <= 32:
        return Small(rows=16, warps=4, ahead=crowded or (gpu.starts_early and rows <= 16))
    if rows > MAX_LINEAR_ROWS:
        return None
    # So many parts that all programs run at once, two on a multiprocessor, and none has fewer input tiles than it reads
    # ahead. That leaves programs too few in a layer that several GPUs share: 220 won on 132 multiprocessors but with
    # eight adapters, 184 lost (NOTES.md).
    programs = cdiv(row_tiles, large.DOWN_TILES)
    parts = max(1, min(2 * gpu.multiprocessors // programs, input_tiles // LINEAR_STAGES))
    if gpu.wgmma and 2 * parts * programs >= 3 * gpu.multiprocessors:
        return Large(rows=MAX_LINEAR_ROWS, stages=LINEAR_STAGES, parts=parts)
    return Small(rows=32, warps=2 if gpu.starts_early else 4, ahead=gpu.starts_early)


def plan_experts(tokens: int, top_k: int, experts: int, gpu: Gpu) -> Plan:
    """For both products of the experts, by the mean number of rows that an expert gets."""
    if tokens == 1 and gpu.starts_early:
        # The programs of one token's w2 all fit beside those of w13 that still run. Large ones spread more evenly.
        return Small(rows=8, warps=4, down_warps=8)
    mean = tokens * top_k / experts
    return next(plan for most, plan in (WGMMA_PLANS if gpu.wgmma else OTHER_PLANS) if mean <= most)
