"""A server from outside: its metrics, and the memory of its processes."""

import re
import threading
import time
import urllib.request
from collections import defaultdict

import psutil

RUNNING, WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"
CACHE = "vllm:kv_cache_usage_perc"
PREEMPTIONS = "vllm:num_preemptions_total"
PREFIX_HITS = "vllm:prefix_cache_hits_total"
RUN_TO_END = "vllm:request_success_total"  # requests that were given up do not count, whatever the metric's labels say
SAMPLE_SECONDS = 0.5
LINE = re.compile(r"(?P<name>[\w:]+)(?:\{.*\})? (?P<value>\S+)")


def metrics(url: str) -> dict[str, float]:
    """The server's metrics by name, summed over labels."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found: dict[str, float] = defaultdict(float)
    for line in text.splitlines():
        if match := LINE.fullmatch(line):
            found[match["name"]] += float(match["value"])
    return found


def resident_bytes(pid: int) -> int:
    """Of process `pid` and all that it started."""
    process = psutil.Process(pid)
    return sum(each.memory_info().rss for each in (process, *process.children(recursive=True)))


def drained(url: str, seconds: float = 30) -> dict[str, float]:
    """The metrics once nothing runs or waits, or as they are after `seconds`."""
    until = time.monotonic() + seconds
    while True:
        found = metrics(url)
        if found[RUNNING] + found[WAITING] == 0 or time.monotonic() > until:
            return found
        time.sleep(0.2)


class Peaks(threading.Thread):
    """While it is entered: the most requests that ran, and that waited, at a look every half second."""

    def __init__(self, url: str):
        super().__init__(daemon=True)
        self.url = url
        self.running = self.waiting = 0
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            found = metrics(self.url)
            self.running = max(self.running, int(found[RUNNING]))
            self.waiting = max(self.waiting, int(found[WAITING]))

    def __enter__(self) -> "Peaks":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self.join()
