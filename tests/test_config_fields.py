"""config.json: every field that transformers or vLLM knows has its place in our table, and means the same in both."""

import ast
import inspect
import random
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, GptOssConfig
from transformers import modeling_rope_utils as rope_utils
from transformers.models.gpt_oss import modeling_gpt_oss

from gptoss_nf4.errors import UserError
from gptoss_nf4.format import config_fields, rope
from gptoss_nf4.format.config_fields import (
    ALSO_CALLED,
    COUNTS,
    FIXED,
    LEFT_OUT,
    OF_THEIR_OWN,
    TOKEN_IDS,
    WITHOUT_EFFECT,
    ignored_keys,
    require_served,
    served_config,
)
from gptoss_nf4.format.dimensions import Dimensions
from gptoss_nf4.samples.embedded import TINY, model_config

# Read by vLLM, or written into the result by rules of their own.
TAKEN_OVER = {*COUNTS, *TOKEN_IDS, *OF_THEIR_OWN}
TABLE = {*TAKEN_OVER, *ALSO_CALLED, *FIXED, *WITHOUT_EFFECT, *LEFT_OUT}
WHERE = Path("config.json")


def vllm_source(name: str) -> ast.Module:
    """vLLM's file, parsed and not imported: the test needs no engine."""
    import importlib.util

    (place,) = importlib.util.find_spec("vllm").submodule_search_locations
    return ast.parse((Path(place) / name).read_text())


def is_config(node: ast.expr) -> bool:
    """Whether `node` is the name `config`, or `self.config`."""
    return (isinstance(node, ast.Name) and node.id == "config") or (
        isinstance(node, ast.Attribute) and node.attr == "config"
    )


def fields_read(tree: ast.AST) -> set[str]:
    """X of every `config.X`, and of every `getattr(config, "X")` and `hasattr(config, "X")`."""
    found = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_config(node.value)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    asked = [call.args for call in calls if call.func.id in ("getattr", "hasattr") and is_config(call.args[0])]
    return found | {name.value for _, name, *_ in asked if isinstance(name, ast.Constant)}


def keys_read(tree: ast.AST, *names: str) -> set[str]:
    """K of every `N["K"]` and `N.get("K")`, where N is one of `names`, alone or as an attribute."""

    def is_named(node: ast.expr) -> bool:
        return getattr(node, "attr", getattr(node, "id", None)) in names

    found = set()
    for node in ast.walk(tree):
        key: ast.expr | None = None
        if isinstance(node, ast.Subscript) and is_named(node.value):
            key = node.slice
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            key = node.args[0] if is_named(node.func.value) else None
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            found.add(key.value)
    return found


def transformers_source(thing: object) -> ast.Module:
    return ast.parse(inspect.getsource(thing))


VLLM_READS = fields_read(vllm_source("model_executor/models/gpt_oss.py"))
# Methods of transformers' configuration, and settings of how it computes.
NO_FIELDS = {"_attn_implementation"}
TRANSFORMERS_READS = fields_read(transformers_source(modeling_gpt_oss)) - NO_FIELDS


def test_the_readers_of_source_find_what_they_look_for():
    assert {"hidden_size", "rope_parameters", "num_experts_per_tok", "sliding_window"} <= VLLM_READS
    assert {"rms_norm_eps", "swiglu_alpha", "swiglu_limit", "attention_bias", "layer_types"} <= TRANSFORMERS_READS


def test_every_field_of_transformers_has_a_place():
    assert {field.name for field in fields(GptOssConfig)} - TABLE == set(), "new in transformers: does vLLM read it?"
    assert set(GptOssConfig.attribute_map) <= set(ALSO_CALLED)
    assert set(GenerationConfig._get_default_generation_params()) <= TABLE


def test_every_field_that_vllm_reads_is_taken_over():
    assert VLLM_READS - {"quantization_config"} <= TAKEN_OVER, "new in vLLM"
    assert keys_read(vllm_source("model_executor/models/gpt_oss.py"), "rope_parameters") <= set(rope.READ)


def test_what_transformers_reads_and_vllm_does_not_is_fixed_or_without_effect():
    """These decide the reference's function, and vLLM would ignore them."""
    ignored = TRANSFORMERS_READS - VLLM_READS
    assert {"rms_norm_eps", "swiglu_alpha", "swiglu_limit", "attention_bias"} <= ignored
    assert ignored <= {*FIXED, *WITHOUT_EFFECT, "layer_types", "pad_token_id"}


def test_every_rope_parameter_of_transformers_has_a_place():
    known = {*rope.READ, *rope.CHECKED, *rope.FOREIGN}
    assert set(rope_utils.RopeParameters.__annotations__) <= known
    assert (
        keys_read(transformers_source(rope_utils._compute_yarn_parameters), "rope_parameters_dict", "rope_parameters")
        <= known
    )
    mixin = transformers_source(rope_utils.RotaryEmbeddingConfigMixin)
    (yarn,) = [n for n in ast.walk(mixin) if isinstance(n, ast.FunctionDef) and n.name == "_validate_yarn_rope_parameters"]
    named = {c.value for s in ast.walk(yarn) if isinstance(s, ast.Set) for c in s.elts if isinstance(c, ast.Constant)}
    assert {"attention_factor", "truncate"} <= named <= known


def test_defaults_are_those_of_transformers():
    default = {field.name: field.default for field in fields(GptOssConfig) if field.default is not MISSING}
    for key, value in (COUNTS | FIXED).items():
        assert (default[key], type(default[key])) == (value, type(value)), key
    for key in WITHOUT_EFFECT.keys() & default.keys() - {"transformers_version"}:
        assert default[key] == WITHOUT_EFFECT[key], key
    assert GptOssConfig.default_theta == rope.THETA
    filled = served_config({"model_type": "gpt_oss"}, WHERE)
    theirs = GptOssConfig().to_dict()
    assert {key: theirs[key] for key in filled if key != "architectures"} == {
        key: value for key, value in filled.items() if key != "architectures"
    }


def without(*keys: str) -> dict:
    return {key: value for key, value in model_config(TINY).items() if key not in keys}


def yarn(**changes: object) -> dict:
    """The embedded model's config.json with other parameters of rope; those that are None are left out."""
    parameters = model_config(TINY)["rope_scaling"] | changes
    return without("rope_scaling") | {"rope_scaling": {k: v for k, v in parameters.items() if v is not None}}


def changed(**changes: object) -> dict:
    return model_config(TINY) | changes


# As models with other rope in each type of layer have it.
NESTED = {"rope_type": "yarn"} | {key: {"rope_type": "yarn", "factor": 32.0} for key in config_fields.LAYER_TYPES}


@pytest.mark.parametrize(
    ("field", "told"),
    [({"model_type": "llama"}, "model_type='llama', "), ({"attention_bias": False}, "attention_bias=False, ")],
)
def test_a_refused_value_is_told_as_python_writes_it(field, told):
    with pytest.raises(UserError, match=f"got {told}"):
        require_served({"model_type": "gpt_oss"} | field, WHERE)


REFUSED = [
    *[(key, changed(**{key: value})) for key, value in [
        ("rms_norm_eps", 1e-6),
        ("swiglu_alpha", 1.0),
        ("swiglu_limit", 5.0),
        ("swiglu_limit", None),
        ("hidden_act", "gelu"),
        ("attention_bias", False),
        ("tie_word_embeddings", True),
        ("is_encoder_decoder", True),
        ("model_type", "llama"),
        ("architectures", ["GptOssForSequenceClassification"]),
        ("architectures", "GptOssForCausalLM"),
        ("layer_types", []),
        ("layer_types", ["sliding_attention"]),
        ("attention_dropout", float("nan")),
        ("initializer_range", float("inf")),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("layer_types", []),
        ("num_experts_per_tok", 0),
        ("num_experts_per_tok", 9),
        ("num_experts_per_tok", 2.0),
        ("experts_per_token", 1),
        ("num_experts", 7),
        ("num_key_value_heads", 3),
        ("head_dim", 31),
        ("hidden_size", True),
        ("sliding_window", None),
        ("sliding_window", 0),
        ("max_position_embeddings", "many"),
        ("max_position_embeddings", 8193),
        ("eos_token_id", "<|return|>"),
        ("rope_scaling", None),
        ("rope_scaling", "yarn"),
        ("rope_theta", None),
        ("per_layer_config", {"0": {"sliding_window": 4}}),
        ("partial_rotary_factor", 0.5),
        ("original_max_position_embeddings", 128),
        ("attn_logit_softcapping", 30.0),
        ("use_qk_norm", True),
        ("scoring_func", "sigmoid"),
        ("gain_of_the_future", 2),
    ]],
    *[(key, yarn(**{key: value})) for key, value in [
        ("attention_factor", 1.0),
        ("attention_factor", 0),
        ("attention_factor", "1"),
        ("attention_factor", 10**400),
        ("mscale", 10**400),
        ("truncate", "false"),
        ("truncate", 2),
        ("partial_rotary_factor", 0.5),
        ("rope_type", "linear"),
        ("rope_type", "default"),
        ("rope_type", "longrope"),
        ("type", "dynamic"),
        ("factor", None),
        ("factor", 0.5),
        ("factor", "32"),
        ("factor", True),
        ("factor", float("nan")),
        ("original_max_position_embeddings", 128),
        ("original_max_position_embeddings", 0),
        ("beta_fast", "fast"),
        ("beta_slow", -1.0),
        ("short_factor", [1.0]),
        ("mrope_section", [1, 1, 2]),
    ]],
    ("mscale", yarn(mscale=1.0, mscale_all_dim=0.5)),
    ("mscale_all_dim", yarn(mscale=0.7, mscale_all_dim=1.0)),
    ("rope_type", without("rope_scaling", "rope_theta") | {"rope_parameters": {"factor": 32.0}}),
    ("full_attention", without("rope_scaling") | {"rope_parameters": NESTED}),
]  # fmt: skip


@pytest.mark.parametrize(("key", "config"), REFUSED)
def test_a_setting_that_vllm_would_ignore_is_refused_by_its_key(key, config):
    with pytest.raises(UserError, match=key) as caught:
        served_config(config, WHERE)
    assert "fetch" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "least", "less"), [("rope_theta", 2, 1.99), ("beta_fast", 1e-6, 9e-07), ("beta_slow", 1e-6, 9e-07)]
)
def test_the_least_number_of_a_rope_is_taken_and_what_is_less_is_named(key, least, less):
    assert served_config(yarn(**{key: least}), WHERE)["rope_parameters"][key] == least
    with pytest.raises(UserError, match=rf"got rope_scaling\.{key}={less}, expected a number from {least:g} to "):
        served_config(yarn(**{key: less}), WHERE)


@pytest.mark.parametrize("key", [*FIXED, "layer_types"])
def test_the_plugin_refuses_it_in_a_result_too(key):
    with pytest.raises(UserError, match=key):
        Dimensions.from_config(served_config(changed(), WHERE) | {key: "other"}, WHERE)


FROM_POSITIONS = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 256}
ACCEPTED = {
    "the embedded model": changed(),
    "transformers 5 after saving": GptOssConfig(**changed()).to_dict() | {"dtype": "bfloat16"},
    "remarks": changed(unsloth_version="2025.9.1", unsloth_tiled=True, _note=7, owner="me", off=None, empty=[], no=False),
    "no rope": without("rope_scaling", "rope_theta"),
    "yarn without defaults": yarn(beta_fast=None, beta_slow=None, truncate=None, original_max_position_embeddings=None),
    "factor from positions": without("rope_scaling") | {"rope_parameters": FROM_POSITIONS},
    "legacy type": without("rope_scaling") | {"rope_scaling": {"type": "yarn", "factor": 32.0}},
    "the attention factor that vLLM computes": yarn(attention_factor=1.3465735902799727),
    "mscale alone": yarn(mscale=0.7),
    "whole heads": yarn(partial_rotary_factor=1.0),
    "old counts": changed(num_experts=TINY.experts, experts_per_token=TINY.experts_per_token),
    "FSDP": changed(architectures=["FSDPGptOssForCausalLM"]),
    "whole numbers": changed(swiglu_limit=7),
    "another epsilon of training": changed(initializer_range=1.0, attention_dropout=0.1, router_aux_loss_coef=0.5),
    "broken, and without effect": changed(initializer_range="?", attention_dropout=None, return_dict=7, id2label=[]),
    "remote code": changed(auto_map={"AutoConfig": "evil.Config"}),
    "of a training": changed(max_seq_length=2048, model_max_length=2048, pretraining_tp=1, num_shared_experts=0),
    "sampling": changed(temperature=0.6, max_length=20, do_sample=True),
    "several ends": changed(eos_token_id=[258, 259], bos_token_id=None),
}  # fmt: skip


@pytest.mark.parametrize("config", ACCEPTED.values(), ids=ACCEPTED)
def test_the_result_is_the_model_that_transformers_loads(config):
    served = served_config(config, WHERE)
    assert served_config(served, WHERE) == served
    result = GptOssConfig(**served)
    source = dict(config)
    for key in ("initializer_range", "attention_dropout", "return_dict", "id2label", "auto_map"):
        source.pop(key, None)  # without effect; in one case transformers itself refuses them
    loaded = GptOssConfig(**source | {"swiglu_limit": 7.0})
    for field in TRANSFORMERS_READS & {field.name for field in fields(GptOssConfig)} - set(WITHOUT_EFFECT):
        if field != "rope_parameters":
            assert getattr(result, field) == getattr(loaded, field), field
    for before, after in zip(frequencies(loaded), frequencies(result), strict=True):
        assert torch.allclose(before, after, rtol=1e-6)


def test_remarks_are_listed_and_left_out():
    assert ignored_keys(ACCEPTED["remarks"]) == ["_note", "owner", "unsloth_tiled"]
    served = served_config(ACCEPTED["remarks"], WHERE)
    assert served["unsloth_version"] == "2025.9.1"
    assert not {"owner", "off", "_note"} & served.keys()


def frequencies(config: GptOssConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """(inverse frequencies [head_dim / 2], factor of cosine and sine []) by transformers."""
    frequency, scaling = rope_utils._compute_yarn_parameters(config)
    return frequency, torch.tensor(scaling)


def test_whatever_rope_is_accepted_vllm_computes_as_transformers_does():
    """Random parameters in every spelling: each is refused, or vLLM's own functions give transformers' frequencies."""
    from vllm.model_executor.layers.rotary_embedding.common import yarn_get_mscale
    from vllm.model_executor.layers.rotary_embedding.yarn_scaling_rope import YaRNScalingRotaryEmbedding as Theirs

    rng = random.Random(7)
    served_count = 0
    for _ in range(300):
        parameters = {"rope_type": "yarn"} | {
            key: rng.choice(values)
            for key, values in {
                "rope_theta": [150000, 10000.0],
                "factor": [32.0, 4, 40.5, 1.0, None],
                "original_max_position_embeddings": [64, 256, 4096],
                "beta_fast": [32.0, 16, None, 0],
                "beta_slow": [1.0, 2, None],
                "truncate": [True, False],
                "attention_factor": [None, 1.0, 1.3465735902799727],
                "mscale": [None, 1.0, 0.5],
                "mscale_all_dim": [None, 1.0, 0.5],
            }.items()
            if rng.random() < 0.5
        }
        place = rng.choice(["rope_scaling", "rope_parameters"])
        config = without("rope_scaling", "rope_theta") | {place: dict(parameters), "max_position_embeddings": 1024}
        if rng.random() < 0.5:
            config["rope_theta"] = 50000
        try:
            served = served_config(config, WHERE)["rope_parameters"]
        except UserError:
            continue
        served_count += 1
        frequency, scaling = frequencies(GptOssConfig(**config))
        theirs = Theirs.__new__(Theirs)  # its functions alone: the class itself needs an engine
        for name, value in {
            "base": served["rope_theta"],
            "rotary_dim": config["head_dim"],
            "max_position_embeddings": served["original_max_position_embeddings"],
            "beta_fast": served["beta_fast"],
            "beta_slow": served["beta_slow"],
            "truncate": served["truncate"],
        }.items():
            object.__setattr__(theirs, name, value)
        assert torch.allclose(theirs._compute_inv_freq(served["factor"]), frequency, rtol=1e-6)
        assert yarn_get_mscale(served["factor"]) == pytest.approx(float(scaling), rel=1e-6)
    assert 50 < served_count < 290
