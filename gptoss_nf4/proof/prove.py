"""The proof: every tensor of a converted checkpoint against the source's, and config.json against config.json."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from gptoss_nf4.errors import UserError
from gptoss_nf4.proof.compare import Difference
from gptoss_nf4.proof.config import Asked, load, require_function, require_quantization
from gptoss_nf4.proof.names import Pair, pair_up
from gptoss_nf4.proof.pair import NEXT_STEP, Fault, compare_pair, keeps_outputs_together, pair_bytes
from gptoss_nf4.proof.stored import Tensors
from gptoss_nf4.storage.machine import cores
from gptoss_nf4.storage.progress import Progress
from gptoss_nf4.storage.reading import read_bytes

# Copied byte for byte. The other files beside the weights are written anew, and are not compared here.
VERBATIM = ("tokenizer.json",)


@dataclass
class Kind:
    """What was compared of one kind of tensor. `tensors` are the source's, without what lies beside 4-bit ones."""

    tensors: int = 0
    difference: Difference = field(default_factory=Difference)


@dataclass
class Exactness:
    """What the proof found. `source_tensors` and `result_tensors` are all that there are; each of them was visited.

    What a merged adapter changed is not compared here, and not counted in a `Difference`.
    """

    source_tensors: int
    result_tensors: int
    kinds: dict[str, Kind] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def add(self, pair: Pair, found: Difference, faults: list[Fault]) -> None:
        kind = self.kinds.setdefault(pair.entry.kind, Kind())
        kind.tensors += len(pair.sources)
        kind.difference += found
        self.faults += faults

    @property
    def total(self) -> Difference:
        return sum((kind.difference for kind in self.kinds.values()), Difference())

    def as_dict(self) -> dict:
        """The totals, then the counts by kind of tensor: see metrics/exactness.json.

        The kinds are a list: `dvc metrics show` prints the totals only, not 70 columns.
        """
        counts = {"source_tensors": self.source_tensors, "result_tensors": self.result_tensors}
        by_kind = [{"kind": name, "tensors": kind.tensors} | asdict(kind.difference) for name, kind in self.kinds.items()]
        return asdict(self.total) | counts | {"by_kind": by_kind}


def prove(source: Path, result: Path, asked: Asked) -> Exactness:
    """Compare every tensor in the directory `source` with those in `result`, which was made of it as `asked`.

    4-bit weights are compared in float32, as bitsandbytes dequantizes them. Of each matrix these are the first rows: where
    codes and absmax of others are the same on both sides, so are the values. What is dense in the result is compared after
    rounding the source's to its dtype. In mode nf4 weights were quantized again: their differences are counted, and only a
    row that has nothing in common with the source's is a fault.
    Where an adapter is merged, the weights `asked.changed` are left out, and 4-bit ones of the same format must be equal.

    UserError for config.json, for a tensor that is missing on either side, and for one that nothing compares. A tensor with
    other values is a fault in what is returned: see `require_proved`.
    """
    before, after = Tensors(source), Tensors(result)
    where = result / "config.json"
    require_function(before.checkpoint.config, after.checkpoint.config, asked, where)
    model = load(after.checkpoint.config, where)
    pairs = pair_up(before.stored, after.stored, model.num_hidden_layers, model.num_local_experts)
    dense = [p.target.removesuffix(".weight") for p in pairs if p.entry.four_bit is None and not after.four_bit(p.target)]
    turned = [p.target.removesuffix(".weight") for p in pairs if keeps_outputs_together(p, before, asked)]
    require_quantization(after.checkpoint.config.get("quantization_config"), asked, dense, turned, where)
    _require_whole(source, after)
    exactness = Exactness(len(before.stored), len(after.stored))
    size = sum(pair_bytes(pair, before, after) for pair in pairs)
    with Progress(size, "comparing with the source") as progress, _one_thread_each() as pool:

        def work(pair: Pair) -> tuple[Difference, list[Fault]]:
            return compare_pair(pair, before, after, asked, progress.advance)

        for pair, found in zip(pairs, pool.map(work, pairs), strict=True):
            exactness.add(pair, *found)
    return exactness


def require_proved(exactness: Exactness, result: Path) -> None:
    """UserError that names the first tensor that is not the source's."""
    if exactness.faults:
        fault = exactness.faults[0]
        others = f" ({len(exactness.faults)} faults in all)" if len(exactness.faults) > 1 else ""
        raise UserError(
            "the result is not the source's",
            where=f"{result}: {fault.target}",
            got=fault.got + others,
            expected="none",
            next_step=NEXT_STEP,
        )


@contextmanager
def _one_thread_each() -> Iterator[ThreadPoolExecutor]:
    """A thread for each core, in which torch and bitsandbytes use no others. Both let go of the interpreter lock."""
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(cores(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def _require_whole(source: Path, result: Tensors) -> None:
    """No weights lie beside those that the index names, and what is copied is a copy. UserError otherwise."""
    directory = result.checkpoint.directory
    for file in sorted(set(directory.glob("*.safetensors")) - set(result.checkpoint.weight_files)):
        raise UserError(
            "file that the index does not name",
            where=file,
            got="weights that nothing compares",
            expected="only files of this checkpoint",
            next_step="remove it, and run `dvc repro prove`",
        )
    for name in VERBATIM:
        if (source / name).exists() and read_bytes(source / name) != read_bytes(directory / name):
            raise UserError(
                "file is not the source's",
                where=directory / name,
                got="other bytes",
                expected=f"those of {source / name}",
                next_step="run `dvc repro -s -f assemble`, then `dvc repro prove`",
            )
