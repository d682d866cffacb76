"""Every field of a gpt-oss config.json, and what vLLM makes of it: reads it, has its value built in, or does not need it.

Made from vLLM 0.32.0 (`model_executor/models/gpt_oss.py` and what it calls) and transformers 5.19 (`GptOssConfig`,
`PreTrainedConfig`, `modeling_gpt_oss.py`). `rope.py` has the fields of rope_parameters. A test reads both libraries and
fails when either gains a field. vLLM says nothing about a setting that it ignores, and serves another function. So such a
setting is refused here, by its key, before any work.
"""

import math

from gptoss_nf4.errors import UserError
from gptoss_nf4.format.rope import served_rope
from gptoss_nf4.format.switches import is_off

# gpt-oss's clamped SwiGLU (transformers `modeling_gpt_oss.py` GptOssExperts; openai/gpt-oss `swiglu`).
SWIGLU_ALPHA = 1.702
SWIGLU_LIMIT = 7.0
RMS_NORM_EPS = 1e-5
LAYER_TYPES = ("sliding_attention", "full_attention")  # of even and of odd layers: vLLM asks `layer_idx % 2 == 0`

# Read by vLLM: whole numbers above 0. The values are transformers' defaults.
COUNTS = {
    "num_hidden_layers": 36,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 201088,
    "max_position_embeddings": 131072,
    "sliding_window": 128,
}
# Other names of counts: transformers' `attribute_map`, and openai's own file beside the weights.
ALSO_CALLED = {"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"}
# Names are made for every layer and expert, so a hostile config.json could cost memory. These bounds are small enough that
# it does not, and far beyond any gpt-oss.
LARGEST = {"num_hidden_layers": 1000, "num_local_experts": 4096}
MAX_WIDTH = 1 << 24

# Built into vLLM (RMSNorm(eps=1e-5), SwigluOAIAndMul, bias=True, a head of its own), or into gpt-oss itself.
FIXED = {
    "rms_norm_eps": RMS_NORM_EPS,
    "swiglu_alpha": SWIGLU_ALPHA,
    "swiglu_limit": SWIGLU_LIMIT,
    "hidden_act": "silu",
    "attention_bias": True,
    "tie_word_embeddings": False,
    "is_encoder_decoder": False,
}
# Token ids, of which vLLM takes the ends of a text: a whole number, a list of them, or null.
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Read, checked and written by a function of their own below.
OF_THEIR_OWN = ("model_type", "architectures", "layer_types", "rope_parameters", "rope_scaling", "rope_theta")

# Nothing that the model computes at inference depends on these. The values are transformers' defaults; another of the same
# type is carried over.
WITHOUT_EFFECT = {
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "router_aux_loss_coef": 0.001,
    "output_router_logits": False,
    "use_cache": True,
    "output_hidden_states": False,
    "return_dict": True,
    "chunk_size_feed_forward": 0,
    "transformers_version": "",
    "unsloth_version": "",
    "unsloth_fixed": True,
    "initial_context_length": 4096,  # openai's name of original_max_position_embeddings; nothing reads it
    "_name_or_path": "",
    "model_name": "",
}
# Not carried over: the conversion decides the dtype and the quantization, the result runs no code of the source's, and
# generation_config.json has what concerns sampling.
LEFT_OUT = frozenset(
    {
        "dtype",
        "torch_dtype",
        "quantization_config",
        "auto_map",
        "custom_pipelines",
        # Of classifiers.
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        # How something is computed or returned.
        "name_or_path",
        "_commit_hash",
        "attn_implementation",
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "experts_implementation",
        "_experts_implementation_internal",
        "output_attentions",
        "tie_last_hidden_states",
        # What every configuration of transformers 4 may have.
        "add_cross_attention",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "finetuning_task",
        "is_decoder",
        "prefix",
        "pruned_heads",
        "sep_token_id",
        "task_specific_params",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tokenizer_class",
        "torchscript",
        "use_bfloat16",
        # Lengths of a training, and how it was split.
        "max_seq_length",
        "model_max_length",
        "pretraining_tp",
        # Sampling.
        "assistant_confidence_threshold",
        "assistant_lookbehind",
        "bad_words_ids",
        "begin_suppress_tokens",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "encoder_repetition_penalty",
        "epsilon_cutoff",
        "eta_cutoff",
        "exponential_decay_length_penalty",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "length_penalty",
        "max_length",
        "min_length",
        "no_repeat_ngram_size",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_scores",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict_in_generate",
        "suppress_tokens",
        "target_lookbehind",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
    }
)
# Settings that other models have, with the value that changes nothing. Neither transformers nor vLLM applies them to
# gpt-oss, so a model that needs one was trained by other code. Null is neutral for all.
OF_OTHER_MODELS = {
    "partial_rotary_factor": 1.0,
    "original_max_position_embeddings": None,  # beside rope_parameters: transformers and vLLM prefer it to the one within
    "position_embedding_type": "rope",
    "hidden_activation": "silu",
    "scoring_func": "softmax",
    "norm_topk_prob": True,
    "use_sliding_window": True,
    "is_causal": True,
    "mlp_bias": True,
    "logit_scale": 1.0,
    "routed_scaling_factor": 1.0,
    "residual_multiplier": 1.0,
    "embedding_multiplier": 1.0,
}

PRIVATE = ("_", "unsloth_")  # begin the names of what a library notes for itself

_BUILT_IN = "vLLM has it built into gpt-oss and would serve another value wrongly: correct config.json if it is wrong there"


def served_config(config: dict, where: object) -> dict:
    """The fields of `config` that the result's config.json takes over, with transformers' defaults where it has none.

    The function that transformers computes by `config` is the one that vLLM computes by the result. `rope_scaling` and
    `rope_theta` become `rope_parameters`. UserError, which names `where` and the key, for anything else.
    """
    require_served(config, where)
    counts = {key: count(config, key, where) for key in COUNTS}
    _require_known(config, where)
    carried = {key: config[key] for key, value in WITHOUT_EFFECT.items() if type(config.get(key)) is type(value)}
    ids = {key: config[key] for key in TOKEN_IDS if config.get(key) is not None}
    return {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        **counts,
        **FIXED,
        **ids,
        **carried,
        "layer_types": _layer_types(counts["num_hidden_layers"]),
        "rope_parameters": served_rope(config, count(config, "max_position_embeddings", where), where),
    }


def ignored_keys(config: dict) -> list[str]:
    """The keys that `served_config` leaves out, and whose meaning nothing here knows: remarks."""
    return sorted(key for key in config.keys() - _known() if not is_off(config[key]))


def require_served(config: dict, where: object) -> None:
    """UserError for another model, for a count that cannot be, and for a known field that vLLM would ignore."""
    if config.get("model_type") != "gpt_oss":
        raise _unsupported(where, "model_type", config, "'gpt_oss'", "choose a gpt-oss: no other model is converted")
    names = config.get("architectures") or ["GptOssForCausalLM"]
    if not isinstance(names, list):
        raise _unsupported(where, "architectures", config, "['GptOssForCausalLM']", "write it as a list")
    # FSDP's wrapper puts its name in front.
    if not all(str(name).endswith("GptOssForCausalLM") for name in names):
        raise _unsupported(where, "architectures", config, "GptOssForCausalLM", "save it as a causal language model")
    for key, value in FIXED.items():
        if config.get(key, value) != value:
            raise _unsupported(where, key, config, repr(value), _BUILT_IN)
    for key in WITHOUT_EFFECT:
        if isinstance(config.get(key), float) and not math.isfinite(config[key]):
            raise _unsupported(where, key, config, "a finite number", "restore the model's own config.json")
    layers = count(config, "num_hidden_layers", where)
    if config.get("layer_types") not in (None, _layer_types(layers)):
        in_turn = f"{LAYER_TYPES[0]} and {LAYER_TYPES[1]} in turn, as many as num_hidden_layers={layers}"
        raise _unsupported(where, "layer_types", config, in_turn, _BUILT_IN)
    _require_relations({key: count(config, key, where) for key in COUNTS if key != "sliding_window"}, where)
    for key in TOKEN_IDS:
        ids = config.get(key)
        each = ids if isinstance(ids, list) and key == "eos_token_id" else [ids]
        if ids is not None and not all(type(number) is int for number in each):
            raise _unsupported(where, key, config, "a token's number", "restore the model's own config.json")
    served_rope(config, count(config, "max_position_embeddings", where), where)


def count(config: dict, key: str, where: object) -> int:
    """The count called `key`, transformers' default where config.json has none. UserError where it is out of range."""
    names = [key, *(other for other, meant in ALSO_CALLED.items() if meant == key)]
    given = {name: config[name] for name in names if name in config}
    if given == {"head_dim": None}:  # transformers 4 wrote null for what follows from others
        return count(config, "hidden_size", where) // count(config, "num_attention_heads", where)
    if given == {"num_key_value_heads": None}:
        return count(config, "num_attention_heads", where)
    if key not in given and "num_experts" not in given:
        given = {key: COUNTS[key]} | given  # so that `experts_per_token` alone cannot say something else
    largest = LARGEST.get(key, MAX_WIDTH)
    for name, value in given.items():
        if type(value) is not int or not 1 <= value <= largest:
            raise UserError(
                "bad config",
                where=where,
                got=f"{name}={str(value)[:40]}",
                expected=f"a number from 1 to {largest}",
                next_step="restore the model's own config.json",
            )
    if len(set(given.values())) > 1:
        raise UserError(
            "bad config",
            where=where,
            got=", ".join(f"{name}={value}" for name, value in given.items()),
            expected="one number under both names",
            next_step="correct config.json; vLLM reads " + key,
        )
    return int(next(iter(given.values())))


def _require_relations(counts: dict[str, int], where: object) -> None:
    """UserError for counts that do not go together."""
    heads, kv_heads = counts["num_attention_heads"], counts["num_key_value_heads"]
    experts, per_token = counts["num_local_experts"], counts["num_experts_per_tok"]
    wrong = {
        f"num_attention_heads={heads}, num_key_value_heads={kv_heads}": (heads % kv_heads, "heads in whole groups"),
        f"num_experts_per_tok={per_token}, num_local_experts={experts}": (per_token > experts, "no more than there are"),
        f"head_dim={counts['head_dim']}": (counts["head_dim"] % 2, "an even number, since rope turns pairs"),
    }
    for got, (is_wrong, expected) in wrong.items():
        if is_wrong:
            raise UserError(
                "bad config", where=where, got=got, expected=expected, next_step="restore the model's own config.json"
            )


def _layer_types(layers: int) -> list[str]:
    return [LAYER_TYPES[layer % 2] for layer in range(layers)]


def _require_known(config: dict, where: object) -> None:
    """UserError for a setting of other models, and for a number, a list or a switch that is on and that nothing here knows.

    A text that nothing knows is a remark: `ignored_keys` lists it.
    """
    for key in sorted(config.keys() - _known()):
        value, neutral = config[key], OF_OTHER_MODELS.get(key)
        no_setting = isinstance(value, str) or key.startswith(PRIVATE)
        if is_off(value) or value in (0, neutral) or (no_setting and key not in OF_OTHER_MODELS):
            continue
        raise _unsupported(
            where,
            key,
            config,
            "only settings that transformers and vLLM apply to gpt-oss",
            "remove the key if it changes nothing; if the model needs it, vLLM would serve another one",
        )


def _known() -> set[str]:
    return {*COUNTS, *ALSO_CALLED, *FIXED, *TOKEN_IDS, *OF_THEIR_OWN, *WITHOUT_EFFECT, *LEFT_OUT}


def _unsupported(where: object, key: str, config: dict, expected: str, next_step: str) -> UserError:
    value = config.get(key)
    text = str(value)[:80]
    got = repr(text) if isinstance(value, str) else text
    return UserError("unsupported config", where=where, got=f"{key}={got}", expected=expected, next_step=next_step)
