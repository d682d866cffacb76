"""gpt-oss's own vocabulary and Harmony tokens, as files of a tokenizer.

The bytes come from the package oss-harmony, which vLLM brings and which carries the vocabulary: nothing is downloaded.
"""

import base64
import functools
from pathlib import Path
from unittest import mock

from openai_harmony import HarmonyEncoding, HarmonyEncodingName, load_harmony_encoding

from gptoss_nf4.storage.writing import write_json, write_text

VOCABULARY = 201_088  # 199,998 tokens of text, then the special ones
RETURN, CALL, END_OF_TEXT, START_OF_TEXT = "<|return|>", "<|call|>", "<|endoftext|>", "<|startoftext|>"
# For readers that render a template. vLLM writes gpt-oss's prompts by openai-harmony, without one.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|start|>{{ message.role }}{% if message.role == "assistant" %}<|channel|>final{% endif %}<|message|>
{{- message.content }}<|end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}
"""


@functools.cache
def encoding() -> HarmonyEncoding:
    return load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)


def token_id(text: str) -> int:
    """The one token that `text` is."""
    (number,) = encoding().encode(text, allowed_special="all")
    return number


def write_tokenizer(directory: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template into `directory`."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    vocabulary = _vocabulary()
    ranks = directory / "ranks.tiktoken"
    lines = (base64.b64encode(token) + b" %d" % rank for token, rank in vocabulary["mergeable_ranks"].items())
    ranks.write_bytes(b"\n".join(lines))
    # 200018 has two names, <|endofprompt|> and a reserved one, which sorts first and is replaced.
    by_name = sorted(vocabulary["special_tokens"].items(), key=lambda item: ("reserved" not in item[0], item[0]))
    special = dict(sorted({number: name for name, number in by_name}.items()))
    converted = TikTokenConverter(
        str(ranks), vocabulary["pat_str"], extra_special_tokens=list(special.values())
    ).converted()
    ranks.unlink()
    write_text(directory / "tokenizer.json", converted.to_str(pretty=False))
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": START_OF_TEXT,
            "eos_token": RETURN,
            "pad_token": END_OF_TEXT,
            "model_max_length": 131072,
        },
    )
    write_text(directory / "chat_template.jinja", CHAT_TEMPLATE)


def _vocabulary() -> dict:
    """tiktoken's description of o200k_harmony: pattern, ranks and special tokens. It would download the ranks."""
    from tiktoken_ext import openai_public

    with mock.patch.object(openai_public, "load_tiktoken_bpe", return_value=_ranks()):
        return openai_public.o200k_harmony()


def _ranks() -> dict[bytes, int]:
    inner = encoding()._inner
    first_special = min(token_id(text) for text in (START_OF_TEXT, END_OF_TEXT))
    return {inner.decode_bytes([number]): number for number in range(first_special)}
