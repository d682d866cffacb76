"""adapter_config.json: every field of PEFT's LoraConfig, patterns by PEFT's own rule, and the names of bases."""

import dataclasses
import json
import re
import time

import pytest
from peft import LoraConfig
from peft.utils.other import get_pattern_key

from gptoss_nf4.adapters.base import Verdict, match_base
from gptoss_nf4.adapters.config import AdapterConfig
from gptoss_nf4.adapters.patterns import Patterns
from gptoss_nf4.errors import UserError

# A value of every field that is not its default, and whether an adapter with it can be served as scale * B @ A.
SERVED, REFUSED = True, False
FIELDS = {
    "task_type": ("CAUSAL_LM", SERVED),
    "peft_type": ("LOHA", REFUSED),
    "auto_mapping": ({"base_model_class": "GptOssForCausalLM"}, SERVED),
    "peft_version": ("0.18.0", SERVED),
    "base_model_name_or_path": ("unsloth/gpt-oss-20b-unsloth-bnb-4bit", SERVED),
    "revision": ("main", SERVED),
    "inference_mode": (True, SERVED),
    "r": (16, SERVED),
    "target_modules": (["q_proj"], SERVED),
    "exclude_modules": (["k_proj"], SERVED),
    "lora_alpha": (32, SERVED),
    "lora_dropout": (0.1, SERVED),
    "fan_in_fan_out": (True, REFUSED),
    "bias": ("lora_only", REFUSED),
    "use_rslora": (True, SERVED),
    "modules_to_save": (["lm_head"], REFUSED),
    "init_lora_weights": ("pissa_niter_4", REFUSED),
    "layers_to_transform": ([0, 1], SERVED),
    "layers_pattern": ("layers", SERVED),
    "rank_pattern": ({"q_proj": 4}, SERVED),
    "alpha_pattern": ({"q_proj": 4}, SERVED),
    "megatron_config": ({"tensor_model_parallel_size": 2}, REFUSED),
    "megatron_core": ("my.megatron", SERVED),
    "trainable_token_indices": ([5], REFUSED),
    "loftq_config": ({"loftq_bits": 4}, SERVED),
    "eva_config": ({"rho": 2.0}, SERVED),
    "corda_config": ({"corda_method": "ipm"}, SERVED),
    "lora_ga_config": ({"direction": "ArB2r"}, SERVED),
    "use_dora": (True, REFUSED),
    "velora_config": ({"num_groups": 64}, SERVED),
    "alora_invocation_tokens": ([1, 2], REFUSED),
    "use_qalora": (True, REFUSED),
    "qalora_group_size": (32, SERVED),
    "monteclora_config": ({"num_samples": 8}, REFUSED),
    "layer_replication": ([[0, 2], [1, 2]], REFUSED),
    "runtime_config": ({"ephemeral_gpu_offload": True}, SERVED),
    "lora_bias": (True, REFUSED),
    "target_parameters": (["mlp.experts.down_proj"], SERVED),
    "use_bdlora": ({"nblocks": 2}, REFUSED),
    "arrow_config": ({"top_k": 3}, REFUSED),
    "kasa_config": ({"beta": 0.1}, REFUSED),
    "ensure_weight_tying": (True, SERVED),
}


def saved(tmp_path, **fields) -> dict:
    """What PEFT writes for LoraConfig(**fields)."""
    LoraConfig(**fields).save_pretrained(tmp_path)
    return json.loads((tmp_path / "adapter_config.json").read_text())


def parse(config: dict) -> AdapterConfig:
    return AdapterConfig.from_dict(config, "adapter_config.json")


def refusal(config: dict) -> str:
    """The one line that `config` is refused with."""
    with pytest.raises(UserError) as error:
        parse(config)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_field_of_pefts_is_known():
    """Fails when PEFT gains a field: read what it does, then decide in peft_fields.py and here."""
    assert FIELDS.keys() == {field.name for field in dataclasses.fields(LoraConfig)}


def plain(value: object) -> str:
    """A name for a case. pytest does not find one with a backslash again, as mutmut asks it to."""
    return str(value).replace("\\", "/")


@pytest.mark.parametrize("field", FIELDS)
def test_a_field(field, tmp_path):
    value, served = FIELDS[field]
    config = saved(tmp_path, target_modules=["q_proj"]) | {field: value}
    if served:
        parse(config)
    else:
        line = refusal(config)
        assert f"{field}=" in line
        assert "train with" in line


def test_pefts_defaults_are_served(tmp_path):
    config = parse(saved(tmp_path))
    assert (config.r, config.lora_alpha, config.scale("model.layers.0.self_attn.q_proj")) == (8, 8, 1)


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal", "mica", None])
def test_starting_values_that_leave_the_base_alone(start):
    parse({"peft_type": "LORA", "r": 4, "lora_alpha": 4, "init_lora_weights": start})


@pytest.mark.parametrize("start", ["pissa", "olora", "corda", "loftq", "lora_ga", "what comes next", 1, 0, ["gaussian"]])
def test_starting_values_that_change_the_base(start):
    line = refusal({"peft_type": "LORA", "r": 4, "lora_alpha": 4, "init_lora_weights": start})
    assert "path_initial_model_for_weight_conversion" in line


def test_unknown_fields():
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 4}
    for off in (None, False, {}, [], ""):
        parse(plain | {"use_novelty": off})
    assert "use_novelty=True" in refusal(plain | {"use_novelty": True})
    assert "novelty_config" in refusal(plain | {"novelty_config": {"a": 1}})


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["model.embed_tokens"]},
        {"target_modules": "lm_head"},
        {"target_parameters": ["lm_head.weight"]},
        {"target_parameters": ["mlp.experts.gate_up_proj_bias"]},
        {"target_parameters": ["self_attn.sinks"]},
        {"r": 0},
        {"r": True},
        {"r": "16"},
        {"r": 513},
        {"r": None},
        {"lora_alpha": None},
        {"lora_alpha": float("nan")},
        {"lora_alpha": 10**400},
        {"rank_pattern": {"q_proj": 0}},
        {"rank_pattern": ["q_proj"]},
        {"rank_pattern": {"q_proj": "4"}},
        {"rank_pattern": {"(": 4}},
        {"alpha_pattern": {"q_proj": None}},
        {"use_rslora": "yes"},
        {"target_modules": 5},
        {"target_parameters": "mlp.experts.down_proj"},
        {"target_parameters": [5]},
        {"auto_mapping": "x"},
        {"base_model_name_or_path": 5},
        {"base_model_name_or_path": "a\0b"},
        {"base_model_name_or_path": "x" * 5000},
        {"peft_version": 0.18},
        {"lora_B_layout": "mixed"},
        {"lora_B_layout": None},
        {"auto_mapping": {"lora_B_layout": "column_major"}},
        {"unsloth_fused_expert_lora": {"parameters": {"gate_up_proj": {"lora_B_layout": "mixed"}}}},
    ],
    ids=lambda fields: plain(fields)[:60],
)
def test_bad_fields(fields):
    line = refusal({"peft_type": "LORA", "r": 4, "lora_alpha": 4} | fields)
    (field,) = fields
    named = "lora_B_layout" if "lora_B_layout" in str(fields) else field
    assert re.search(rf"( got |this name in |adapter_config\.json, ){named}\b", line), line


@pytest.mark.parametrize(
    ("field", "value", "beyond"),
    [
        ("r", 512, 513),
        ("rank_pattern", {"q_proj": 512}, {"q_proj": 513}),
        ("lora_alpha", 1e9, 1.1e9),
        ("lora_alpha", -1e9, -1.1e9),
        ("alpha_pattern", {"q_proj": 10**9}, {"q_proj": 10**9 + 1}),
        ("base_model_name_or_path", "x" * 4096, "x" * 4097),
    ],
    ids=lambda value: plain(value)[:30],
)
def test_the_largest_values_and_those_beyond(field, value, beyond):
    """512 is the largest max_lora_rank of vLLM 0.32.0, and a path of Linux has 4096 characters at most."""
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 4}
    parse(plain | {field: value})
    assert f"{field}=" in refusal(plain | {field: beyond})


MODULES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.k_proj",
    "model.layers.10.self_attn.q_proj",
    "model.layers.0.mlp.router.linear",
    "model.layers.0.mlp.router.weight",
    "model.layers.1.mlp.experts.gate_up_proj",
    "model.layers.1.mlp.experts.gate_up_projs.1",
    "model.layers.1.mlp.experts.gate_up_projs.11",
    "model.layers.1.mlp.experts.down_projs.1",
]
PATTERNS = [
    ["q_proj"],
    ["proj"],
    ["_proj", "q_proj"],
    ["self_attn.q_proj", "q_proj"],
    ["layers.0.self_attn.q_proj"],
    ["^model.layers.0.self_attn.q_proj"],
    [r"^model\.layers\.0\.self_attn\.q_proj$"],
    [r"model\.layers\.0\..*", "q_proj"],
    [r".*\.(q|k)_proj"],
    ["self_attn.?_proj"],
    ["self_attn..._proj", "self_attn.k_proj"],
    ["1"],
    ["11", "1"],
    ["gate_up_projs.1"],
    ["", "q_proj"],
    ["experts"],
    [r"layers\.1[0]?\.(?:self_attn|mlp)\..*"],
    ["q_proj|k_proj"],
    [r"linear\b"],
]


@pytest.mark.parametrize("patterns", PATTERNS, ids=plain)
def test_patterns_match_as_pefts(patterns):
    ours = Patterns({pattern: number for number, pattern in enumerate(patterns)}, "test")
    for module in MODULES:
        key = get_pattern_key(patterns, module)
        assert ours.get(module, -1) == (patterns.index(key) if key in patterns else -1), module


def test_a_pattern_cannot_take_long():
    evil = ["(a+)+b", "(.*)*x", ".*.*.*.*.*x", "(m|m)?(o|o)?(d|d)?x", "a" * 1_000_000 + "!", r"(a|b|ab)*c", "(a{1,9}){1,9}"]
    for pattern in evil:
        with pytest.raises(UserError, match="bad pattern"):
            Patterns({pattern: 1}, "test")
    expressions = {f"x{n}y.*": n for n in range(65)}
    with pytest.raises(UserError, match="65 regular expressions"):
        Patterns(expressions, "test")
    assert Patterns(dict(list(expressions.items())[:64]), "test").get("x63y.q_proj", -1) == 63
    assert Patterns({"a" * 200: 1}, "test").get("a" * 200, -1) == 1
    with pytest.raises(UserError, match="a pattern of 201 characters"):
        Patterns({"a" * 201: 1}, "test")
    worst = Patterns({".*" * 4 + "x": 1}, "test")
    start = time.perf_counter()
    worst.get("model.layers.10.mlp.experts.gate_up_projs.127", 0)
    assert time.perf_counter() - start < 1


NF4 = "unsloth/gpt-oss-20b-unsloth-bnb-4bit"


@pytest.mark.parametrize(
    ("trained_on", "known_as", "verdict"),
    [
        (NF4, (NF4,), Verdict.EXACT),
        ("Unsloth/GPT-OSS-20b-unsloth-bnb-4bit", (NF4,), Verdict.EXACT),
        ("/models/gpt-oss-20b-unsloth-bnb-4bit", (NF4,), Verdict.EXACT),
        ("/models/gpt-oss-20b-unsloth-bnb-4bit/", (NF4,), Verdict.EXACT),
        (
            "/root/.cache/huggingface/hub/models--unsloth--gpt-oss-20b-unsloth-bnb-4bit/snapshots/1a2b/",
            (NF4,),
            Verdict.EXACT,
        ),
        (NF4, ("/models/gpt-oss-20b-unsloth-bnb-4bit",), Verdict.EXACT),
        ("/models/mine", ("/models/../models/mine/",), Verdict.EXACT),
        (NF4, ("/models/mine", NF4), Verdict.EXACT),
        ("openai/gpt-oss-20b", (NF4,), Verdict.OTHER_WEIGHTS),
        ("unsloth/gpt-oss-20b", (NF4,), Verdict.OTHER_WEIGHTS),
        ("unsloth/gpt-oss-20b-BF16", (NF4,), Verdict.OTHER_WEIGHTS),
        ("someone/gpt-oss-20b-unsloth-bnb-4bit", (NF4,), Verdict.OTHER_WEIGHTS),
        ("unsloth/gpt-oss-120b-unsloth-bnb-4bit", (NF4,), Verdict.OTHER_MODEL),
        ("openai/gpt-oss-safeguard-20b", (NF4,), Verdict.OTHER_MODEL),
        ("/runs/gpt-oss-20b/merged-gpt-oss-120b", (NF4,), Verdict.OTHER_MODEL),
        ("/models/mine", (NF4,), Verdict.UNKNOWN),
        ("outputs/merged", (NF4,), Verdict.UNKNOWN),
        ("/models/mine", ("/models/other",), Verdict.UNKNOWN),
        (None, (NF4,), Verdict.UNKNOWN),
        ("", (NF4,), Verdict.UNKNOWN),
    ],
)
def test_bases(trained_on, known_as, verdict):
    match = match_base(trained_on, *known_as)
    assert match.verdict == verdict
    assert (trained_on or known_as[0]) in match.statement
