"""Chat with a converted checkpoint through `vllm serve` and the `openai` client: gpt-oss's vocabulary, Harmony's format.

What is said is laid down by the model's weights (scripted_model.py), so an answer shows that prompt, weights, stop tokens
and parsers all work. Where vLLM forces a form (tool_choice, response_format), its grammar decides what weights leave open.
"""

import json
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import warm_vllm
from conftest import local
from documents import all_commands, all_snippets
from harmony_files import encoding
from openai import BadRequestError, OpenAI
from scripted_model import ANSWER, ARGUMENTS, EOS, FRENCH_ANSWER, THOUGHT, TOOL, write_checkpoint

from benchmarks.vllm_server import server
from gptoss_nf4.convert.plan import RequantOptions
from gptoss_nf4.flow import convert
from gptoss_nf4.storage.artifacts import Artifacts
from gptoss_nf4.storage.reading import read_json_object

pytestmark = pytest.mark.slow

DOCUMENTED_URL = "http://127.0.0.1:8000"
# What the pieces of Python in the documents print.
PRINTED = {
    "ask.py": f"{THOUGHT}\n{ANSWER}\n",
    "stream.py": f"{ANSWER}\n",
    "structured.py": "Paris\n",
    "tools.py": 'get_weather {"city": "Paris"}\n',
}
NAME, MAX_LENGTH = "my-finetune", 1024
# As docs/serving.md has them. The parser of reasoning is vLLM's choice for gpt-oss and needs no flag.
FLAGS = {"served_model_name": NAME, "enable_auto_tool_choice": True, "tool_call_parser": "openai"}
SETTINGS = {"max_model_len": MAX_LENGTH, "max_num_seqs": 4, "enforce_eager": True}
HELLO = {"role": "user", "content": "Good morning!"}
FORECAST = {"role": "user", "content": "Please tell me the forecast for Paris."}


def tool(name: str, **properties: dict) -> dict:
    """A tool whose arguments vLLM keeps to their schema: without `strict` its grammar leaves them open."""
    parameters = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    function = {"name": name, "description": "What it is like.", "parameters": parameters, "strict": True}
    return {"type": "function", "function": function}


WEATHER = tool(TOOL, city={"type": "string"})
UNITS = tool("set_units", units={"type": "string", "enum": ["metric", "imperial"]})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """The scripted model, converted by the default settings."""
    root = tmp_path_factory.mktemp("chat")
    write_checkpoint(root / "source")
    model, artifacts = local(root / "source", root / "artifacts")
    convert(model, artifacts, RequantOptions(), "float16")
    return Artifacts(root / "artifacts").checkpoint


@dataclass(frozen=True)
class Chat:
    """A server that runs."""

    url: str
    client: OpenAI

    def ask(self, *messages: dict, **options):
        return self.client.chat.completions.create(model=NAME, messages=list(messages), **{"temperature": 0} | options)


@pytest.fixture(scope="module")
def chat(checkpoint, tmp_path_factory) -> Iterator[Chat]:
    with server(checkpoint, FLAGS | SETTINGS, tmp_path_factory.mktemp("log") / "serve.log", warm_vllm.popen) as url:
        yield Chat(url, OpenAI(base_url=f"{url}/v1", api_key="none"))


def test_the_checkpoint_has_harmonys_tokenizer_and_stop_tokens(checkpoint):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for text in (
        "Good morning! Ça va? 日本語\n\n  x = 1",
        "<|start|>assistant<|channel|>final<|message|>1234567<|return|>",
    ):
        assert tokenizer(text)["input_ids"] == encoding().encode(text, allowed_special="all")
    assert len(tokenizer) == read_json_object(checkpoint / "config.json")["vocab_size"]
    assert read_json_object(checkpoint / "generation_config.json")["eos_token_id"] == EOS
    assert "<|start|>assistant" in tokenizer.apply_chat_template([HELLO], add_generation_prompt=True, tokenize=False)


def test_an_answer_and_its_reasoning(chat):
    answer = chat.ask(HELLO)
    (choice,) = answer.choices
    assert choice.message.content == ANSWER
    assert choice.message.reasoning == THOUGHT
    assert choice.finish_reason == "stop"
    assert choice.message.tool_calls in (None, [])
    assert answer.usage.completion_tokens < 40  # it ended by itself


def test_sampling_by_default_says_the_same(chat):
    """Without a temperature, as most clients ask: the script's margins leave nothing to chance."""
    answer = chat.client.chat.completions.create(model=NAME, messages=[HELLO])
    assert answer.choices[0].message.content == ANSWER


def test_a_stream(chat):
    deltas = [chunk.choices[0].delta for chunk in chat.ask(HELLO, stream=True) if chunk.choices]
    content = [delta.content for delta in deltas if delta.content]
    reasoning = [delta.reasoning for delta in deltas if getattr(delta, "reasoning", None)]
    assert "".join(content) == ANSWER
    assert "".join(reasoning) == THOUGHT
    assert len(content) > 3


def test_a_system_message_reaches_the_model(chat):
    answer = chat.ask({"role": "system", "content": "Always answer in French."}, HELLO)
    assert answer.choices[0].message.content == FRENCH_ANSWER


def test_a_conversation_of_several_turns(chat):
    answer = chat.ask(
        HELLO, {"role": "assistant", "content": ANSWER}, HELLO, {"role": "assistant", "content": ANSWER}, HELLO
    )
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].message.reasoning == THOUGHT


def test_the_model_calls_a_tool_by_itself(chat):
    """No grammar here: the weights say the whole call, with Harmony's header, and <|call|> ends it."""
    answer = chat.ask(FORECAST, tools=[WEATHER, UNITS])
    (choice,) = answer.choices
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert call.function.name == TOOL
    assert json.loads(call.function.arguments) == json.loads(ARGUMENTS)
    assert choice.message.reasoning == THOUGHT
    assert not choice.message.content


def test_a_tool_call_streamed(chat):
    calls = [
        call
        for chunk in chat.ask(FORECAST, tools=[WEATHER], stream=True)
        for choice in chunk.choices
        for call in choice.delta.tool_calls or []
    ]
    assert [call.function.name for call in calls if call.function.name] == [TOOL]
    assert json.loads("".join(call.function.arguments or "" for call in calls)) == json.loads(ARGUMENTS)


def test_a_tool_call_that_is_forced(chat):
    """The script would call the other tool. The grammar puts the name, and the schema what is in it."""
    forced = {"type": "function", "function": {"name": "set_units"}}
    answer = chat.ask(FORECAST, tools=[WEATHER, UNITS], tool_choice=forced, max_tokens=100)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "set_units"
    assert json.loads(call.function.arguments)["units"] in ("metric", "imperial")


def test_a_tool_call_that_is_required_or_ruled_out(chat):
    (call,) = chat.ask(FORECAST, tools=[UNITS], tool_choice="required", max_tokens=100).choices[0].message.tool_calls
    assert call.function.name == "set_units"
    assert not chat.ask(FORECAST, tools=[WEATHER], tool_choice="none").choices[0].message.tool_calls


def test_a_tools_result_goes_into_the_prompt(chat):
    call = {"id": "call_1", "type": "function", "function": {"name": TOOL, "arguments": ARGUMENTS}}
    answer = chat.ask(
        HELLO,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "In French: il pleut"},
        tools=[WEATHER],
    )
    assert answer.choices[0].message.content == FRENCH_ANSWER


def test_structured_output(chat):
    """The grammar leaves this script one choice, which it makes by its weights: what is shown is that the form holds."""
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    asked = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema}}
    (choice,) = chat.ask(HELLO, response_format=asked, max_tokens=100).choices
    assert json.loads(choice.message.content)["city"] in ("Paris", "Rome")
    assert choice.message.reasoning == THOUGHT


def test_a_stop_string_and_a_token_limit(chat):
    stopped = chat.ask(HELLO, stop=[" help"]).choices[0]
    assert stopped.finish_reason == "stop"
    assert "Hello! How can I" in stopped.message.content
    assert "today" not in stopped.message.content
    short = chat.ask(HELLO, max_tokens=18).choices[0]
    assert short.finish_reason == "length"
    assert ANSWER.startswith(short.message.content)


def test_a_prompt_that_is_too_long_is_refused_in_one_line(chat):
    with pytest.raises(BadRequestError, match=rf"maximum context length \({MAX_LENGTH}\)") as refused:
        chat.ask({"role": "user", "content": "word " * 3 * MAX_LENGTH})
    assert refused.value.status_code == 400
    assert chat.ask(HELLO).choices[0].message.content == ANSWER


def test_the_responses_endpoint(chat):
    answer = chat.client.responses.create(model=NAME, input=HELLO["content"], temperature=0)
    assert answer.output_text == ANSWER


def test_the_curl_commands_of_the_documents(chat):
    asked = [command for command in sorted(all_commands()) if command.startswith("curl ")]
    answers = [
        json.loads(
            subprocess.run(shlex.split(command.replace(DOCUMENTED_URL, chat.url)), check=True, capture_output=True).stdout
        )
        for command in asked
    ]
    assert len(answers) == 2
    assert {answer["object"] for answer in answers} == {"chat.completion", "list"}
    for answer in answers:
        if answer["object"] == "list":
            assert [model["id"] for model in answer["data"]] == [NAME]
        else:
            assert answer["choices"][0]["message"]["content"] == ANSWER


@pytest.mark.parametrize("name", PRINTED)
def test_the_python_of_the_documents(chat, name, capsys):
    text = all_snippets()[name]
    assert DOCUMENTED_URL in text
    exec(compile(text.replace(DOCUMENTED_URL, chat.url), name, "exec"), {})
    assert capsys.readouterr().out == PRINTED[name]


def test_every_piece_of_python_that_asks_a_server_is_run():
    assert {name for name, text in all_snippets().items() if DOCUMENTED_URL in text} == PRINTED.keys()
