"""The files beside the weights: tokenizer, chat templates and generation config, as transformers would load them.

The result gets the same files, so what the source loads, the result loads. They are always the same number, since dvc.yaml
names them: where the source has none, an empty object, which transformers takes for no file. All chat templates go into
tokenizer_config.json, where transformers reads them too. From transformers 5.19, `tokenization_utils_base.py`.
"""

from pathlib import Path
from typing import Any

from gptoss_nf4.errors import UserError, first_line
from gptoss_nf4.storage.reading import read_bytes, read_json_object, read_text

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
# Read by transformers unless tokenizer_config.json has added_tokens_decoder. The first wins over tokenizer_config.json.
SPECIAL_TOKENS, ADDED_TOKENS = "special_tokens_map.json", "added_tokens.json"
GENERATION_CONFIG = "generation_config.json"
TEMPLATE = "chat_template.jinja"
PROCESSOR_TEMPLATE = "chat_template.json"
TEMPLATE_DIRECTORY = "additional_chat_templates"
_OBJECTS = ("config.json", TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS, ADDED_TOKENS, GENERATION_CONFIG)
TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
TOOL_CALL_END = "<|call|>"  # of Harmony, gpt-oss's format of chat; vLLM stops at what generation_config.json names
# Keys that are not taken over: the result runs no code of the source's.
CODE = ("auto_map", "custom_pipelines")


def side_files(directory: Path) -> list[Path]:
    """Those that are there, config.json among them."""
    return [*(file for name in _OBJECTS if (file := directory / name).is_file()), *template_files(directory)]


def template_files(directory: Path) -> list[Path]:
    """The chat templates that are files: transformers prefers them to those in tokenizer_config.json. The default first."""
    default = directory / TEMPLATE
    return [*([default] if default.is_file() else []), *sorted((directory / TEMPLATE_DIRECTORY).glob("*.jinja"))]


def require_side_files(directory: Path) -> None:
    """Check that there is a tokenizer and that every side file can be read. UserError for the first fault."""
    if not (directory / TOKENIZER).is_file():
        raise UserError(
            "missing file",
            where=directory,
            got=f"no {TOKENIZER}",
            expected="the tokenizer beside the weights",
            next_step="save it there with tokenizer.save_pretrained, or copy the base model's tokenizer files",
        )
    for file in side_files(directory):
        _ = read_json_object(file) if file.suffix == ".json" else read_text(file)
    for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS):
        _require_tokens(_object(directory, name), directory / name)
    _require_tokenizer(directory / TOKENIZER)


def _require_tokens(fields: dict, where: Path) -> None:
    """UserError for a special token that transformers does not take."""
    for key in TOKENS:
        if not isinstance(fields.get(key), str | dict | None):
            raise UserError(
                "bad special token",
                where=where,
                got=f"{key}={str(fields[key])[:80]}",
                expected="a text, or an object with its content",
                next_step="write the one token there, or remove the key",
            )


def _require_tokenizer(file: Path) -> None:
    """UserError where the library that transformers and vLLM use cannot load `file`."""
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(file))
    except Exception as error:  # it raises no other type
        raise UserError(
            "no tokenizer",
            where=file,
            got=first_line(error),
            expected="a file that the library tokenizers loads",
            next_step="copy the base model's tokenizer files, or save it with tokenizer.save_pretrained",
        ) from None


def unread(directory: Path) -> list[str]:
    """What is there and does not count, or is missing and would, a line each."""
    lines = []
    if (directory / PROCESSOR_TEMPLATE).exists():
        lines.append(
            f"{PROCESSOR_TEMPLATE} is not carried: transformers reads it with a processor, not with this tokenizer"
        )
    if (call := _end_of_tool_call(directory)) is not None and call not in _stop_ids(directory):
        lines.append(
            f"{GENERATION_CONFIG} does not stop at {TOOL_CALL_END}: vLLM will generate on behind a tool call; "
            f"add {call} to its eos_token_id"
        )
    return lines


def _end_of_tool_call(directory: Path) -> int | None:
    """The id of TOOL_CALL_END. None for a tokenizer that has no such token, or no whole number for it."""
    added = _object(directory, TOKENIZER).get("added_tokens")
    tokens = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    ids = [token.get("id") for token in tokens if token.get("content") == TOOL_CALL_END]
    return next((number for number in ids if isinstance(number, int)), None)


def _stop_ids(directory: Path) -> list:
    stop = generation_config(directory).get("eos_token_id")
    return stop if isinstance(stop, list) else [stop]


def tokenizer_files(directory: Path) -> dict[str, bytes | dict]:
    """The result's tokenizer files by name: bytes, or an object to be written as JSON."""
    config = _without_code(_object(directory, TOKENIZER_CONFIG))
    if (templates := _templates(directory)) is not None:
        config["chat_template"] = templates
    config = {key: _as_token(value) if key.endswith("_token") else _as_tokens(value) for key, value in config.items()}
    return {
        TOKENIZER: read_bytes(directory / TOKENIZER),
        TOKENIZER_CONFIG: config,
        SPECIAL_TOKENS: {key: _as_tokens(value) for key, value in _object(directory, SPECIAL_TOKENS).items()},
        ADDED_TOKENS: _object(directory, ADDED_TOKENS),
    }


def generation_config(directory: Path) -> dict:
    """generation_config.json. Where there is none, the special token ids of config.json, as transformers takes them."""
    if (directory / GENERATION_CONFIG).is_file():
        return _without_code(_object(directory, GENERATION_CONFIG))
    config = _object(directory, "config.json")
    return {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None}


def _object(directory: Path, name: str) -> dict:
    file = directory / name
    return read_json_object(file) if file.is_file() else {}


def _without_code(fields: dict) -> dict:
    return {key: value for key, value in fields.items() if key not in CODE}


def _templates(directory: Path) -> str | list[dict[str, str]] | None:
    """What `template_files` hold. They win over those in tokenizer_config.json, all of them. None without files.

    One alone that is the default is a string; else each has its name.
    """
    default = directory / TEMPLATE
    files = {"default" if f == default else f.name.removesuffix(".jinja"): f for f in template_files(directory)}
    if list(files) == ["default"]:
        return read_text(files["default"])
    return [{"name": name, "template": read_text(file)} for name, file in files.items()] or None


def _as_token(value: Any) -> Any:
    """A token that is written as an object, marked as transformers 5 asks for: without the mark it ends in a TypeError."""
    return value | {"__type": "AddedToken"} if isinstance(value, dict) and "content" in value else value


def _as_tokens(value: Any) -> Any:
    return [_as_token(each) for each in value] if isinstance(value, list) else value
