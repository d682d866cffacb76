"""Kernels that start before the one in front of them has ended wait before they touch what that one touches."""

import re

import pytest
import torch
from early_starts import faults, touches

from benchmarks import machine_code
from benchmarks.weights import GPT_OSS_20B
from gptoss_nf4.format.blocks import DIRECTIONS
from gptoss_nf4.vllm.kernels.variants import Launch

GPU = machine_code.GPUS[90]
WEIGHTS = r"%(weight|bias)([._]\w+)?"  # no kernel writes them
# w2 starts when w13 has waited for what chose the experts, so that is there too.
MAY_READ = {"small.down_experts": r"%(weight|routing)([._]\w+)?"}
BESIDE_SHRINK = r"%(?!lora_0$|lora\.t$).*"  # all but t; `shrink` has waited before it lets the product start


def early(lora_rank: int | None, blocks_along: str) -> list[machine_code.Launch]:
    found = machine_code.launches(GPT_OSS_20B, torch.float16, GPU, lora_rank=lora_rank, blocks_along=blocks_along)
    return [launch for launch in found if launch.arguments.get("launch_pdl")]


def may_read(launch: Launch) -> str:
    return BESIDE_SHRINK if launch.arguments.get("lora") is not None else MAY_READ.get(launch.kernel, WEIGHTS)


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [None, 16])
@pytest.mark.parametrize("blocks_along", DIRECTIONS)
def test_kernels_that_start_early_wait(lora_rank, blocks_along):
    launches = early(lora_rank, blocks_along)
    for launch in launches:
        ttir = launch.compiled(90).asm["ttir"]
        assert faults(ttir, may_read(launch)) == [], launch.label
        let_go = [what for _, _, what in touches(ttir) if what == "next"]
        assert bool(let_go) == bool(launch.arguments.get("EARLY")) or launch.kernel == "expand.add_to_row", launch.label
    kernels = {launch.kernel for launch in launches}
    assert kernels >= {"router._router", "small.linear", "small.swiglu_experts", "small.down_experts", "combine._sum_slots"}
    assert kernels >= (
        {"shrink.shrink_slots", "expand.add_to_row"}
        if lora_rank
        else {"large.swiglu_experts", "large.linear", "order._order"}
    )


def without(mark: str, ttir: str) -> str:
    return "".join(line for line in ttir.splitlines(keepends=True) if mark not in line)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kernel", ["large.down_experts", "large.linear", "small.down_experts", "order._order", "router._router"]
)
def test_a_kernel_that_does_not_wait_is_seen(kernel):
    """Its wait is taken away, or comes after its first load of what another kernel wrote."""
    launch = next(each for each in early(None, DIRECTIONS[0]) if each.kernel == kernel)
    ttir = launch.compiled(90).asm["ttir"]
    wait = next(line for line in ttir.splitlines() if re.search(r"griddepcontrol\.wait|grid_dependency_wait", line))
    removed = faults(without(wait, ttir), may_read(launch))
    assert any("returns" in fault for fault in removed)
    assert any("before it waits" in fault for fault in removed)
    lines = ttir.splitlines()
    store = max(number for number, line in enumerate(lines) if re.match(r"    tt\.store", line))
    last = [line for line in lines[:store] if line != wait] + [wait] + lines[store:]
    assert any("before it waits" in fault for fault in faults("\n".join(last), may_read(launch)))
