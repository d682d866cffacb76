"""Measuring `vllm serve` with vLLM's own client, `vllm bench serve`."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from gptoss_nf4.errors import UserError

START_SECONDS = 900  # a cold start compiles and captures CUDA graphs
SAMPLE_SECONDS = 0.2
VLLM = [sys.executable, "-m", "vllm.entrypoints.cli.main"]


class PeakMemory(threading.Thread):
    """The largest memory of a process and its children: resident bytes on the host, and used bytes on the GPU."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.process = psutil.Process(pid)
        self.host_bytes = 0
        self.gpu_bytes: int | None = None
        self._ended = threading.Event()
        self._gpu = _gpu_handle()

    def run(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            self.host_bytes = max(self.host_bytes, _resident_bytes(self.process))
            if self._gpu:
                self.gpu_bytes = max(self.gpu_bytes or 0, self._gpu())

    def stop(self) -> None:
        self._ended.set()
        self.join()


def _resident_bytes(process: psutil.Process) -> int:
    total = 0
    try:
        for each in [process, *process.children(recursive=True)]:
            total += each.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total


def _gpu_handle():
    """A function that reads the used bytes of GPU 0, or None where there is no NVIDIA GPU."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    except ImportError:
        return None
    except pynvml.NVMLError:
        return None
    return lambda: int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)


@contextmanager
def server(checkpoint: Path, engine_args: dict, log: Path) -> Iterator[tuple[str, int, float]]:
    """Run `vllm serve` on a free port of this machine; yields (base URL, pid, seconds until it answered)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url, started = f"http://127.0.0.1:{port}", time.monotonic()
    command = [*VLLM, "serve", str(checkpoint), "--host", "127.0.0.1", "--port", str(port), *as_flags(engine_args)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        _wait_until_ready(url, process, log, started)
        yield url, process.pid, time.monotonic() - started
    finally:
        _end(process)


def as_flags(engine_args: dict) -> list[str]:
    """{"max_model_len": 8, "enforce_eager": True} -> ["--max-model-len", "8", "--enforce-eager"]."""
    flags = []
    for key, value in engine_args.items():
        flag = "--" + key.replace("_", "-")
        if isinstance(value, bool):
            flags += [flag] if value else []
        else:
            flags += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags


def _wait_until_ready(url: str, process: subprocess.Popen, log: Path, started: float) -> None:
    while time.monotonic() - started < START_SECONDS:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    state = "no answer" if process.poll() is None else f"exit status {process.returncode}"
    raise UserError(
        "vllm serve did not start", where=log, got=f"{state} after {time.monotonic() - started:.0f} s",
        expected="a server that answers", next_step="read the log; the first ERROR line says why",
    )  # fmt: skip


def _end(process: subprocess.Popen) -> None:
    """End the server and whatever it started."""
    for number, patience in ((signal.SIGINT, 15), (signal.SIGKILL, 15)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def bench(url: str, checkpoint: Path, batch: int, requests: int, input_tokens: int, output_tokens: int, out: Path) -> dict:
    """One run of `vllm bench serve` with `batch` requests in flight; returns its own result file."""
    command = [
        *VLLM, "bench", "serve", "--backend", "openai", "--endpoint", "/v1/completions", "--base-url", url,
        "--model", str(checkpoint), "--dataset-name", "random", "--random-input-len", str(input_tokens),
        "--random-output-len", str(output_tokens), "--num-prompts", str(requests), "--max-concurrency", str(batch),
        "--num-warmups", str(batch), "--ignore-eos", "--seed", "0", "--disable-tqdm", "--save-result",
        "--result-dir", str(out.parent), "--result-filename", out.name,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    result = json.loads(out.read_text()) if done.returncode == 0 else {"completed": 0}
    if result["completed"] != requests:
        raise UserError(
            "vllm bench serve failed", where=f"batch {batch}", got=f"{result['completed']} of {requests} requests answered",
            expected="all", next_step=(done.stderr.strip().splitlines() or ["see the server's log"])[-1],
        )  # fmt: skip
    return result


def measure(
    checkpoint: Path,
    engine_args: dict,
    batch_sizes: list[int],
    rounds: int,
    input_tokens: int,
    output_tokens: int,
    work: Path,
) -> dict:
    """Start the server once and measure every batch size; times in seconds or milliseconds as named."""
    batches = []
    with server(checkpoint, engine_args, work / "serve.log") as (url, pid, load_seconds):
        memory = PeakMemory(pid)
        memory.start()
        for batch in batch_sizes:
            out = work / f"batch-{batch}.json"
            result = bench(url, checkpoint, batch, batch * rounds, input_tokens, output_tokens, out)
            batches.append(
                {
                    "batch": batch,
                    "output_tokens_per_second": result["output_throughput"],
                    "median_time_to_first_token_ms": result["median_ttft_ms"],
                    "median_time_per_output_token_ms": result["median_tpot_ms"],
                }
            )
        memory.stop()
    return {
        "load_seconds": load_seconds,
        "peak_host_bytes": memory.host_bytes,
        "peak_gpu_bytes": memory.gpu_bytes,
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "batches": batches,
    }
