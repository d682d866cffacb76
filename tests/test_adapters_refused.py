"""Adapters that are damaged, wrong for the base, or not to be served: one line that names what is wrong."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from adapter_makers import ATTENTION, EXPERTS, PREFIX, ROUTER, SMALL, Made, fused_model, split, with_adapter

from gptoss_nf4.adapters.adapter import Adapter
from gptoss_nf4.errors import UserError
from gptoss_nf4.format.dimensions import Dimensions

Q = f"{PREFIX}0.self_attn.q_proj"
OUTER, INNER = f"{PREFIX}1.mlp.experts", f"{PREFIX}1.mlp.experts.base_layer"


@pytest.fixture
def made(tmp_path) -> Made:
    return Made(fused_model(SMALL), tmp_path / "adapter", target_modules=ATTENTION, target_parameters=EXPERTS + ROUTER)


def refusal(directory: Path, d: Dimensions = SMALL) -> str:
    """The one line that the adapter is refused with."""
    with pytest.raises(UserError) as error:
        Adapter(directory).validate(d)
    assert "\n" not in str(error.value)
    return str(error.value)


def without(*keys):
    def change(tensors):
        for key in keys:
            del tensors[key]

    return change


def put(key, change):
    def edit(tensors):
        tensors[key] = change(tensors[key])

    return edit


def renamed(old, new):
    return lambda tensors: {key.replace(old, new): tensor for key, tensor in tensors.items()}


def first(value):
    def change(tensor):
        tensor[0, 0] = value
        return tensor

    return change


def mixed(tensors):
    """Layer 1 both fused and by experts."""
    return tensors | {key: tensor for key, tensor in split(tensors, SMALL.experts).items() if ".layers.1." in key}


A, B = ".lora_A.weight", ".lora_B.weight"
DAMAGE = {
    "A without B": (without(Q + B), f"missing tensor.*lora_A of {Q.removeprefix('base_model.model.')} alone"),
    "B without A": (without(INNER + A), "missing tensor.*lora_B of .*base_layer alone"),
    "no tensors": (lambda tensors: tensors.clear(), "no adapter.*no tensors"),
    "NaN": (put(OUTER + B, first(float("nan"))), r"bad values.*layers\.1\.mlp\.experts\.lora_B"),
    "infinity": (put(Q + A, first(float("inf"))), "bad values.*q_proj.lora_A"),
    "beyond float32": (put(Q + A, lambda t: t.double() * 1e300), "bad values.*q_proj.lora_A"),
    "integers": (put(Q + A, lambda t: t.to(torch.uint8)), "wrong tensor.*U8.*q_proj.lora_A"),
    "B cut": (put(Q + B, lambda t: t[:-1]), r"wrong size.*\[31, 4\].*\[r, 24\] and \[32, r\]"),
    "A cut": (put(Q + A, lambda t: t[:, :-1]), r"wrong size.*\[4, 23\]"),
    "rank of A": (put(Q + A, lambda t: t[:-1]), "wrong size.*q_proj"),
    "one dimension": (put(Q + A, lambda t: t[0]), "wrong size.*q_proj"),
    "three dimensions": (put(Q + B, lambda t: t[..., None]), "wrong size.*q_proj"),
    "empty": (put(Q + A, lambda t: t[:0]), "wrong size.*q_proj"),
    "experts cut": (put(OUTER + B, lambda t: t[:-1]), r"wrong size.*outer sizes of \[40, 24\] or \[24, 20\]"),
    "fraction of an expert": (
        lambda t: t | {OUTER + A: t[OUTER + A][:-1], OUTER + B: t[OUTER + B][:, :-1]},
        "wrong number of ranks.*11 rows of lora_A of .*expected 12, 4 for each of 3 experts",
    ),
    "one swapped": (
        lambda t: t | {OUTER + A: torch.zeros(12, 24), OUTER + B: torch.zeros(20, 12)},
        "wrong size.*the same way round",
    ),
    "gate_up twice": (
        lambda t: t | {OUTER + A: t[INNER + A], OUTER + B: t[INNER + B]},
        "wrong expert tensors.*gate_up_proj and gate_up_proj in layer 1",
    ),
    "down_proj lost": (without(OUTER + A, OUTER + B), "wrong expert tensors.*those of gate_up_proj in layer 1"),
    "rank of all but the configuration": (
        lambda t: t | {Q + A: t[Q + A][:2], Q + B: t[Q + B][:, :2]},
        r"contradicting ranks.*rank 2 in the tensors of model\.layers\.0\.self_attn\.q_proj.*expected 4",
    ),
    "rank of experts": (
        lambda t: t | {OUTER + A: t[OUTER + A][:9], OUTER + B: t[OUTER + B][:, :9]},
        r"wrong number of ranks.*9 rows of lora_A of model\.layers\.1\.mlp\.experts\.down_proj",
    ),
    "unknown layer": (renamed("layers.1.", "layers.2."), r"unknown layer.*layers\.2\..*layers 0 to 1"),
    "unknown module": (renamed("self_attn.o_proj", "mlp.o_proj"), r"unknown adapter key.*mlp\.o_proj"),
    "unknown wrapper": (renamed("q_proj", "q_proj.base_layer"), r"unknown adapter key.*q_proj\.base_layer"),
    "three wrappers": (renamed("experts.base_layer", "experts.base_layer.base_layer"), "unknown adapter key"),
    "expert without a number": (renamed("mlp.router", "mlp.experts.gate_up_projs"), "unknown adapter key"),
    "unknown expert": (renamed("mlp.router", "mlp.experts.gate_up_projs.3"), "unknown expert.*experts 0 to 2"),
    "a weight of the base": (renamed("router.lora_A.weight", "router.weight"), "unknown adapter key.*router.weight"),
    "another adapter's name": (renamed("lora_A.weight", "lora_A.other.weight"), "unknown adapter key"),
    "digits without end": (renamed("layers.1.", f"layers.{'9' * 5000}."), "unknown adapter key"),
    "two names": (lambda t: t | {(Q + A).replace("A.weight", "A.default.weight"): t[Q + A]}, "duplicated tensor.*q_proj"),
    "two routers": (
        lambda t: t | {k.replace("router", "router.linear"): v for k, v in t.items() if "router" in k},
        r"duplicated delta.*model\.layers\.0\.mlp\.router",
    ),
    "fused and by experts": (mixed, r"duplicated delta.*model\.layers\.1\.mlp\.experts\.w13"),
    "DoRA's tensor": (
        lambda t: t | {f"{Q}.lora_magnitude_vector": torch.ones(32)},
        "not supported .DoRA.*q_proj.lora_magnitude_vector",
    ),
    "embedding": (
        lambda t: t | {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 50)},
        "not supported .an embedding",
    ),
    "head": (lambda t: t | {f"base_model.model.lm_head{A}": torch.ones(4, 24)}, "not supported .the head"),
    "whole head": (lambda t: t | {"base_model.model.lm_head.weight": torch.ones(50, 24)}, "not supported .the head"),
    "bias": (lambda t: t | {f"{Q}.lora_B.bias": torch.ones(32)}, "not supported .a bias of lora_B"),
}


@pytest.mark.parametrize(("change", "line"), DAMAGE.values(), ids=DAMAGE)
def test_tensors(change, line, made):
    made.rewrite(change)
    assert re.search(line, found := refusal(made.directory)), found


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"layers": 1}, "unknown layer"),
        ({"hidden": 32}, "wrong size"),
        ({"intermediate": 28}, "wrong size"),
        ({"experts": 4}, "wrong number of ranks.*expected 16, 4 for each of 4 experts"),
        ({"kv_heads": 4}, "wrong size.*k_proj"),
    ],
    ids=str,
)
def test_another_base(changes, line, made):
    d = Dimensions(**SMALL.as_dict() | changes)
    assert re.search(line, found := refusal(made.directory, d)), found


def test_ranks_that_the_configuration_contradicts(made):
    made.rewrite(r=8)
    assert "expected 24, 8 for each of 3 experts" in refusal(made.directory)
    made.rewrite(r=4, rank_pattern={"o_proj": 2})
    assert "rank 4 in the tensors of model.layers.0.self_attn.o_proj" in refusal(made.directory)


def test_targets_that_the_tensors_contradict(made):
    made.rewrite(target_parameters=["mlp.experts.gate_up_proj"])
    assert "expected those of gate_up_proj" in refusal(made.directory)


def test_a_lone_inner_wrapper(made):
    made.rewrite(without(OUTER + A, OUTER + B), target_parameters=None)
    assert "as an inner wrapper" in refusal(made.directory)


# What PEFT itself writes for what is not served.
PEFTS = {
    "DoRA": ({"use_dora": True}, "use_dora"),
    "lora_bias": ({"lora_bias": True}, "lora_bias"),
    "bias": ({"bias": "all"}, "bias="),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
    "head": ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
    "head by an expression": ({"target_modules": ".*(q_proj|lm_head)"}, "lm_head"),
    "embedding by an expression": ({"target_modules": ".*(q_proj|tokens)"}, "an embedding"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    "KaSA": ({"kasa_config": {}}, "kasa_config"),
    "expert biases": ({"target_modules": [], "target_parameters": ["experts.down_proj_bias"]}, "down_proj_bias"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
}


@pytest.mark.parametrize(("lora", "name"), PEFTS.values(), ids=PEFTS)
def test_what_peft_saves_and_nobody_serves(lora, name, tmp_path):
    if "kasa_config" in lora:
        from peft import KasaConfig

        lora = {"kasa_config": KasaConfig()}
    with_adapter(fused_model(SMALL), **{"target_modules": ["q_proj"]} | lora).save_pretrained(tmp_path)
    line = refusal(tmp_path)
    assert "not supported" in line
    assert name in line


def test_damaged_files(made):
    data = made.weights_file.read_bytes()
    for damaged in (b"", data[:6], data[:200], data[:-1], data + b"x", b"\xff" * 64):
        made.weights_file.write_bytes(damaged)
        assert "damaged shard" in refusal(made.directory)
    made.weights_file.write_bytes(data)
    Adapter(made.directory).validate(SMALL)
    for text in ("", "{", "[]", "[" * 100_000, "\x00", '{"peft_type": "LORA"}'):
        (made.directory / "adapter_config.json").write_text(text)
        assert "adapter_config.json" in refusal(made.directory)


def test_a_configuration_too_large_to_be_one(made):
    config = json.dumps(made.config | {"revision": "x" * (5 << 20)})
    (made.directory / "adapter_config.json").write_text(config)
    assert "bytes, expected at most" in refusal(made.directory)


def test_a_link_out_of_the_directory(made, tmp_path):
    outside = shutil.move(made.weights_file, tmp_path / "outside.safetensors")
    made.weights_file.symlink_to(outside)
    assert "link out of" in refusal(made.directory)


def test_a_trainers_checkpoints(made, tmp_path):
    """One of them is an adapter; the directory above names them, in their order."""
    for step in (500, 1000, 60):
        shutil.copytree(made.directory, tmp_path / f"outputs/checkpoint-{step}")
        (tmp_path / f"outputs/checkpoint-{step}/optimizer.pt").write_bytes(b"not read")
    Adapter(tmp_path / "outputs/checkpoint-500").validate(SMALL)
    line = refusal(tmp_path / "outputs")
    assert "3 adapters in it: checkpoint-60, checkpoint-500, checkpoint-1000" in line
    assert str(tmp_path / "outputs/checkpoint-1000") in line


def test_directories_without_an_adapter(made, tmp_path):
    assert "no such directory" in refusal(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no adapter_config.json" in refusal(tmp_path / "empty")
    (tmp_path / "empty/config.json").write_text("{}")
    assert "whole model" in refusal(tmp_path / "empty")
    made.weights_file.unlink()
    assert "no adapter_model.safetensors" in refusal(made.directory)
    torch.save({}, made.directory / "adapter_model.bin")
    assert "pickle" in refusal(made.directory)


def test_a_pickle_is_not_opened(tmp_path):
    """As PEFT writes it with safe_serialization=False."""
    with_adapter(fused_model(SMALL), target_modules=["q_proj"]).save_pretrained(tmp_path, safe_serialization=False)
    (tmp_path / "adapter_model.bin").write_bytes(b"anything")
    line = refusal(tmp_path)
    assert "adapter_model.bin, a pickle" in line
    assert "save_pretrained" in line
