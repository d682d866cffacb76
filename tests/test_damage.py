"""Seeded damage to a source: each is detected with one line, or the result is byte for byte the undamaged one's.

What nothing inside the files can tell, a flipped bit of a code, an absmax or a bias, is detected by the list of digests
that was made before (`model.expected`).
"""

import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import layout_makers
import pytest
from mutations import (
    CONTENT,
    MUTATIONS,
    WHY_HARMLESS,
    bad_scales,
    break_state,
    change_offset,
    edit_config,
    edit_header,
    edit_index,
    edit_state,
    flip,
    lose_a_file,
    retype_json,
    retype_state,
)

from gptoss_nf4.convert.assemble import assemble
from gptoss_nf4.convert.dequant import dequant
from gptoss_nf4.convert.normalize import normalize
from gptoss_nf4.convert.plan import NF4, RequantOptions
from gptoss_nf4.convert.requant import requant
from gptoss_nf4.errors import UserError
from gptoss_nf4.fetch.fetch import fetch
from gptoss_nf4.format.dimensions import Dimensions
from gptoss_nf4.samples import embedded
from gptoss_nf4.source.model import Model, open_source
from gptoss_nf4.storage.artifacts import Artifacts
from gptoss_nf4.storage.checkpoint import Checkpoint
from gptoss_nf4.storage.digests import write_digests

SMALL = Dimensions(
    1, hidden=64, intermediate=64, experts=2, experts_per_token=1, heads=2, kv_heads=1, head_dim=32, vocabulary=300
)
SEED = 20260101


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("small") / "source"
    embedded.write_checkpoint(directory, SMALL)
    return directory


def converted(
    directory: Path, root: Path, expected: Path | None = None, options: RequantOptions | None = None
) -> dict[str, bytes]:
    """The weights, index and quantization settings that a conversion makes of `directory`."""
    model = Model(name="m", kind="local", path=str(directory), expected=str(expected) if expected else None)
    artifacts, options = Artifacts(root), options or RequantOptions()
    fetch(model, artifacts)
    source = open_source(model, artifacts)
    for layer in range(source.dimensions.layers):
        dequant(source, artifacts, layer)
        requant(source, artifacts, layer, options, "cpu")
    normalize(source, artifacts, options, "float16")
    assemble(source, artifacts, options, "float16")
    return {file.name: file.read_bytes() for file in artifacts.checkpoint.iterdir()}


def attempt(directory: Path, root: Path, expected: Path | None, options: RequantOptions) -> tuple[str, dict[str, bytes]]:
    """(the one line that ended it, nothing) or (nothing, the result); any other exception is a bug of ours."""
    try:
        return "", converted(directory, root, expected, options)
    except UserError as error:
        return str(error), {}


def injected(
    small: Path,
    tmp_path: Path,
    mutations: dict[Callable, int],
    options: RequantOptions | None = None,
    listed: tuple[Callable, ...] = CONTENT,
) -> dict[str, Counter]:
    """How often each of `mutations` was detected, and how often harmless. Fails where one was neither.

    For those of `listed` there is a list of digests, made before.
    """
    options = options or RequantOptions()
    reference = converted(small, tmp_path / "reference", options=options)
    write_digests(small, tmp_path / "expected.sha256")
    outcomes: dict[str, Counter] = {}
    for mutate, count in mutations.items():
        counts = outcomes[mutate.__name__] = Counter()
        for number in range(count):
            directory, root = tmp_path / "source", tmp_path / "artifacts"
            shutil.copytree(small, directory)
            mutate(directory, random.Random(f"{SEED} {mutate.__name__} {number}"))
            expected = tmp_path / "expected.sha256" if mutate in listed else None
            message, result = attempt(directory, root, expected, options)
            if message:
                assert message.isprintable(), message  # no line break, no control character
                assert ": got " in message
                counts["detected"] += 1
            else:
                changed = {n for n in reference if result.get(n) != reference[n]}
                # config.json and tokenizer files carry the source's own text, whatever it says.
                if mutate in (edit_config, lose_a_file, retype_json):
                    changed -= {"config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"}
                    changed -= {"special_tokens_map.json", "added_tokens.json"}
                assert not changed, (mutate.__name__, number, changed)
                counts["harmless"] += 1
            assert not list(tmp_path.rglob("*.part"))
            for path in (directory, root):
                shutil.rmtree(path, ignore_errors=True)
    return outcomes


@pytest.mark.slow
def test_damage_is_detected_or_harmless(small, tmp_path, capsys):
    outcomes = injected(small, tmp_path, MUTATIONS)
    assert sum(MUTATIONS.values()) >= 500
    for mutate in CONTENT:
        assert outcomes[mutate.__name__] == {"detected": MUTATIONS[mutate]}
    with capsys.disabled():
        total = sum(outcomes.values(), Counter())
        print(f"\n{sum(total.values())} faults injected: {dict(total)}")
        for name, counts in outcomes.items():
            print(f"  {name}: {dict(counts)}" + (f" ({WHY_HARMLESS[name]})" if counts["harmless"] else ""))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fused, 4 bit, nested", "fused, stored as bfloat16", "fused, 16 bit", "wrapped names"])
def test_damage_to_other_layouts_is_detected_or_harmless(tmp_path, layout, capsys, monkeypatch):
    monkeypatch.setattr(layout_makers, "D", SMALL)
    maker = (layout_makers.EXACT | layout_makers.REQUANTIZED)[layout]
    maker(tmp_path / "small")
    quantized = layout != "fused, 16 bit"
    tried = {
        mutate: count // 5
        for mutate, count in MUTATIONS.items()
        if mutate is not edit_index
        and (quantized or mutate not in (edit_state, break_state, retype_state, bad_scales, change_offset))
    }
    options = RequantOptions() if layout in layout_makers.EXACT else RequantOptions(mode=NF4)
    # That 16-bit weights are float16 and not bfloat16 is content too: nothing else in the files tells.
    listed = CONTENT if quantized else (*CONTENT, edit_header)
    outcomes = injected(tmp_path / "small", tmp_path, tried, options, listed)
    with capsys.disabled():
        print(f"\n{layout}: {dict(sum(outcomes.values(), Counter()))}")


def test_without_the_list_a_flip_still_reaches_the_result(small, tmp_path):
    """So the list is what detects it: the test above could fail."""
    directory = tmp_path / "source"
    shutil.copytree(small, directory)
    info = Checkpoint(directory).tensors["model.layers.0.mlp.experts.down_projs.0.weight"]
    flip(info.file, info.start, info.end, random.Random(1))
    assert converted(directory, tmp_path / "a") != converted(small, tmp_path / "b")
