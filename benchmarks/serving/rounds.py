"""All engines of a group take turns: in each round they measure the first cell one after the other, then the next cell.

So whatever changes on the machine meanwhile changes for all of them alike. Only one of them measures at a time.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.serving.cells import Cell, adapter_cells
from benchmarks.serving.engine import Engine
from benchmarks.serving.jobs import CONTENDERS, Job

WARM_UP_STEPS = 8  # of decoding, in the round that is not counted
Results = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    cells: tuple[Cell, ...]
    rounds: int
    """At most."""
    steps: int
    """Decode steps of a value, where a step does not take many times as long as others'."""
    budget: float | None
    """Seconds after which no new round starts. None: no limit."""
    start: float
    """Seconds for an engine to get ready."""

    def steps_of(self, job: Job) -> int:
        """Decode steps of a value."""
        return max(1, round(self.steps * CONTENDERS[job.contender].steps))

    @property
    def batches(self) -> list[int]:
        return sorted({cell.batch for cell in self.cells})


def measure_all(
    groups: list[list[Job]],
    plan: Plan,
    save: Callable[[Results], None],
    clock: Callable[[], float] = time.monotonic,
) -> Results:
    """Results by name of job, given to `save` too whenever there are more of them. Each group gets its share of the budget.

    A result holds what the engine told when it was ready, `cells` (by name: `ms`, all values in order, `device_ms` and
    `kernels_us`), what `state` and `routing` told, and `failed`, a line, if it failed at some point.
    """
    results: Results = {}
    begun = clock()
    for number, group in enumerate(groups, 1):
        deadline = None if plan.budget is None else begun + plan.budget * number / len(groups)
        engines = [Engine(job) for job in group]
        try:
            until = time.monotonic() + plan.start
            for engine in engines:  # all of them first: nobody starts while one measures
                engine.wait_until_ready(until)
                results[engine.job.name] = {"together": len(group), **engine.facts, "cells": {}}
            _measure(engines, plan, deadline, results, save, clock)
        finally:
            for engine in engines:  # all of them first: ending takes seconds
                engine.dismiss()
            for engine in engines:
                engine.end()
    return results


def _measure(
    engines: list[Engine],
    plan: Plan,
    deadline: float | None,
    results: Results,
    save: Callable[[Results], None],
    clock: Callable[[], float],
) -> None:
    """Fill `results` for engines that are up."""
    turns = turns_of([engine.job for engine in engines], plan, results)
    by_name = {engine.job.name: engine for engine in engines}

    def note_failures_and_save() -> None:
        for name, engine in by_name.items():
            if engine.failure is not None and "failed" not in results[name]:
                results[name]["failed"] = engine.failure
                print(f"{name}: failed: {engine.failure}; its log is {engine.job.log}", flush=True)
        save(results)

    note_failures_and_save()
    for cell, names in turns:  # not counted: kernels are compiled, caches are filled
        for name in names:
            by_name[name].wall_ms(cell, WARM_UP_STEPS)
    note_failures_and_save()
    longest = 0.0
    for number in range(1, plan.rounds + 1):
        begun = clock()
        if number > 1 and deadline is not None and begun + longest > deadline:
            print(f"round {number} is left out: it would not end in time", flush=True)
            break
        for cell, names in turns:
            for name in names:
                ms = by_name[name].wall_ms(cell, plan.steps_of(by_name[name].job))
                if ms is not None:
                    results[name]["cells"].setdefault(cell.name, {"ms": []})["ms"].append(ms)
        took = clock() - begun
        longest = max(longest, took)
        print(f"round {number} of {plan.rounds}: {took:.0f} s", flush=True)
        note_failures_and_save()
    for name, engine in by_name.items():
        results[name] |= engine.state() or {}
    note_failures_and_save()
    # After all values by the wall: a profiler slows down the process that it has been in.
    for cell, names in turns:
        for name in names:
            results[name]["cells"].get(cell.name, {}).update(by_name[name].device(cell) or {})
        note_failures_and_save()
    for name, engine in by_name.items():
        results[name] |= engine.routing(plan.batches) or {}
    note_failures_and_save()


def turns_of(jobs: list[Job], plan: Plan, results: Results) -> list[tuple[Cell, list[str]]]:
    """Each cell, and the names of the jobs that measure it, in order: those whose KV cache can hold it."""
    lora = {job.name for job in jobs if job.lora_rank}
    of_all = [(cell, [job.name for job in jobs]) for cell in plan.cells]
    on_adapters = adapter_cells([cell for cell in plan.cells if cell.kind == "decode"]) if lora else []
    turns = [*of_all, *((cell, [job.name for job in jobs if job.name in lora]) for cell in on_adapters)]
    found = []
    for cell, names in turns:
        needs = cell.batch * cell.length(plan.steps)
        small = {name for name in names if (results[name].get("kv_cache_tokens") or needs) < needs}
        for name in sorted(small):
            has = results[name]["kv_cache_tokens"]
            print(f"{name}: {cell.name} is left out: it needs {needs} tokens of KV cache, there are {has}", flush=True)
        found.append((cell, [name for name in names if name not in small]))
    return found
