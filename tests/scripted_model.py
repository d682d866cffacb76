"""A gpt-oss with gpt-oss's whole vocabulary that answers by heart: what it says is laid down by its weights.

A model of random weights says noise, of which a chat test learns nothing. This one follows a script in Harmony's format:

    <|start|>assistant<|channel|>analysis<|message|>THOUGHT<|end|>
    <|start|>assistant<|channel|>final<|message|>ANSWER<|return|>

It does so as a trained model would, with no code of its own. Each token of the script has a channel of the residual
stream, and `lm_head` maps that channel to the next token. Where the next token depends on more than the last, an attention
head looks whether some token stands before: `analysis` or `final` in the sliding window of layer 0, words of the user or of
the system message in all of the context, by layer 1. If so it adds to a channel of its own; if not, the head's sink takes
everything.

The experts and the router are the embedded model's random ones. They run, but are made small beside the script.
"""

import itertools
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from harmony_files import CALL, END_OF_TEXT, RETURN, VOCABULARY, encoding, token_id, write_tokenizer
from safetensors.torch import load_file, save_file

from gptoss_nf4.format import names
from gptoss_nf4.samples import embedded
from gptoss_nf4.storage.checkpoint import INDEX_FILE
from gptoss_nf4.storage.reading import read_json_object
from gptoss_nf4.storage.writing import write_json

DIMENSIONS = replace(embedded.TINY, heads=4, kv_heads=4, vocabulary=VOCABULARY)
EOS = [token_id(token) for token in (RETURN, END_OF_TEXT, CALL)]  # as gpt-oss's generation_config.json has them

THOUGHT = "User greets me politely."
ANSWER = "Hello! How can I help you today?"
FRENCH_ANSWER = "Bonjour! How can I help you today?"  # where the context has the word French
ARGUMENTS = '{"city":"Paris"}'  # where it has the word forecast
FRENCH, FORECAST = " French", " forecast"
TOOL = "get_weather"


@dataclass(frozen=True)
class Head:
    """An attention head that looks for a token: its layer, its number among that layer's, and the channel it adds to."""

    token: str
    layer: int
    number: int
    channel: int


# The last channels of the residual stream are the heads'.
HEADS = {
    token: Head(token, layer, number, DIMENSIONS.hidden - 1 - position)
    for position, (token, layer, number) in enumerate(  # "commentary" begins with the token "comment"
        [("analysis", 0, 0), ("final", 0, 1), ("comment", 0, 2), (FRENCH, 1, 0), (FORECAST, 1, 1)]
    )
}
# What follows a token, where only that one counts.
CHAINS = (
    "<|end|><|start|>assistant<|channel|>",
    "analysis<|message|>",
    "final<|message|>",
    f"commentary to=functions.{TOOL} <|constrain|>json<|message|>",
    f"{THOUGHT}<|end|>",
    f"{ANSWER}{RETURN}",
    f"Bonjour{ANSWER.removeprefix('Hello')}{RETURN}",
    f"{ARGUMENTS}{CALL}",
)


def _first(text: str) -> str:
    return encoding().decode([encoding().encode(text)[0]])


# What follows where it depends on what stands before: a base, and what each head adds. The largest sum wins. The bases are
# larger than what heads add, since those add everywhere.
BRANCHES: dict[str, dict[str, tuple[float, dict[str, float]]]] = {
    "<|channel|>": {
        "analysis": (30, {}),
        "final": (24, {"analysis": 10}),
        "comment": (24, {"analysis": 8, FORECAST: 4}),
    },
    "<|message|>": {
        _first(THOUGHT): (30, {}),
        _first(ANSWER): (24, {"final": 10}),
        _first(FRENCH_ANSWER): (24, {"final": 8, FRENCH: 4}),
        _first(ARGUMENTS): (24, {"comment": 10}),
    },
}
CERTAIN = 40.0  # a token that is followed by one only
LOGIT = 16.0  # of a point of the numbers above, in a normalized stream where no head has added anything
STREAM = 64.0  # of a token in its channel. Beside it, what the experts add is small.
SEEN, SINK = 8.0, 12.0  # a head's query, and its logit for "none of them"; a token that it looks for has 30 and more


def transitions() -> dict[int, int]:
    """next token by token, for those that are followed by one only. ValueError if a token of CHAINS has two."""
    known: dict[int, int] = {}
    for chain in CHAINS:
        ids = encoding().encode(chain, allowed_special="all")
        for token, following in itertools.pairwise(ids):
            if known.setdefault(token, following) != following:
                raise ValueError(f"two tokens follow {encoding().decode([token])!r} in the script")
    return known


def channels() -> dict[int, int]:
    """Channel of the residual stream by token, for those that the script follows by another or a head looks for."""
    tokens = [*transitions(), *map(token_id, BRANCHES), *map(token_id, HEADS)]
    numbered = {token: channel for channel, token in enumerate(dict.fromkeys(tokens))}
    assert len(numbered) < DIMENSIONS.hidden - len(HEADS) - 1
    return numbered


def write_checkpoint(directory: Path) -> None:
    """Write the model in the published 4-bit layout, with tokenizer and generation config. It takes about 20 seconds."""
    embedded.write_checkpoint(directory, DIMENSIONS)
    for file in sorted(directory.glob("*.safetensors")):
        tensors = load_file(file)
        _script(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
    (directory / INDEX_FILE).unlink()  # its total size is another now
    ids = {"eos_token_id": EOS[0], "pad_token_id": EOS[1]}
    write_json(directory / "config.json", read_json_object(directory / "config.json") | ids)
    write_json(directory / "generation_config.json", ids | {"eos_token_id": EOS, "do_sample": True})
    write_tokenizer(directory)


def _script(tensors: dict[str, torch.Tensor]) -> None:
    """Replace what the script needs in the tensors of one shard."""
    for layer in range(DIMENSIONS.layers):
        prefix = names.prefix(layer)
        if f"{prefix}self_attn.sinks" in tensors:
            _attention(tensors, prefix, [head for head in HEADS.values() if head.layer == layer])
            _small_experts(tensors, prefix)
    if "lm_head.weight" in tensors:
        tensors["model.embed_tokens.weight"] = _embeddings()
        tensors["lm_head.weight"] = _head()
        tensors["model.norm.weight"].fill_(1)


def _attention(tensors: dict[str, torch.Tensor], prefix: str, heads: list[Head]) -> None:
    """Heads that look for a token each, by the pair of dimensions that turns so slowly that positions do not count."""
    d, channel = DIMENSIONS, channels()
    q_width, kv_width = d.heads * d.head_dim, d.kv_heads * d.head_dim
    shapes = {"q": (q_width, d.hidden), "k": (kv_width, d.hidden), "v": (kv_width, d.hidden), "o": (d.hidden, q_width)}
    weight = {name: torch.zeros(shape) for name, shape in shapes.items()}
    bias = {name: torch.zeros(shape[0]) for name, shape in shapes.items()}
    for head in heads:
        start, read = head.number * d.head_dim, channel[token_id(head.token)]
        slowest = start + d.head_dim // 2 - 1
        bias["q"][slowest] = SEEN
        weight["k"][slowest, read] = 1
        weight["v"][start, read] = 1
        weight["o"][head.channel, start] = STREAM / math.sqrt(d.hidden)
    for name in shapes:
        module = f"{prefix}self_attn.{name}_proj"
        tensors |= embedded.quantized(f"{module}.weight", weight[name], 64)
        tensors[f"{module}.bias"] = bias[name].to(embedded.OTHER_DTYPE)
    tensors[f"{prefix}self_attn.sinks"].fill_(SINK)
    tensors[f"{prefix}input_layernorm.weight"].fill_(1)


def _small_experts(tensors: dict[str, torch.Tensor], prefix: str) -> None:
    for expert in range(DIMENSIONS.experts):
        module = f"{prefix}mlp.experts.down_projs.{expert}"
        shape = (DIMENSIONS.hidden, DIMENSIONS.intermediate)
        weight = embedded.random_tensor(f"{module}.weight", shape, std=0.1 / math.sqrt(shape[1]))
        tensors |= embedded.quantized(f"{module}.weight", weight, 64)


def _embeddings() -> torch.Tensor:
    """A token of the script stands in its channel alone. All others lie in the channels that no token has."""
    d, channel = DIMENSIONS, channels()
    free = slice(len(channel), d.hidden - len(HEADS))
    rows = torch.zeros(d.vocabulary, d.hidden)
    others = embedded.random_tensor("others", (d.vocabulary, free.stop - free.start), std=1.0)
    rows[:, free] = others / others.norm(dim=1, keepdim=True) * STREAM
    for token, number in channel.items():
        rows[token] = 0
        rows[token, number] = STREAM
    return rows.to(embedded.OTHER_DTYPE)


def _head() -> torch.Tensor:
    d, channel = DIMENSIONS, channels()
    rows = torch.zeros(d.vocabulary, d.hidden)
    for token, following in transitions().items():
        rows[following, channel[token]] = CERTAIN
    for token, branches in BRANCHES.items():
        for following, (base, added) in branches.items():
            rows[token_id(following), channel[token_id(token)]] = base
            for looked_for, points in added.items():
                rows[token_id(following), HEADS[looked_for].channel] = points
    return (rows * LOGIT / math.sqrt(d.hidden)).to(embedded.OTHER_DTYPE)
