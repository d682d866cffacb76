"""Bringing weights to the GPU by several threads, while vLLM reads on.

A tensor of a checkpoint is a view of a mapped file. Copying it to the GPU at once goes at the pace of one thread: it waits
for the pages, copies them into memory that the GPU can reach, and waits for that copy too. Here a tensor is cut into groups
of its first axis, and each group is a job for one of some threads:

    mapped file --(copied by the thread)--> its pinned buffer --(by the GPU, on the thread's stream)--> GPU --> `use`

`use` starts kernels on the same stream, which bring the rows into the order that stays in memory. Nobody waits for them
until the end. So reading, copying and packing run side by side.

This module knows tensors alone, and neither vLLM nor files.
"""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import numpy as np
import torch

GROUP_BYTES = 16 << 20  # of a job, or one item of the first axis where that is larger; so large is a pinned buffer
MAX_THREADS = 8  # each copies 3 to 4 GB/s out of the page cache
MAX_WAITING_BYTES = 1 << 28  # of host tensors in jobs that are not done: those of some load formats are no mapped files

Change = Callable[[torch.Tensor], torch.Tensor]
Use = Callable[[int, torch.Tensor], None]


class Transfer:
    """Closed, it does everything at once, in the thread that asks: so on the CPU, where there is nothing to bring."""

    def __init__(self) -> None:
        self._workers: _Workers | None = None

    @contextmanager
    def opened(self, device: torch.device, threads: int | None = None) -> Iterator[None]:
        """While it is open, threads bring tensors to `device`. At the end all are there, or the first error is raised.

        threads: 0 for none; None for as many as there are cores, up to MAX_THREADS, and none for the CPU.
        """
        if threads is None:
            threads = min(MAX_THREADS, len(os.sched_getaffinity(0))) if device.type == "cuda" else 0
        if threads == 0:
            yield
            return
        self._workers = _Workers(device, threads)
        try:
            yield
            self._workers.finish()
        finally:
            self._workers.stop()
            self._workers = None

    def each(self, tensor: torch.Tensor, prepare: Change, use: Use) -> None:
        """Call use(first, prepare(group)) for each group of the first axis, where `first` is the place of its first item.

        Open, and with `tensor` in host memory: a thread does it, later, and `use` gets the rows on the device. The tensor
        must stay unchanged until `settle` or the end. `prepare` should give a view. Closed: done at once, on the tensor's
        own device.
        """
        workers = self._workers_for(tensor)

        def bring(first: int, rows: torch.Tensor, lane: _Lane) -> None:
            use(first, lane.copied(prepare(rows)))

        for first, rows in groups(tensor):
            if workers is None:
                use(first, prepare(rows))
            else:
                workers.submit(rows.nbytes, partial(bring, first, rows))

    def on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of host tensor `tensor` on the device, and all earlier jobs are started. Closed: the tensor itself."""
        workers = self._workers_for(tensor)
        if workers is None:
            return tensor
        result = torch.empty(tensor.shape, dtype=tensor.dtype, device=workers.device)

        def bring(first: int, rows: torch.Tensor, lane: _Lane) -> None:
            lane.copy(rows, result[first : first + len(rows)])

        workers.follow_caller()  # its memory may be in use until now
        for first, rows in groups(tensor):
            workers.submit(rows.nbytes, partial(bring, first, rows))
        workers.settle()
        workers.let_caller_follow()
        return result

    def settle(self) -> None:
        """Wait until no job reads the host tensors that it was given. Raises the first error of a job."""
        if self._workers is not None:
            self._workers.settle()

    def _workers_for(self, tensor: torch.Tensor) -> "_Workers | None":
        """None where there is nothing to bring: some load formats give tensors that are on the GPU already."""
        return self._workers if tensor.device.type == "cpu" else None


def groups(tensor: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Views of `tensor`, of at most GROUP_BYTES or one item of the first axis, each with the place of its first item."""
    if tensor.numel() == 0:
        return
    items = max(1, GROUP_BYTES // (tensor.nbytes // len(tensor)))
    for first in range(0, len(tensor), items):
        yield first, tensor[first : first + items]


class _Lane:
    """What one thread has: a pinned buffer, and a stream on which its copies and kernels run one after the other."""

    def __init__(self, device: torch.device):
        self.device = device
        self.buffer = torch.empty(0, dtype=torch.uint8)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.copy_done = torch.cuda.Event() if device.type == "cuda" else None

    def running(self) -> AbstractContextManager:
        """Within it, kernels start on this lane's stream."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def copied(self, rows: torch.Tensor) -> torch.Tensor:
        """A copy of `rows` on the device."""
        return self.copy(rows, torch.empty(rows.shape, dtype=rows.dtype, device=self.device))

    def copy(self, rows: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
        """Copy host tensor `rows` to `into`, contiguous and on the device. Returns it."""
        if self.copy_done is not None:
            self.copy_done.synchronize()  # the GPU has read what is in the buffer
        if len(self.buffer) < rows.nbytes:
            self.buffer = pinned(rows.nbytes) if self.stream is not None else torch.empty(rows.nbytes, dtype=torch.uint8)
        staged = self.buffer[: rows.nbytes].view(rows.dtype).view(rows.shape)
        np.copyto(as_bytes(staged), as_bytes(rows))  # one thread, and others may run meanwhile; torch would start threads
        into.copy_(staged, non_blocking=True)
        if self.copy_done is not None:
            self.copy_done.record()
        return into


def pinned(count: int) -> torch.Tensor:
    """uint8 [count], pinned where the system allows it. Otherwise copies are slower, and right all the same."""
    try:
        return torch.empty(count, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:
        return torch.empty(count, dtype=torch.uint8)


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    """`tensor` as bytes: a view, if its last axis is contiguous. NumPy has no bfloat16."""
    return (tensor if tensor.stride(-1) == 1 else tensor.contiguous()).view(torch.uint8).numpy()


class _Workers:
    """Threads with a lane each, and the jobs that wait for them."""

    def __init__(self, device: torch.device, threads: int):
        self.device = device
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="nf4-transfer")
        self._own = threading.local()
        self._lanes = [_Lane(device) for _ in range(threads)]
        self._free_lanes = list(self._lanes)
        self._changed = threading.Condition()
        self._jobs = 0
        self._waiting_bytes = 0
        self._failure: BaseException | None = None
        self.follow_caller()  # the parameters' memory may still be in use by what was there before

    def submit(self, nbytes: int, job: Callable[[_Lane], None]) -> None:
        """Let a thread run `job`, which reads `nbytes` of host memory. Waits while too many bytes wait."""

        def has_room() -> bool:
            return self._jobs == 0 or self._waiting_bytes + nbytes <= MAX_WAITING_BYTES

        with self._changed:
            self._changed.wait_for(lambda: has_room() or self._failure is not None)
            self._raise_failure()
            self._jobs += 1
            self._waiting_bytes += nbytes
        self._pool.submit(self._run, nbytes, job)

    def _run(self, nbytes: int, job: Callable[[_Lane], None]) -> None:
        failure = None
        try:
            if self._failure is None:  # else the load has failed already
                if not hasattr(self._own, "lane"):
                    self._own.lane = self._free_lanes.pop()
                with self._own.lane.running():
                    job(self._own.lane)
        except BaseException as error:  # the thread that loads raises it
            failure = error
        with self._changed:
            self._failure = self._failure or failure
            self._jobs -= 1
            self._waiting_bytes -= nbytes
            self._changed.notify_all()

    def settle(self) -> None:
        """Wait until every job has run: what it started on the GPU may still run there."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs == 0 or self._failure is not None)
            self._raise_failure()

    def finish(self) -> None:
        """Wait for every job, and for what it started on the GPU."""
        self.settle()
        for stream in self._streams():
            stream.synchronize()

    def stop(self) -> None:
        """Drop jobs that have not begun, and end the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def follow_caller(self) -> None:
        """What jobs start from now on waits for what the caller's stream has to do now."""
        for stream in self._streams():
            stream.wait_stream(torch.cuda.current_stream(self.device))

    def let_caller_follow(self) -> None:
        """What the caller's stream gets from now on waits for what the jobs have started."""
        for stream in self._streams():
            torch.cuda.current_stream(self.device).wait_stream(stream)

    def _streams(self) -> list[torch.cuda.Stream]:
        return [lane.stream for lane in self._lanes if lane.stream is not None]

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
