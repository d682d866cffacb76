"""w13 and w2 of a layer's experts: which part of the checkpoint's tensors a rank keeps, and in which order.

E is the number of local experts: those of this rank. Nothing here knows vLLM's classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch

from gptoss_nf4.errors import UserError
from gptoss_nf4.format.blocks import OUTPUTS, absmax_shape
from gptoss_nf4.format.rows import INTERLEAVED, interleaved_rows
from gptoss_nf4.vllm.kernels.tiles import (
    ABSMAX_FACTOR,
    gate_and_up_tiles,
    pack_absmax,
    pack_absmax_of_inputs,
    pack_codes,
    pad_rows,
    tile_inputs,
    tile_inputs_across,
)
from gptoss_nf4.vllm.loading import blocksize_of_shard, repeat_absmax, require_packable
from gptoss_nf4.vllm.settings import Settings

Change = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Part:
    """One parameter of a weight, and the steps from the checkpoint's tensor to it. They are given some experts at a time.

    `of_rank` takes this rank's part of the tensor of the local experts, as a view where it can be one. `shape` and `dtype`
    are those of that part, whose rows are still in order. `check` raises UserError for values that cannot be kept. `kept`
    brings the part into the form that stays in memory; shape and dtype may change.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    of_rank: Change
    kept: Change
    check: Callable[[torch.Tensor], None] = lambda rows: None


def blocks_of_rank(settings: Settings, name: str, rows: int, columns: int, prefix: str) -> tuple[str, int]:
    """(direction of blocks, blocksize) of w13 or w2, called `name`, in the layer `prefix`; `rows` and `columns` of a rank.

    The blocksize is the checkpoint's, or a smaller one with which this rank's columns, or rows, are whole blocks. UserError
    where there is none, or where a byte would be cut.
    """
    blocks_along = settings.blocks_along(f"{prefix}.{name}")
    if blocks_along == OUTPUTS and columns % 2:
        raise UserError(
            "tensor parallel size does not fit",
            where=prefix,
            got=f"{columns} inputs for each rank",
            expected="a multiple of 2, since a byte has the codes of two",
            next_step="use a smaller tensor_parallel_size, or expert parallelism",
        )
    blocked = rows if blocks_along == OUTPUTS else columns
    return blocks_along, blocksize_of_shard(settings.blocksize, blocked, prefix, blocks_along)


class ExpertWeight(ABC):
    """One of the two weights of the local experts, logical [E, rows, columns] on this rank.

    `blocks_along` and `blocksize` are those of `blocks_of_rank`. `packed` says whether the weight is kept in the order that
    the kernels read; absmax is multiplied by `absmax_factor` there.
    """

    name: str  # w13 or w2; the names of the parameters begin with it, and so does its name in the checkpoint

    def __init__(
        self, rows: int, columns: int, *, settings: Settings, tp_size: int, tp_rank: int, packed: bool, prefix: str
    ):
        self.rows, self.columns = rows, columns
        self.settings = settings
        self.tp_size, self.tp_rank = tp_size, tp_rank
        self.packed = packed
        self.absmax_factor = ABSMAX_FACTOR
        self.prefix = prefix
        self.blocks_along, self.blocksize = blocks_of_rank(settings, self.name, rows, columns, prefix)

    @abstractmethod
    def shard(self, tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """This rank's part, which has `shape`, of codes or absmax [E, rows, ...] of all ranks of tensor parallelism."""

    @abstractmethod
    def shard_bias(self, bias: torch.Tensor) -> torch.Tensor:
        """This rank's part of the bias [E, rows] of all ranks of tensor parallelism."""

    def tiled(self, rows: torch.Tensor) -> torch.Tensor:
        """`rows` [E, rows, ...], with the rows in the order that the kernels read."""
        return rows

    def parts(self, num_experts: int, dtype: torch.dtype) -> list[Part]:
        """Codes uint8 [E, rows, columns / 2], absmax float32 and bias [E, rows]; `dtype` is that of the activations.

        absmax is [E, rows, columns / blocksize], or [E, rows / blocksize, columns] where blocks run along the outputs.
        """
        codes = (num_experts, self.rows, self.columns // 2)
        absmax = absmax_shape((num_experts, self.rows, self.columns), self.blocksize, self.blocks_along)
        across = self.blocks_along == OUTPUTS
        tile = tile_inputs_across(self.columns) if across else tile_inputs(self.blocksize)
        blocks_dim = -2 if across else -1

        def absmax_of_rank(tensor: torch.Tensor) -> torch.Tensor:
            return self.shard(repeat_absmax(tensor, self.settings.blocksize, self.blocksize, blocks_dim), absmax)

        def check_absmax(rows: torch.Tensor) -> None:
            if self.packed:
                require_packable(rows, f"{self.prefix}.{self.name}_absmax")

        def in_memory(pack: Change) -> Change:
            return pack if self.packed else (lambda rows: rows)

        def pack_blocks(rows: torch.Tensor) -> torch.Tensor:
            return pack_absmax_of_inputs(rows, dtype) if across else pack_absmax(self.tiled(rows))

        return [
            Part(
                f"{self.name}_codes",
                codes,
                torch.uint8,
                lambda tensor: self.shard(tensor, codes),
                in_memory(lambda rows: pack_codes(self.tiled(rows), tile)),
            ),
            Part(f"{self.name}_absmax", absmax, torch.float32, absmax_of_rank, in_memory(pack_blocks), check_absmax),
            Part(
                f"{self.name}_expert_bias",
                (num_experts, self.rows),
                dtype,
                self.shard_bias,
                in_memory(lambda rows: pad_rows(self.tiled(rows), -1)),
            ),
        ]


class W13(ExpertWeight):
    """Gate and up, rows interleaved. A rank of tensor parallelism has some of the rows."""

    name = "w13"

    def shard(self, tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        return self._rows_of_rank(tensor, shape[1])

    def shard_bias(self, bias: torch.Tensor) -> torch.Tensor:
        return self._rows_of_rank(bias, self.rows)

    def _rows_of_rank(self, tensor: torch.Tensor, rows: int) -> torch.Tensor:
        """Its `rows` rows; or groups of rows, which are interleaved."""
        if self.settings.w13_order != INTERLEAVED:
            tensor = tensor[:, torch.from_numpy(interleaved_rows(self.settings.w13_order, tensor.shape[1]))]
        return tensor if self.tp_size == 1 else tensor.narrow(1, self.tp_rank * rows, rows)

    def tiled(self, rows: torch.Tensor) -> torch.Tensor:
        return gate_and_up_tiles(rows, 1)


class W2(ExpertWeight):
    """Down. A rank of tensor parallelism has some of the columns, which are inputs; only the first rank adds the bias."""

    name = "w2"

    def shard(self, tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        return tensor if self.tp_size == 1 else tensor.narrow(2, self.tp_rank * shape[2], shape[2])

    def shard_bias(self, bias: torch.Tensor) -> torch.Tensor:
        return bias if self.tp_rank == 0 else torch.zeros_like(bias)
