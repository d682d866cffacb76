"""The sort kernel on batches that hypothesis draws, in Triton's interpreter (or on a GPU), against lists in Python.

    HYPOTHESIS_PROFILE=thorough python tests/sort_cases.py

Slots without an expert, experts without a slot, experts of other ranks. The interpreter has to be chosen before the kernels
are imported, hence a script.
"""

import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DEVICE, poison
from profiles import settings

from gptoss_nf4.vllm.kernels import sort


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[list[int]], int, int, list[int] | None]:
    """(ids of each token, slots in a block, experts, their local numbers or None)."""
    experts, tokens, top_k = draw(st.integers(1, 40)), draw(st.integers(1, 12)), draw(st.integers(1, 4))
    chosen = draw(st.sampled_from([st.integers(-1, experts - 1), st.sampled_from([-1, 0, experts - 1]), st.just(-1)]))
    ids = draw(st.lists(st.lists(chosen, min_size=top_k, max_size=top_k), min_size=tokens, max_size=tokens))
    local = draw(st.none() | st.permutations([*range(experts // 2), *[-1] * (experts - experts // 2)]))
    return ids, draw(st.sampled_from([8, 16, 32])), experts, local


@settings(max_examples=settings().max_examples // 2)
@given(batches())
def check(batch: tuple[list[list[int]], int, int, list[int] | None]) -> None:
    ids, block, experts, local = batch
    flat = [expert for token in ids for expert in token]
    slots: list[int] = []
    owners: list[int] = []
    for expert in range(experts):
        mine = [slot for slot, chosen in enumerate(flat) if chosen == expert]
        mine += [len(flat)] * (-len(mine) % block)
        slots += mine
        owners += [local[expert] if local else expert] * (len(mine) // block)
    tensor = torch.tensor(ids, dtype=torch.int32, device=DEVICE)
    numbers = torch.tensor(local, dtype=torch.int32, device=DEVICE) if local else None
    assert sort.fits(len(flat), experts)
    found = poison(lambda: sort.sort_slots(tensor, block, experts, numbers))
    used = int(found[2])
    assert (found[0][:used].tolist(), found[1][: used // block].tolist()) == (slots, owners)
    expected = [local[expert] if local and expert >= 0 else expert for expert in flat]
    assert poison(lambda: sort.local_experts(tensor, numbers)).tolist() == expected


if __name__ == "__main__":
    check()
