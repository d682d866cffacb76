"""The bandwidth of this GPU's memory: what a kernel that is limited by it is measured against."""

from collections.abc import Callable

import torch

BYTES = 4 << 30  # many times what any L2 cache holds
REPEATS = 10


def read_bandwidth() -> float:
    """TB/s of reading: a sum over BYTES, the fastest of REPEATS."""
    values = _random_bytes(BYTES).view(torch.float32)
    return BYTES / _seconds(lambda: values.sum()) / 1e12


def copy_bandwidth() -> float:
    """TB/s of a device-to-device copy of BYTES / 2, bytes read and written, the fastest of REPEATS."""
    source = _random_bytes(BYTES // 2)
    target = torch.empty_like(source)
    return BYTES / _seconds(lambda: target.copy_(source)) / 1e12


def _random_bytes(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8, device="cuda")


def _seconds(call: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return min(times[1:])
