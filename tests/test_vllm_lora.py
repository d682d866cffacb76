"""vLLM with adapters on converted checkpoints, as they were saved, against PEFT on transformers: 1e-3 in float32."""

import hashlib
import json
import os
import re
import shutil
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import warm_vllm
from adapter_makers import ATTENTION, EXPERTS, ROUTER, grouped, split, with_adapter
from conftest import converted_for_interpreter, local
from openai import OpenAI
from project_imports import ROOT
from safetensors.torch import load_file, save_file
from whole_model import log_probabilities, whole_model

from benchmarks.vllm_server import server
from gptoss_nf4.adapters.adapter import Adapter
from gptoss_nf4.check.agreement import Agreement, Generation
from gptoss_nf4.convert.plan import RequantOptions
from gptoss_nf4.errors import UserError
from gptoss_nf4.flow import convert
from gptoss_nf4.samples import embedded
from gptoss_nf4.vllm.experts import ExpertsLoRA, run_used_experts
from gptoss_nf4.vllm.lora.loading import AdapterLoader

PROMPTS = [
    "The capital of France is",
    "2 + 2 =",
    "Once upon a time, in a house by the sea, there lived an old clockmaker who",
]
ENGINE = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 8, "enforce_eager": True, "max_lora_rank": 8}
SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
NEW_TOKENS = 12


@dataclass
class Adapters:
    """Directories as saved, and for each the model that PEFT makes of it."""

    directories: dict[str, Path]
    models: dict[str, torch.nn.Module]

    def reference(self, name: str | None, tokens: list[int]) -> torch.Tensor:
        return log_probabilities(self.models[name or "base"], tokens)


def save(model: torch.nn.Module, directory: Path, seed: int, **lora) -> torch.nn.Module:
    """PEFT's adapter, with A and B so large that it shows everywhere, and so small that text stays varied."""
    peft_model = with_adapter(model, **lora)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.08)
    peft_model.save_pretrained(directory)
    return peft_model


def resave(original: Path, directory: Path, change, **fields) -> None:
    """The same adapter in another form: `change` makes its tensors, `fields` go into its configuration."""
    shutil.copytree(original, directory)
    tensors = {
        name: tensor.contiguous() for name, tensor in change(load_file(original / "adapter_model.safetensors")).items()
    }
    save_file(tensors, directory / "adapter_model.safetensors")
    config = json.loads((directory / "adapter_config.json").read_text()) | fields
    (directory / "adapter_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def adapters(tiny, tmp_path_factory) -> Adapters:
    root, experts = tmp_path_factory.mktemp("adapters"), embedded.TINY.experts
    models = {
        "base": whole_model(tiny),
        "attention": save(whole_model(tiny), root / "attention", 1, target_modules=ATTENTION, r=8),
        "all": save(
            whole_model(tiny),
            root / "all",
            2,
            target_modules=ATTENTION,
            target_parameters=EXPERTS + ROUTER,
            rank_pattern={"q_proj": 2},
            alpha_pattern={"o_proj": 3},
            use_rslora=True,
        ),
        "gate_up": save(whole_model(tiny), root / "gate_up", 3, target_parameters=EXPERTS[:1]),
    }
    marker = {"lora_B_layout": "grouped_by_expert"}
    resave(root / "all", root / "grouped", lambda tensors: grouped(tensors, experts), **marker)

    def split_with_linear_router(tensors: dict) -> dict:
        return {n.replace("mlp.router.", "mlp.router.linear."): t for n, t in split(tensors, experts).items()}

    names = [*ATTENTION, "gate_up_projs", "down_projs", "linear"]
    patterns = {"rank_pattern": {"q_proj": 2}}
    resave(root / "all", root / "split", split_with_linear_router, target_modules=names, target_parameters=None, **patterns)
    models |= {"grouped": models["all"], "split": models["all"]}
    return Adapters({name: root / name for name in models if name != "base"}, models)


def agreements(
    checkpoint: Path,
    adapters: Adapters,
    tmp_path: Path,
    names: list[str | None],
    settings: dict | None = None,
    packed: bool = False,
    prompts: list[str] = PROMPTS,
    max_tokens: int = NEW_TOKENS,
    **engine,
) -> dict[str | None, Agreement]:
    """Every prompt with every adapter, all in one batch; how far each is from PEFT."""
    requests = [[prompt, name] for prompt in prompts for name in names]
    job = {
        "checkpoint": str(checkpoint),
        "engine": ENGINE | {"max_loras": sum(name is not None for name in names)} | engine,
        "adapters": {name: str(adapters.directories[name]) for name in names if name},
        "requests": requests,
        "max_tokens": max_tokens,
        "packed": packed,
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    command = [sys.executable, ROOT / "tests" / "lora_in_vllm.py", tmp_path / "job.json"]
    environment = os.environ | SETTINGS | (settings or {})
    done = warm_vllm.run(command, cwd=ROOT, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    found: dict[str | None, Agreement] = {name: Agreement() for name in names}
    for (_, name), made in zip(requests, json.loads(line.removeprefix("RESULT ")), strict=True):
        logprobs = [{int(token): value for token, value in step.items()} for step in made["logprobs"]]
        generation = Generation("", "", made["token_ids"], 0, logprobs)
        assert generation.finite
        found[name].add(generation, adapters.reference(name, made["token_ids"]))
    return found


def require_close(found: dict[str | None, Agreement]) -> None:
    for name, agreement in found.items():
        assert agreement.positions > 100, name
        assert agreement.worst_difference < 1e-3, (name, agreement)
        assert agreement.agreeing == agreement.positions, name


@pytest.fixture(scope="module")
def float32(tiny, tmp_path_factory) -> Path:
    """With a residual_scale other than 1, which the adapters must meet."""
    model, artifacts = local(tiny, tmp_path_factory.mktemp("float32"))
    convert(model, artifacts, RequantOptions(), "float32", 2.0**-6)
    return artifacts.checkpoint


@pytest.mark.slow
def test_the_adapters_change_the_model(adapters):
    """So an adapter that is ignored would be seen."""
    tokens = [5, 80, 200, 31, 7]
    base = adapters.reference(None, tokens)
    for name in adapters.directories:
        assert (adapters.reference(name, tokens) - base).abs().max() > 0.1, name


@pytest.mark.slow
def test_every_form_beside_the_base_in_one_batch(float32, adapters, tmp_path):
    names = [None, "attention", "all", "grouped", "split", "gate_up"]
    require_close(agreements(float32, adapters, tmp_path, names))


def is_dense(key: str) -> bool:
    """Whether a parameter of PEFT's model is one that the checkpoint holds in its dtype: no 4-bit weight, no adapter's."""
    name = key.replace("base_layer.", "")
    return "lora_" not in name and not re.search(r"(gate_up_proj|down_proj|[qkvo]_proj\.weight)$", name)


@pytest.mark.slow
def test_the_float16_checkpoint_serves_the_same_adapters(tiny, adapters, tmp_path):
    """Against references whose dense tensors are rounded as the checkpoint's are; the adapters are not."""
    model, artifacts = local(tiny, tmp_path / "artifacts")
    convert(model, artifacts, RequantOptions(), "float16")
    assert json.loads((artifacts.checkpoint / "config.json").read_text())["quantization_config"]["residual_scale"] == 2**-6
    exact = {}
    for name in ("base", "all"):
        for key, parameter in adapters.models[name].named_parameters():
            if is_dense(key):
                exact[name, key] = parameter.detach().clone()
                parameter.data.copy_(parameter.data.half().float())
    try:
        require_close(agreements(artifacts.checkpoint, adapters, tmp_path, [None, "all"]))
    finally:
        for (name, key), value in exact.items():
            adapters.models[name].get_parameter(key).data.copy_(value)


@pytest.mark.slow
def test_two_ranks(float32, adapters, tmp_path):
    """Each with experts of its own. In the test below each has rows of all experts."""
    if (os.cpu_count() or 1) < 2:
        pytest.skip("needs two cores: vLLM binds one rank to each")
    settings = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    engine = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    require_close(agreements(float32, adapters, tmp_path, [None, "all", "split"], settings, **engine))


@pytest.mark.slow
def test_two_ranks_of_experts_whose_blocks_run_along_the_outputs(tiny_fused, tmp_path):
    if (os.cpu_count() or 1) < 2:
        pytest.skip("needs two cores: vLLM binds one rank to each")
    model, artifacts = local(tiny_fused, tmp_path / "artifacts")
    convert(model, artifacts, RequantOptions(), "float32", 2.0**-6)
    lora = {"target_modules": ATTENTION, "target_parameters": EXPERTS + ROUTER, "rank_pattern": {"q_proj": 2}}
    models = {
        "base": whole_model(tiny_fused),
        "all": save(whole_model(tiny_fused), tmp_path / "all", 2, **lora, use_rslora=True),
    }
    adapters = Adapters({"all": tmp_path / "all"}, models)
    settings = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    engine = {"tensor_parallel_size": 2}
    require_close(agreements(artifacts.checkpoint, adapters, tmp_path, [None, "all"], settings, **engine))


@pytest.mark.slow
def test_the_gpus_path_serves_adapters(tmp_path):
    """The kernels, in Triton's interpreter, within vLLM: prompts and decoding, base and adapters in one batch.

    Blocks of the experts run along the outputs here; the sums of adapters are the same in both directions.
    """
    artifacts = converted_for_interpreter(tmp_path / "source", tmp_path / "artifacts", stacked=True)
    source = tmp_path / "source"
    models = {
        "base": whole_model(source),
        "all": save(whole_model(source), tmp_path / "all", 1, target_modules=ATTENTION, target_parameters=EXPERTS + ROUTER),
        "attention": save(whole_model(source), tmp_path / "attention", 2, target_modules=ATTENTION, r=8),
    }
    adapters = Adapters({name: tmp_path / name for name in ("all", "attention")}, models)
    tokens = [5, 80, 200, 31, 7]
    for name in adapters.directories:
        assert (adapters.reference(name, tokens) - adapters.reference(None, tokens)).abs().max() > 1, name
    engine = {"dtype": "float16", "max_model_len": 32, "max_num_batched_tokens": 128}
    found = agreements(
        artifacts.checkpoint,
        adapters,
        tmp_path,
        [None, "all", "attention"],
        packed=True,
        prompts=["The capital", "2 + 2 ="],
        max_tokens=2,  # one step of decoding: another would start the same kernels
        **engine,
    )
    for name, agreement in found.items():
        assert agreement.positions >= 10, name
        assert agreement.worst_difference < 0.1, (name, agreement)  # in float16; without the kernels it is the same


def post(url: str, **fields) -> tuple[int, str]:
    request = urllib.request.Request(url, json.dumps(fields).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.slow
def test_a_server_loads_and_unloads_adapters_and_refuses_what_does_not_fit(float32, adapters, tmp_path, monkeypatch):
    for key, value in (SETTINGS | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}).items():
        monkeypatch.setenv(key, value)
    bad = {name: shutil.copytree(adapters.directories["all"], tmp_path / name) for name in ("no-b", "rank", "layer")}
    for name, directory in bad.items():
        tensors = load_file(directory / "adapter_model.safetensors")
        key = next(key for key in tensors if "q_proj.lora_B" in key)
        if name == "no-b":
            del tensors[key]
        elif name == "rank":
            tensors[key] = tensors[key][:, :1].contiguous()
        else:
            tensors[key.replace("layers.0.", "layers.77.").replace("layers.1.", "layers.77.")] = tensors.pop(key)
        save_file(tensors, directory / "adapter_model.safetensors")
    arguments = ENGINE | {"enable_lora": True, "max_loras": 2, "lora_modules": f"mine={adapters.directories['attention']}"}
    with server(float32, arguments, tmp_path / "serve.log", warm_vllm.popen) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none")

        def text(model: str) -> str:
            answer = client.completions.create(
                model=model, prompt=PROMPTS[0], max_tokens=16, temperature=0, extra_body={"ignore_eos": True}
            )
            return answer.choices[0].text

        first = {name: text(name) for name in (str(float32), "mine")}
        assert len(set(first.values())) == 2
        assert (
            post(f"{url}/v1/load_lora_adapter", lora_name="other", lora_path=str(adapters.directories["split"]))[0] == 200
        )
        assert text("other") not in first.values()
        assert post(f"{url}/v1/unload_lora_adapter", lora_name="other")[0] == 200
        assert "other" not in [model.id for model in client.models.list()]
        for name, said in {"no-b": "lora_A and lora_B", "rank": "wrong size", "layer": "layer"}.items():
            status, answer = post(f"{url}/v1/load_lora_adapter", lora_name=name, lora_path=str(bad[name]))
            assert status >= 400, name
            assert said in answer, answer
            assert ": got " in answer, answer
        assert {name: text(name) for name in first} == first  # nothing of it disturbed the others


def test_a_merged_adapter_is_known_by_its_digest(adapters, tmp_path):
    """So it is refused under another name and in another place."""
    directory = adapters.directories["attention"]
    digest = hashlib.sha256((directory / "adapter_model.safetensors").read_bytes()).hexdigest()
    loader = AdapterLoader(None, embedded.TINY, 1.0, {"name": "mine", "sha256": digest})
    with pytest.raises(UserError, match=r"adapter is merged already: .*got the adapter mine"):
        loader.from_local_checkpoint(
            str(shutil.copytree(directory, tmp_path / "x")), set(), None, lora_model_id=1, dtype=torch.float32
        )


@pytest.mark.slow
def test_an_adapter_is_not_applied_to_a_checkpoint_that_it_is_merged_into(tiny, adapters, tmp_path, monkeypatch):
    """Whatever it is called, and wherever it lies. Another adapter is served."""
    for key, value in (SETTINGS | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}).items():
        monkeypatch.setenv(key, value)
    model, artifacts = local(tiny, tmp_path / "artifacts")
    options = RequantOptions(mode="nf4", merge="mine")
    convert(model, artifacts, options, "float32", adapter=Adapter(adapters.directories["attention"]))
    elsewhere = shutil.copytree(adapters.directories["attention"], tmp_path / "elsewhere")
    with server(artifacts.checkpoint, ENGINE | {"enable_lora": True}, tmp_path / "serve.log", warm_vllm.popen) as url:
        status, answer = post(f"{url}/v1/load_lora_adapter", lora_name="again", lora_path=str(elsewhere))
        assert status >= 400
        assert "adapter is merged already" in answer
        assert "got the adapter mine" in answer
        other = post(f"{url}/v1/load_lora_adapter", lora_name="other", lora_path=str(adapters.directories["gate_up"]))
        assert other[0] == 200


def test_tokens_of_the_base_get_nothing_of_an_adapter():
    """Experts in plain torch: adapter -1, beside adapters, and the sum of all against the definition."""
    torch.manual_seed(0)
    experts, hidden, inner, rank = 3, 8, 6, 2
    x, ids = torch.randn(5, hidden), torch.tensor([[0, 1], [1, 2], [0, 2], [2, 1], [1, 0]])
    weights, adapters = torch.rand(5, 2), torch.tensor([-1, 0, 1, 0, -1])
    w13, w2 = torch.randn(experts, 2 * inner, hidden), torch.randn(experts, hidden, inner)
    b13, b2 = torch.randn(experts, 2 * inner), torch.randn(experts, hidden)
    a13, bb13 = torch.randn(2, experts, rank, hidden), torch.randn(2, experts, 2 * inner, rank)
    a2, bb2 = torch.randn(2, experts, rank, inner), torch.randn(2, experts, hidden, rank)
    lora = ExpertsLoRA(adapters, a13, bb13, a2, bb2, w2_scale=0.25)
    got = run_used_experts(x, weights, ids, None, lambda e: w13[e], b13, lambda e: w2[e], b2, lora)
    for token, adapter in enumerate(adapters.tolist()):
        merged13 = w13 + (bb13[adapter] @ a13[adapter] if adapter >= 0 else 0)
        merged2 = w2 + (0.25 * bb2[adapter] @ a2[adapter] if adapter >= 0 else 0)
        alone = run_used_experts(
            x[token : token + 1],
            weights[token : token + 1],
            ids[token : token + 1],
            None,
            lambda e, merged=merged13: merged[e],
            b13,
            lambda e, merged=merged2: merged[e],
            b2,
        )
        torch.testing.assert_close(got[token : token + 1], alone, rtol=1e-4, atol=1e-5)
