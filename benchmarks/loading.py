"""How fast a converted checkpoint is loaded, against reading its files, and where the time goes. On a GPU.

    python -m benchmarks.loading --directory /data/weights              # about 90 s, once the weights are made
    python -m benchmarks.loading --directory /data/weights --engine 2   # and two whole starts of vLLM

In one process vLLM's model is built and its loader run again and again, on files that the page cache holds. All variants
take turns; a cell has the median and, in brackets, the smallest and the largest. Rates are bytes of the files a second.

It also measures another version of the package: `PYTHONPATH=<its directory>:. python -P -m benchmarks.loading`.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import weights
from benchmarks.tables import markdown

READ_BYTES = 16 << 20  # of one read
STARTED = r"Loading weights took ([\d.]+) seconds"
ENGINE = """
import sys
from vllm import LLM
LLM(sys.argv[1], dtype=sys.argv[2], skip_tokenizer_init=True, max_model_len=4096, enforce_eager=True,
    attention_config={"backend": "TRITON_ATTN"})
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="where the weights are, or are made (13.4 GB)")
    parser.add_argument("--checkpoint", type=Path, help="a converted checkpoint of yours, in place of those")
    parser.add_argument(
        "--dtype",
        choices=sorted({*weights.NF4_DTYPES.values()}),
        default="bfloat16",
        help="float16 has a residual_scale of 1/64",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[0, 1, 2, 4, 8, 16], help="0: the thread that reads")
    parser.add_argument("--engine", type=int, default=0, help="also start vLLM as a whole, so many times")
    arguments = parser.parse_args()
    os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = f"nf4-{arguments.dtype}"
    checkpoint = arguments.checkpoint or weights.ensure(arguments.directory, kind, weights.GPT_OSS_20B, device)
    print(report(checkpoint, arguments.dtype, arguments.rounds, arguments.threads), flush=True)
    starts = [start_engine(checkpoint, arguments.dtype) for _ in range(arguments.engine)]
    if starts:
        size = total_bytes(checkpoint)
        print(f"whole starts, by vLLM's log: {spread([size / seconds / 1e9 for seconds in starts])} GB/s")


def report(checkpoint: Path, dtype: str, rounds: int, threads: list[int]) -> str:
    size = total_bytes(checkpoint)
    with built(checkpoint, dtype) as load:
        steps: dict[str, Callable[[], Any]] = {
            "reading, 1 thread": partial(read, checkpoint, 1),
            **{f"reading, {count} threads": partial(read, checkpoint, count) for count in threads if count > 1},
            "mapped, to the GPU by torch": partial(copy_by_torch, checkpoint),
        }
        for count in threads if TRANSFER else []:
            steps[f"mapped, to the GPU, {count} threads"] = partial(bring, checkpoint, count)
        steps["**loading**"] = load
        for count in threads if TRANSFER else []:
            steps[f"loading, {count} threads"] = partial(load, count)
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        steps["**loading**"]()  # compiles, allocates, and reads what the cache does not have yet
        peak = load.peak_bytes
        for _ in range(rounds):
            for name, step in steps.items():
                started = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - started)
        after = load.finish()
    reading = statistics.median(seconds["reading, 1 thread"])
    rows = [
        [name, spread([size / each / 1e9 for each in found]), f"{reading / statistics.median(found):.0%}"]
        for name, found in seconds.items()
    ]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    notes = [
        f"{gpu}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}, {dtype}, {size / 1e9:.1f} GB",
        f"GPU memory beyond the parameters while loading: {peak / 2**20:.0f} MiB",
        f"vLLM's processing after loading: {after:.2f} s",
        *packing_times(),
    ]
    return "\n".join([markdown(["step", "GB/s", "of reading by 1 thread"], rows), *notes])


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def total_bytes(checkpoint: Path) -> int:
    return sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))


def read(checkpoint: Path, threads: int) -> None:
    """Read the files, each thread into a buffer of its own."""
    own = threading.local()

    def read_piece(piece: tuple[Path, int]) -> None:
        if not hasattr(own, "buffer"):
            own.buffer = bytearray(READ_BYTES)
        file, offset = piece
        with file.open("rb", buffering=0) as stream:
            stream.seek(offset)
            stream.readinto(own.buffer)

    pieces = [
        (file, offset)
        for file in sorted(checkpoint.glob("*.safetensors"))
        for offset in range(0, file.stat().st_size, READ_BYTES)
    ]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read_piece, pieces))


def tensors(checkpoint: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """As vLLM's loader gives them."""
    from vllm.model_executor.model_loader.weight_utils import safetensors_weights_iterator

    return safetensors_weights_iterator([str(file) for file in checkpoint.glob("*.safetensors")], False)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def copy_by_torch(checkpoint: Path) -> None:
    """Each tensor to the GPU by one call, from memory that is not pinned."""
    for _, tensor in tensors(checkpoint):
        tensor.to(DEVICE, copy=True)
    synchronize()


def bring(checkpoint: Path, threads: int) -> None:
    """All tensors to the GPU by `Transfer`, and no more."""
    transfer = TRANSFER()
    with transfer.opened(DEVICE, threads):
        for _, tensor in tensors(checkpoint):
            if tensor.ndim:
                transfer.each(tensor, lambda rows: rows, lambda first, rows: rows.to(DEVICE))
    synchronize()


class Load:
    """vLLM's loader on its model, before the model's weights are processed: it can be called again and again."""

    def __init__(self, loader: Any, model: torch.nn.Module, model_config: Any):
        self.loader, self.model, self.model_config = loader, model, model_config
        self.peak_bytes = 0

    def __call__(self, threads: int | None = None) -> None:
        """threads: of `Transfer`; None for what it chooses."""
        gpu = torch.cuda.is_available()
        before = torch.cuda.memory_allocated() if gpu else 0
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        with with_threads(threads):
            self.loader.load_weights(self.model, self.model_config)
        synchronize()
        self.peak_bytes = torch.cuda.max_memory_allocated() - before if gpu else 0

    def finish(self) -> float:
        """Seconds of processing the weights afterwards, once."""
        from vllm.model_executor.model_loader.utils import process_weights_after_loading

        started = time.perf_counter()
        process_weights_after_loading(self.model, self.model_config, DEVICE)
        synchronize()
        return time.perf_counter() - started


@contextmanager
def with_threads(threads: int | None) -> Iterator[None]:
    if threads is None:
        yield
        return
    opened = TRANSFER.opened
    with mock.patch.object(TRANSFER, "opened", lambda self, device, _=None: opened(self, device, threads)):
        yield


@contextmanager
def built(checkpoint: Path, dtype: str) -> Iterator[Load]:
    """vLLM's model, with empty weights, in this process."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    attention = {"attention_config": {"backend": "TRITON_ATTN"}} if DEVICE.type == "cuda" else {}
    config = EngineArgs(
        str(checkpoint), dtype=dtype, skip_tokenizer_init=True, max_model_len=4096, enforce_eager=True, **attention
    ).create_engine_config()
    config.load_config.use_tqdm_on_load = False
    with set_current_vllm_config(config), tempfile.NamedTemporaryFile() as meeting:
        backend = "nccl" if DEVICE.type == "cuda" else "gloo"
        init_distributed_environment(1, 0, f"file://{meeting.name}", 0, backend)
        initialize_model_parallel()
        with set_default_torch_dtype(config.model_config.dtype):
            with DEVICE:
                model = initialize_model(config)
            yield Load(get_model_loader(config.load_config), model, config.model_config)


def packing_times() -> list[str]:
    """What the GPU takes to pack one layer's experts of gpt-oss-20b, a group at a time as loading does, in milliseconds."""
    if TRANSFER is None or DEVICE.type != "cuda":
        return []
    from gptoss_nf4.format.rows import INTERLEAVED
    from gptoss_nf4.vllm.expert_weights import W2, W13
    from gptoss_nf4.vllm.settings import Settings
    from gptoss_nf4.vllm.transfer import groups

    d = weights.GPT_OSS_20B
    settings = Settings(quant_type="nf4", blocksize=weights.BLOCKSIZE, w13_order=INTERLEAVED)
    lines = []
    for kind, rows, columns in ((W13, 2 * d.intermediate, d.hidden), (W2, d.hidden, d.intermediate)):
        weight = kind(rows, columns, settings=settings, tp_size=1, tp_rank=0, packed=True, prefix="")
        for part in weight.parts(d.experts, torch.bfloat16)[:2]:
            tensor = torch.ones(part.shape, dtype=part.dtype, device=DEVICE)
            times = []
            for _ in range(4):
                synchronize()
                started = time.perf_counter()
                for _, group in groups(tensor):
                    part.kept(group)
                synchronize()
                times.append(1e3 * (time.perf_counter() - started))
            rate = tensor.nbytes / min(times) / 1e6
            lines.append(f"packing {part.name} of a layer: {min(times):.2f} ms, {rate:.0f} GB/s")
    return lines


def start_engine(checkpoint: Path, dtype: str) -> float:
    """Seconds that a start of vLLM, in processes of its own, says that loading took."""
    done = subprocess.run(
        [sys.executable, "-c", ENGINE, checkpoint, dtype],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"VLLM_LOGGING_LEVEL": "INFO"},
    )
    found = re.search(STARTED, done.stdout)
    if found is None:
        raise RuntimeError(f"vLLM did not load the weights:\n{done.stdout[-3000:]}")
    return float(found[1])


def transfer_class() -> Any:
    """None in versions of the package that have no such class."""
    try:
        from gptoss_nf4.vllm.transfer import Transfer
    except ImportError:
        return None
    return Transfer


DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
TRANSFER = transfer_class()

if __name__ == "__main__":
    main()
