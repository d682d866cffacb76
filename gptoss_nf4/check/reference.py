"""The reference: transformers' gpt-oss in float32, on the source's weights as bitsandbytes dequantizes them.

The model is never whole in memory. One layer is built at a time. What it makes of every sequence is carried to the next.
So a 20b takes 4 GiB instead of 80. Each layer is a model of one layer, in which transformers makes masks, positions and
all else: none of its code is repeated here. Which weights there are is asked of its modules, not of the converter's tables.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch.nn import Identity, Linear
from torch.nn.functional import embedding, linear

from gptoss_nf4.adapters.adapter import Adapter
from gptoss_nf4.adapters.peft_form import write_peft_form
from gptoss_nf4.check.agreement import Agreement, Generation
from gptoss_nf4.check.weights import source_weight
from gptoss_nf4.errors import UserError
from gptoss_nf4.format.dimensions import Dimensions
from gptoss_nf4.source.interface import Source

if TYPE_CHECKING:
    from transformers import GptOssConfig, GptOssForCausalLM

FLOAT32_BYTES = 4
POSITIONS = 64  # whose log-probabilities are computed at once: 2 * 51 MB with a vocabulary of 201,088
ATTENTION_COPIES = 4  # of [heads, tokens, tokens] that transformers' eager attention holds at once


def agreements(
    source: Source, base: Sequence[Generation], adapter: Adapter | None = None, adapted: Sequence[Generation] = ()
) -> tuple[Agreement, Agreement]:
    """How an engine agrees with the reference: in `base`, what it generated, and in `adapted`, with `adapter` on it.

    UserError where the reference itself is not finite.
    """
    found = Agreement(), Agreement()
    tokens = [[generation.token_ids for generation in generations] for generations in (base, adapted)]
    rows = log_probabilities(source, tokens[0], adapter, tokens[1])
    for agreement, generations in zip(found, (base, adapted), strict=True):
        for generation in generations:
            agreement.add(generation, next(rows))
    return found


def log_probabilities(
    source: Source,
    sequences: Sequence[list[int]],
    adapter: Adapter | None = None,
    adapted: Sequence[list[int]] = (),
) -> Iterator[Iterator[torch.Tensor]]:
    """For each of `sequences`, then for each of `adapted`, to which `adapter` is applied: a row for each token.

    Row i, float32 [vocabulary], holds the log-probabilities of token i + 1. Rows are computed as they are asked for.
    UserError where a layer's output is not finite.
    """
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm

    hidden = _hidden_states(source, sequences, adapter, adapted)
    norm = GptOssRMSNorm(source.dimensions.hidden, _config(source).rms_norm_eps).requires_grad_(False)
    norm.weight.copy_(_float32(source, "model.norm.weight"))
    head = _float32(source, "lm_head.weight")

    def rows(states: torch.Tensor) -> Iterator[torch.Tensor]:
        for some in norm(states).split(POSITIONS):
            yield from linear(some, head).log_softmax(-1)

    yield from (rows(states) for states in hidden)


def peak_bytes(d: Dimensions, tokens: int, with_adapter: bool = False) -> int:
    """Bytes that the reference takes at its peak, beside Python with torch: a layer, or the head if that is larger.

    `tokens` are those of the longest sequence, for attention. With an adapter, PEFT holds what it adds to w13 twice.
    """
    attention = d.hidden * (2 * d.q_rows + 2 * d.kv_rows)
    w13, w2 = d.experts * 2 * d.intermediate * d.hidden, d.experts * d.intermediate * d.hidden
    layer = attention + w13 + w2 + with_adapter * 2 * w13 + ATTENTION_COPIES * d.heads * tokens**2
    return FLOAT32_BYTES * max(layer, d.vocabulary * d.hidden)


def _hidden_states(
    source: Source, sequences: Sequence[list[int]], adapter: Adapter | None, adapted: Sequence[list[int]]
) -> list[torch.Tensor]:
    """What the last layer gives for each of `sequences` and of `adapted`, before the norm: float32 [tokens, hidden]."""
    from tqdm import tqdm

    d = source.dimensions
    table = _float32(source, "model.embed_tokens.weight")
    base, changed = ([embedding(torch.tensor(ids), table) for ids in each] for each in (sequences, adapted))
    del table
    # disable=None: no bar where stderr is not a terminal.
    for layer in tqdm(range(d.layers), desc="reference", unit="layer", disable=None):
        model = _one_layer(source, layer)
        base = [_apply(model, states) for states in base]
        if adapter is not None:
            model = _merged(model, adapter, d, layer)
            changed = [_apply(model, states) for states in changed]
        del model  # before the next layer is built
        if not all(bool(states.isfinite().all()) for states in (*base, *changed)):
            raise UserError(
                "the reference is not finite",
                where=f"{source.checkpoint.directory}, layer {layer}",
                got="NaN or infinity, computed by transformers in float32",
                expected="finite hidden states",
                next_step="use another checkpoint: this one computes nothing of use in any dtype",
            )
    return [*base, *changed]


def _one_layer(source: Source, layer: int) -> "GptOssForCausalLM":
    """transformers' model with this layer alone. It takes and gives hidden states: it has no embedding, norm or head."""
    from transformers import GptOssForCausalLM
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

    config = _config(source, num_hidden_layers=1, layer_types=[_config(source).layer_types[layer]])
    with torch.device("meta"):  # nothing is allocated
        model = GptOssForCausalLM(config).eval().requires_grad_(False)
    model.model.rotary_emb, model.model.norm = GptOssRotaryEmbedding(config), Identity()
    (decoder,) = model.model.layers
    decoder.load_state_dict(dict(_weights(source, layer, decoder)), strict=True, assign=True)
    return model


def _apply(model: "GptOssForCausalLM", states: torch.Tensor) -> torch.Tensor:
    """The model of one layer on one sequence: float32 [tokens, hidden] to the same."""
    return model.model(inputs_embeds=states[None], use_cache=False).last_hidden_state[0]


def _merged(model: "GptOssForCausalLM", adapter: Adapter, d: Dimensions, layer: int) -> "GptOssForCausalLM":
    """`model`, of one layer, with the adapter's part of that layer added to its weights by PEFT, in float32."""
    from peft import PeftModel

    deltas = adapter.layer(d, layer)
    if not deltas:
        return model
    with TemporaryDirectory() as directory:
        write_peft_form(deltas, d, Path(directory))
        return PeftModel.from_pretrained(model, directory).merge_and_unload()


def _config(source: Source, **changes: object) -> "GptOssConfig":
    """The source's configuration with `changes`. It is the checked one: transformers 5 refuses what older ones wrote."""
    from transformers import GptOssConfig

    config = GptOssConfig(**source.config | changes)
    config.dtype = torch.float32
    config._attn_implementation = "eager"
    return config


def _weights(source: Source, layer: int, decoder: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight of transformers' `decoder`, one layer, by its name there, float32.

    transformers stacks experts as [experts, in, out] and calls their biases `..._proj_bias`. The source has a module for
    each: `gate_up_projs.3` is expert 3 of `gate_up_proj`.
    """
    prefix = f"model.layers.{layer}."
    for name, parameter in decoder.named_parameters():
        owner, _, kind = name.rpartition(".")
        if owner == "mlp.experts":
            stack = kind.removesuffix("_bias")
            experts = [f"{prefix}{owner}.{stack}s.{number}" for number in range(len(parameter))]
            if kind == stack:
                yield name, _stacked(source, experts, parameter.shape)
            else:
                yield name, torch.stack([_float32(source, f"{expert}.bias") for expert in experts])
        elif kind == "weight" and isinstance(decoder.get_submodule(owner), Linear):
            yield name, source_weight(source, source.module(prefix + owner, tuple(parameter.shape)))
        else:
            yield name, _float32(source, prefix + name)


def _stacked(source: Source, experts: list[str], shape: torch.Size) -> torch.Tensor:
    """The weights of `experts`, stacked to `shape`, [experts, in, out]. The memory is that of the stack and one expert."""
    _, columns, rows = shape
    stack = torch.empty(shape)
    for number, expert in enumerate(experts):
        weight = source_weight(source, source.module(expert, (rows, columns)))
        stack[number] = weight.T.contiguous()  # transposed first: copying columns into rows takes three times as long
    return stack


def _float32(source: Source, name: str) -> torch.Tensor:
    """A tensor of the source that is not 4-bit, float32. It is read in pieces, so its own dtype takes no memory."""
    floating = source.floating(name)
    whole = torch.empty(floating.shape)
    flat, start = whole.view(-1), 0
    for piece in floating.read():
        flat[start : start + len(piece)] = piece
        start += len(piece)
    return whole
