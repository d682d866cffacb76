"""How long calls take on the device: as CUDA graphs, which are replayed in turn."""

from collections.abc import Callable

import torch

from benchmarks.values import Values


def graph_us(variants: list[list[Callable]], replays: int = 20) -> list[Values]:
    """Microseconds of a call of each variant: calls that are captured in one graph. The graphs are replayed in turn."""
    graphs = [captured(calls) for calls in variants]
    times: list[list[float]] = [[] for _ in variants]
    for replay in range(replays + 1):
        for graph, calls, found in zip(graphs, variants, times, strict=True):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            if replay:  # the first is not counted
                found.append(start.elapsed_time(end) * 1e3 / len(calls))
    return [Values(tuple(found)) for found in times]


def captured(calls: list[Callable]) -> torch.cuda.CUDAGraph:
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph
