"""The reference of smoke, built layer by layer, against transformers' whole model and PEFT on it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapter_makers import ATTENTION, EXPERTS, ROUTER, with_adapter
from conftest import edit_shard, make_dense
from project_imports import ROOT
from whole_model import log_probabilities, whole_model

from gptoss_nf4.adapters.adapter import Adapter
from gptoss_nf4.check import reference
from gptoss_nf4.check.agreement import Generation
from gptoss_nf4.errors import UserError
from gptoss_nf4.format.dimensions import Dimensions
from gptoss_nf4.samples import embedded, synthetic
from gptoss_nf4.source.layouts import open_checkpoint

# One token, the sliding window and one beyond it, more than the rows that are computed at once.
LENGTHS = (1, 7, embedded.SLIDING_WINDOW, embedded.SLIDING_WINDOW + 1, 150)


def sequences(lengths=LENGTHS, vocabulary=embedded.TINY.vocabulary) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in lengths]


def rows(*arguments) -> list[torch.Tensor]:
    return [torch.stack(list(each)) for each in reference.log_probabilities(*arguments)]


@pytest.mark.parametrize("kind", ["plain", "massive", "stacked"])
def test_layer_by_layer_is_bit_for_bit_the_whole_model(tmp_path, kind):
    """Sliding and full attention, prompts of all lengths carried through together."""
    d = embedded.MASSIVE_DIMENSIONS if kind == "massive" else embedded.TINY
    embedded.write_checkpoint(tmp_path, d, massive=kind == "massive", stacked=kind == "stacked")
    assert max(LENGTHS) > max(embedded.SLIDING_WINDOW, reference.POSITIONS)
    model, tokens = whole_model(tmp_path), sequences()
    for got, ids in zip(rows(open_checkpoint(tmp_path), tokens), tokens, strict=True):
        assert torch.equal(got, log_probabilities(model, ids))


def test_numbers_that_transformers_refuses_are_read_as_fetch_reads_them(source_copy):
    file = source_copy / "config.json"
    expected = rows(open_checkpoint(source_copy), sequences((40,)))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"swiglu_limit": 7, "use_cache": None}))
    assert torch.equal(rows(open_checkpoint(source_copy), sequences((40,)))[0], expected[0])


def test_a_module_in_16_bit_is_taken_as_it_is(source_copy):
    edit_shard(source_copy, 0, lambda t: make_dense(t, "model.layers.0.self_attn.o_proj"))
    edit_shard(source_copy, 1, lambda t: make_dense(t, "model.layers.1.mlp.experts.down_projs.3"))
    (got,) = rows(open_checkpoint(source_copy), sequences((40,)))
    assert torch.equal(got, log_probabilities(whole_model(source_copy), *sequences((40,))))


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ATTENTION},
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS + ROUTER, "rank_pattern": {"q_proj": 2}},
        {"target_parameters": EXPERTS[:1]},
        {"target_modules": ["v_proj"], "layers_to_transform": [1]},
    ],
    ids=["attention", "all", "gate_up", "one layer"],
)
def test_an_adapter_is_what_peft_makes_of_it(tiny, tmp_path, lora):
    """PEFT on the whole model, nothing merged, against the adapter as it was saved; and the base beside it is untouched."""
    model, (short, long) = whole_model(tiny), sequences((5, 60))
    base = [log_probabilities(model, ids) for ids in (short, long)]
    peft_model = with_adapter(model, **lora)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.mul_(0.2)
    peft_model.save_pretrained(tmp_path)
    got = rows(open_checkpoint(tiny), [short], Adapter(tmp_path), [short, long])
    assert torch.equal(got[0], base[0])
    for changed, ids, before in zip(got[1:], (short, long), base, strict=True):
        expected = log_probabilities(peft_model, ids)
        assert (changed - expected).abs().max() < 2e-4
        assert (expected - before).abs().max() > 0.1


def test_agreements_count_base_and_adapter_apart(tiny, tmp_path):
    model, (ids,) = whole_model(tiny), sequences((9,))
    base = log_probabilities(model, ids)
    peft_model = with_adapter(model, target_modules=ATTENTION)
    peft_model.save_pretrained(tmp_path)
    changed = log_probabilities(peft_model, ids)

    def generation(values: torch.Tensor, error: float) -> Generation:
        """An engine that lists each position's first choice, wrong by `error`."""
        steps = [{int(row.argmax()): float(row.max()) + error} for row in values[:-1]]
        return Generation("", "", ids, len(ids), [{}, *steps])

    engine = [generation(base, 0.25)], [generation(changed, 0.5), generation(base, 0.0)]
    found = reference.agreements(open_checkpoint(tiny), engine[0], Adapter(tmp_path), engine[1])
    assert (found[0].positions, found[0].agreeing) == (8, 8)
    assert found[0].worst_difference == pytest.approx(0.25, abs=1e-4)
    assert found[1].positions == 16
    assert found[1].agreeing < 16  # the base's first choices are not the adapter's
    assert found[1].worst_difference > 0.5 - 1e-4


def test_a_source_that_is_not_finite_in_float32_is_named_with_its_layer(source_copy):
    def break_it(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.router.linear.bias"][3] = float("nan")

    edit_shard(source_copy, 1, break_it)
    with pytest.raises(UserError, match=r"not finite.*layer 1"):
        rows(open_checkpoint(source_copy), sequences((5,)))


# Several layers, each far larger than all else that a process needs, and than the head.
WIDE = Dimensions(
    layers=3,
    hidden=768,
    intermediate=768,
    experts=64,
    experts_per_token=4,
    heads=8,
    kv_heads=2,
    head_dim=64,
    vocabulary=4096,
)


@pytest.mark.slow
def test_memory_is_that_of_one_layer(tiny, tmp_path):
    """In a process of its own: the largest resident size after this model, less that after a small one."""
    synthetic.write_checkpoint(tmp_path, WIDE)
    command = [sys.executable, __file__, str(tiny), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    grown, predicted = json.loads(done.stdout.splitlines()[-1]), reference.peak_bytes(WIDE, 100)
    one_layer = 4 * WIDE.experts * 3 * WIDE.hidden * WIDE.intermediate
    assert one_layer < predicted < 1.1 * one_layer
    assert 0.8 * predicted < grown < 1.3 * predicted


def main(small: str, large: str) -> None:
    sizes = []
    for directory in (small, large):
        rows(open_checkpoint(Path(directory)), sequences((100,), 256))
        # Not ru_maxrss: a process starts with that of the one that started it.
        status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        sizes.append(int(status["VmHWM"].split()[0]) * 1024)
    print(sizes[1] - sizes[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
