"""The proof of config.json: any field that changes the function, and any other way to say the same."""

import pytest
from proof_cases import Change, config_changed, proved, require_found
from proof_mutations import FIELDS, QUANTIZATION, ROPE
from transformers import GptOssConfig

from gptoss_nf4.proof.config import Asked
from gptoss_nf4.samples import embedded

CONFIG = embedded.model_config(embedded.TINY)
DEFAULTS = GptOssConfig(num_hidden_layers=2).to_dict()
NEEDED = [key for key in FIELDS if key in CONFIG and CONFIG[key] != DEFAULTS.get(key, CONFIG[key])]


@pytest.mark.parametrize("key", FIELDS)
def test_a_field_of_another_value_is_found(tiny, converted, tmp_path, key):
    result = config_changed(converted, tmp_path / "result", lambda c: c.update({key: FIELDS[key]}))
    require_found(tiny, result, "config.json is not the source's in .*: got .*, expected ")


@pytest.mark.parametrize("key", [*NEEDED, "num_hidden_layers", "model_type", "architectures", "dtype"])
def test_a_field_that_is_lost_and_is_not_the_default_is_found(tiny, converted, tmp_path, key):
    require_found(tiny, config_changed(converted, tmp_path / "result", lambda c: c.pop(key)), key)


def rope_of(config: dict) -> dict:
    """Take the settings of rope out of `config`, whatever they are called there."""
    theta = {"rope_theta": config.pop("rope_theta")} if "rope_theta" in config else {}
    return theta | (config.pop("rope_scaling", None) or config.pop("rope_parameters"))


@pytest.mark.parametrize("key", ROPE)
@pytest.mark.parametrize("section", ["rope_scaling", "rope_parameters"])
def test_another_rope_is_found(tiny, converted, tmp_path, key, section):
    def change(config):
        config[section] = rope_of(config) | {key: ROPE[key]}

    require_found(tiny, config_changed(converted, tmp_path / "result", change), "rope")


@pytest.mark.parametrize("key", QUANTIZATION)
@pytest.mark.parametrize("lost", [False, True])
def test_another_quantization_config_is_found(tiny, converted, tmp_path, key, lost):
    if lost and key in ("load_in_4bit", "blocks_along"):  # which this result has not
        return

    def change(config):
        if lost:
            del config["quantization_config"][key]
        else:
            config["quantization_config"][key] = QUANTIZATION[key]

    result = config_changed(converted, tmp_path / "result", change)
    by_the_weights = "w13|qkv_proj" if key in ("quant_type", "blocksize") and not lost else key
    require_found(tiny, result, by_the_weights)


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        (Asked("exact", "concatenated", "nf4", 64, "float16", "auto"), "w13_order"),
        (Asked("nf4", "interleaved", "nf4", 64, "float16", "auto"), "requant_mode"),
        (Asked("exact", "interleaved", "nf4", 64, "bfloat16", "auto"), "dtype"),
        (Asked("exact", "interleaved", "nf4", 64, "float16", 0.5), "residual_scale"),
        (Asked("exact", "interleaved", "nf4", 64, "float16", 1), "residual_scale"),
    ],
)
def test_a_result_of_other_settings_is_found(tiny, converted, asked, named):
    require_found(tiny, converted, named, asked)


@pytest.mark.parametrize("scale", [0.3, 2.0, 2.0**-20])
def test_a_residual_scale_that_is_no_power_of_two_is_found_though_it_was_asked_for(tiny, converted, tmp_path, scale):
    result = config_changed(converted, tmp_path / "result", lambda c: c["quantization_config"].update(residual_scale=scale))
    require_found(tiny, result, "power of two", Asked("exact", "interleaved", "nf4", 64, "float16", scale))


def without(*keys: str) -> Change:
    def change(config):
        for key in keys:
            config.pop(key, None)

    return change


def rope_without(*keys: str) -> Change:
    def change(config):
        config["rope_parameters"] = {key: value for key, value in rope_of(config).items() if key not in keys}

    return change


def rope_with(**values: object) -> Change:
    def change(config):
        config["rope_parameters"] = rope_of(config) | values

    return change


SAME_FUNCTION: dict[str, tuple[Change, Change]] = {
    "the default of a field that the source lacks": (dict, lambda c: c.update(swiglu_alpha=1.702)),
    "a field that the source lacks and the result has": (without("attention_bias", "swiglu_limit"), dict),
    "a default that the result leaves out": (dict, without("num_experts_per_tok", "hidden_act", "attention_bias")),
    "numbers of another type": (
        lambda c: c.update(swiglu_limit=7, output_router_logits=0),
        lambda c: c.update(swiglu_limit=7.0),
    ),
    "null for what follows from others": (
        lambda c: c.update(head_dim=None, hidden_size=256),
        lambda c: c.update(hidden_size=256),
    ),
    "null for what follows from defaults": (
        lambda c: c.update(num_key_value_heads=None, num_attention_heads=8),
        lambda c: c.update(num_key_value_heads=8, num_attention_heads=8),
    ),
    "null for what follows from a default, 64 heads": (
        lambda c: (c.update(num_key_value_heads=None), c.pop("num_attention_heads")),
        lambda c: (c.update(num_key_value_heads=64), c.pop("num_attention_heads")),
    ),
    "null where older libraries had no value": (
        lambda c: c.update(
            use_cache=None, attention_dropout=None, output_router_logits=None, original_max_position_embeddings=None
        ),
        without("use_cache", "attention_dropout", "output_router_logits"),
    ),
    "a rope that names no part of each head": (rope_with(partial_rotary_factor=None), dict),
    "such a rope by its older name": (lambda c: c.update(rope_scaling=rope_of(c) | {"partial_rotary_factor": None}), dict),
    "a dtype of no number": (lambda c: c.update(torch_dtype="auto"), dict),
    "fields without effect": (dict, without("attention_dropout", "router_aux_loss_coef", "initial_context_length")),
    "rope's defaults": (rope_without("beta_fast", "beta_slow"), dict),
    "the positions that transformers takes": (
        rope_without("original_max_position_embeddings"),
        rope_with(original_max_position_embeddings=8192),
    ),
    "an attention factor that is yarn's": (rope_with(attention_factor=1.34657359), dict),
    "transformers 5's name for rope": (dict, rope_with()),
    "no rope at all, and transformers' own": (
        rope_of,
        lambda c: (rope_of(c), c.update(rope_parameters=GptOssConfig().rope_parameters)),
    ),
    "OpenAI's name for experts per token": (without("num_experts_per_tok"), dict),
    "a key of nobody's that says nothing": (lambda c: c.update(nobodys=None), lambda c: c.update(nobodys=None)),
    "another version of transformers": (dict, lambda c: c.update(transformers_version="9")),
}


@pytest.mark.parametrize("case", SAME_FUNCTION)
def test_another_way_to_say_the_same_passes(tiny, converted, tmp_path, case):
    of_source, of_result = SAME_FUNCTION[case]
    source = config_changed(tiny, tmp_path / "source", of_source)
    proved(source, config_changed(converted, tmp_path / "result", of_result))


@pytest.mark.parametrize(("key", "value"), [("beta_fast", 31.0), ("original_max_position_embeddings", 4096)])
def test_a_filled_in_rope_setting_that_is_not_the_default_is_found(tiny, converted, tmp_path, key, value):
    source = config_changed(tiny, tmp_path / "source", rope_without(key))
    result = config_changed(converted, tmp_path / "result", rope_with(**{key: value}))
    require_found(source, result, "other angles")


def test_a_default_that_the_source_does_not_have_is_found(tiny, converted, tmp_path):
    """experts_per_token alone: transformers, and so vLLM, would take its own default of 4."""

    def three(config):
        config.pop("num_experts_per_tok")
        config["experts_per_token"] = 3

    source = config_changed(tiny, tmp_path / "source", three)
    require_found(source, config_changed(converted, tmp_path / "result", three), "num_experts_per_tok: .*got 4, expected 3")
