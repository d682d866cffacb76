"""Tokenizer, chat templates and generation config: what transformers loads of the source, it loads of the result."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import local
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from gptoss_nf4.convert.assemble import assemble
from gptoss_nf4.convert.plan import RequantOptions
from gptoss_nf4.errors import UserError
from gptoss_nf4.fetch.fetch import fetch
from gptoss_nf4.flow import convert
from gptoss_nf4.samples import embedded
from gptoss_nf4.source.model import open_source
from gptoss_nf4.source.side_files import template_files
from gptoss_nf4.storage.artifacts import Artifacts
from gptoss_nf4.storage.writing import write_json

TEXT = "gate <|start|>user<|message|>up<|end|> <|new|> down <|return|>"
RETURN, END, NEW = "<|return|>", "<|end|>", "<|new|>"


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory) -> Artifacts:
    """A conversion of the embedded model, whose weights the tests below reuse."""
    artifacts = Artifacts(tmp_path_factory.mktemp("finished") / "artifacts")
    convert(local(tiny, artifacts.root)[0], artifacts, RequantOptions(), "float16")
    return artifacts


def assembled(source: Path, finished: Artifacts, root: Path) -> Path:
    """Stages fetch and assemble on `source`, whose weights are those of the embedded model."""
    shutil.copytree(finished.root, root)
    model, artifacts = local(source, root)
    artifacts.origin.unlink()  # they are this source's now
    artifacts.manifest.unlink()
    fetch(model, artifacts)
    assemble(open_source(model, artifacts), artifacts, RequantOptions(), "float16")
    return artifacts.checkpoint


def about(directory: Path) -> dict:
    """All that is asked of a loaded tokenizer."""
    loaded = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    return {
        "class": type(loaded).__name__,
        "ids": loaded(TEXT).input_ids,
        "vocabulary": loaded.get_vocab(),
        "special": {
            key: (str(value), loaded.convert_tokens_to_ids(str(value))) for key, value in loaded.special_tokens_map.items()
        },
        "all special": loaded.all_special_tokens,
        "added": {number: token.__getstate__() for number, token in loaded.added_tokens_decoder.items()},
        "without special": loaded.decode(loaded(TEXT).input_ids, skip_special_tokens=True),
        "templates": loaded.chat_template,
        "longest": loaded.model_max_length,
    }


def token(content: str, **fields) -> dict:
    return {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, **fields}


def put(directory: Path, name: str, value: object) -> None:
    if value is None:
        (directory / name).unlink(missing_ok=True)
        return
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / name).write_text(value if isinstance(value, str) else json.dumps(value))


BARE = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 4096}
NAMED = [{"name": "default", "template": "{{ 1 }}"}, {"name": "tool_use", "template": "{{ 2 }}"}]
CASES: dict[str, dict[str, object]] = {
    "as saved": {},
    "special tokens as dicts in their own file": {
        "tokenizer_config.json": BARE,
        "special_tokens_map.json": {"eos_token": token(RETURN), "pad_token": token(END), "bos_token": "<|startoftext|>"},
    },
    "the file of special tokens wins": {"special_tokens_map.json": {"eos_token": token(END)}},
    "additional special tokens": {
        "special_tokens_map.json": {"eos_token": RETURN, "additional_special_tokens": [NEW, "<|other|>"]},
    },
    "special tokens as dicts with their type": {
        "tokenizer_config.json": BARE | {"eos_token": token(RETURN, __type="AddedToken")}
    },
    "added_tokens.json": {"added_tokens.json": {NEW: 262, "<|other|>": 263}},
    "added tokens in the configuration": {
        "tokenizer_config.json": BARE
        | {
            "eos_token": RETURN,
            "added_tokens_decoder": {"262": token(NEW, special=True), "258": token(RETURN, special=True)},
        },
        "added_tokens.json": {"<|not read|>": 270},
        "special_tokens_map.json": {"eos_token": END},
    },
    "no configuration": {"tokenizer_config.json": None},
    "no template": {"chat_template.jinja": None},
    "a template in the configuration": {
        "chat_template.jinja": None,
        "tokenizer_config.json": BARE | {"chat_template": "{{ 3 }}"},
    },
    "an empty template wins too": {
        "chat_template.jinja": "",
        "tokenizer_config.json": BARE | {"chat_template": "{{ 3 }}"},
    },
    "a template from Windows": {"chat_template.jinja": "{{ 1 }}\r\n{%- if x -%}\r\n{%- endif %}"},
    "the template's file wins": {"tokenizer_config.json": BARE | {"chat_template": "{{ 3 }}"}},
    "a list of named templates": {
        "chat_template.jinja": None,
        "tokenizer_config.json": BARE | {"chat_template": NAMED},
    },
    "named templates as files": {
        "additional_chat_templates/tool_use.jinja": "{{ 2 }}",
        "additional_chat_templates/rag.jinja": "{{ 4 }}",
    },
    "named templates without a default": {
        "chat_template.jinja": None,
        "additional_chat_templates/tool_use.jinja": "{{ 2 }}",
        "tokenizer_config.json": BARE | {"chat_template": "{{ 3 }}"},
    },
    "files win over a list": {
        "additional_chat_templates/rag.jinja": "{{ 4 }}",
        "tokenizer_config.json": BARE | {"chat_template": NAMED},
    },
    "a processor's template": {"chat_template.jinja": None, "chat_template.json": {"chat_template": "{{ 5 }}"}},
}


@pytest.mark.parametrize("case", CASES)
def test_the_result_loads_the_tokenizer_of_the_source(source_copy, finished, tmp_path, case):
    for name, value in CASES[case].items():
        put(source_copy, name, value)
    result = assembled(source_copy, finished, tmp_path / "artifacts")
    assert about(result) == about(source_copy)


def test_a_template_of_an_older_conversion_does_not_stay(source_copy, finished, tmp_path):
    """transformers would prefer it. Older versions wrote one that refuses every chat."""
    for name in ("chat_template.jinja", "additional_chat_templates/rag.jinja"):
        put(finished.checkpoint, name, "{{ raise_exception('old') }}")
    result = assembled(source_copy, finished, tmp_path / "artifacts")
    for name in ("chat_template.jinja", "additional_chat_templates/rag.jinja"):
        (finished.checkpoint / name).unlink()
    assert about(result) == about(source_copy)


def test_templates_come_in_the_order_of_their_names_after_the_default(tmp_path):
    names = [f"{letter}.jinja" for letter in "zyxwvutsab"]
    for name in names:
        put(tmp_path, f"additional_chat_templates/{name}", "x")
    put(tmp_path, "chat_template.jinja", "x")
    assert [file.name for file in template_files(tmp_path)] == ["chat_template.jinja", *sorted(names)]


def test_the_cases_differ(source_copy):
    """So the test above compares what they change."""
    plain, different = about(source_copy), 0
    for case, files in CASES.items():
        directory = source_copy.with_name(case.replace(" ", "-"))
        shutil.copytree(source_copy, directory)
        for name, value in files.items():
            put(directory, name, value)
        different += about(directory) != plain
    assert different == len(CASES) - 1


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("tokenizer_config.json", BARE | {"eos_token": token(RETURN)}),
        ("special_tokens_map.json", {"additional_special_tokens": [token(NEW)], "eos_token": RETURN}),
    ],
)
def test_tokens_as_dicts_without_their_type_are_loaded_too(source_copy, finished, tmp_path, name, fields):
    """transformers 5 ends in a TypeError for these, 4 loaded them."""
    put(source_copy, name, fields)
    with pytest.raises(TypeError):
        about(source_copy)
    loaded = about(assembled(source_copy, finished, tmp_path / "artifacts"))
    assert loaded["special"]["eos_token"] == (RETURN, 256 + embedded.SPECIAL_TOKENS.index(RETURN))
    assert (NEW in loaded["vocabulary"]) == (name == "special_tokens_map.json")


def test_the_result_runs_no_code_and_asks_for_none(source_copy, finished, tmp_path):
    config = json.loads((source_copy / "tokenizer_config.json").read_text())
    put(source_copy, "tokenizer_config.json", config | {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}})
    put(source_copy, "generation_config.json", {"eos_token_id": 258, "custom_pipelines": {"x": {"impl": "evil.X"}}})
    result = assembled(source_copy, finished, tmp_path / "artifacts")
    assert not [file.name for file in result.glob("*.json") if "evil" in file.read_text()]


@pytest.mark.parametrize("fields", [{"eos_token_id": [258, 261], "temperature": 0.3, "do_sample": True}, None])
def test_the_result_loads_the_generation_config_of_the_source(source_copy, finished, tmp_path, fields):
    put(source_copy, "generation_config.json", fields)
    config = json.loads((source_copy / "config.json").read_text())
    ids = {"bos_token_id": 256, "eos_token_id": [258, 261], "pad_token_id": None}
    put(source_copy, "config.json", config | ids)
    result = assembled(source_copy, finished, tmp_path / "artifacts")
    loaded = GenerationConfig.from_pretrained(str(result)).to_dict()
    if fields is None:  # transformers takes it from config.json then
        expected = GenerationConfig.from_model_config(AutoConfig.from_pretrained(source_copy)).to_dict()
        assert [expected[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [256, [258, 261], None]
        assert {key: loaded[key] for key in loaded if key.endswith("_token_id")} == {
            key: expected[key] for key in loaded if key.endswith("_token_id")
        }
    else:
        assert {key: loaded[key] for key in fields} == fields


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("tokenizer.json", None, "tokenizer.save_pretrained"),
        ("tokenizer.json", "{", "not JSON"),
        ("tokenizer.json", "{}", "no tokenizer"),
        ("tokenizer.json", '{"model": {"type": "X"}}', "no tokenizer"),
        ("tokenizer_config.json", "[]", "not a JSON object"),
        ("tokenizer_config.json", "\ufeff{}", "without a byte order mark"),
        ("tokenizer_config.json", '{"pad_token": 257}', "bad special token.*pad_token=257"),
        ("special_tokens_map.json", '{"eos_token": ["<|return|>"]}', "bad special token.*eos_token"),
        ("special_tokens_map.json", "{", "not JSON"),
        ("added_tokens.json", "[]", "not a JSON object"),
        ("generation_config.json", "", "not JSON"),
        ("additional_chat_templates/x.jinja", "\udcff", "not text"),
    ],
)
def test_what_is_missing_or_damaged_is_told_before_the_first_layer(source_copy, tmp_path, name, content, told):
    if content is None:
        (source_copy / name).unlink()
    else:
        (source_copy / name).parent.mkdir(exist_ok=True)
        (source_copy / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=told):
        fetch(*local(source_copy, tmp_path / "artifacts"))
    assert not (tmp_path / "artifacts").exists()


def test_a_template_that_transformers_would_not_load_is_told(source_copy, tmp_path):
    put(source_copy, "chat_template.json", {"chat_template": "{{ 5 }}"})
    assert any("chat_template.json" in note for note in fetch(*local(source_copy, tmp_path / "artifacts"))["notes"])


def test_a_template_that_is_a_link_out_of_the_directory_is_refused(source_copy, tmp_path):
    (tmp_path / "secret.jinja").write_text("secret")
    (source_copy / "additional_chat_templates").mkdir()
    (source_copy / "additional_chat_templates/x.jinja").symlink_to(tmp_path / "secret.jinja")
    with pytest.raises(UserError, match="link out of the checkpoint"):
        fetch(*local(source_copy, tmp_path / "artifacts"))


CALL = 256 + len(embedded.SPECIAL_TOKENS)  # the next free id


@pytest.mark.parametrize(("stop", "notes"), [(None, 1), (256, 1), ([256, 257], 1), ([256, CALL], 0)])
def test_a_generation_config_that_does_not_stop_at_a_tool_call_is_told(source_copy, tmp_path, stop, notes):
    """vLLM stops at the tokens of generation_config.json, and has no list of Harmony's of its own."""
    tokenizer = json.loads((source_copy / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][-1] | {"id": CALL, "content": "<|call|>"})
    write_json(source_copy / "tokenizer.json", tokenizer)
    (source_copy / "generation_config.json").unlink()
    if stop is not None:
        write_json(source_copy / "generation_config.json", {"eos_token_id": stop})
    said: list[str] = []
    manifest = fetch(*local(source_copy, tmp_path / "artifacts"), say=said.append)
    told = [line for line in said if f"add {CALL} to its eos_token_id" in line]
    assert len(told) == notes
    assert told == [line for line in manifest["notes"] if "<|call|>" in line]


@pytest.mark.parametrize("lost", ["nothing", "added_tokens"])
def test_a_tokenizer_without_tool_calls_needs_no_stop_token_of_theirs(source_copy, tmp_path, lost):
    tokenizer = json.loads((source_copy / "tokenizer.json").read_text())
    tokenizer.pop(lost, None)
    write_json(source_copy / "tokenizer.json", tokenizer)
    said: list[str] = []
    fetch(*local(source_copy, tmp_path / "artifacts"), say=said.append)
    assert not [line for line in said if "<|call|>" in line]
