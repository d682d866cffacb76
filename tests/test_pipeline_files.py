"""dvc.yaml, params.yaml and conf/ agree with each other and with the code."""

import json
import runpy
import subprocess
import sys
from concurrent.futures import Future

import pytest
import yaml
from project_imports import ROOT, direct_imports, project_files

PLUGIN = "gptoss_nf4/vllm"
STAGES = ("fetch", "code", "normalize", "assemble", "prove", "smoke", "benchmark")
LAYER_STAGES = ("dequant", "requant")
sys.path.insert(0, str(ROOT / "stages"))


def test_params_yaml_is_what_conf_composes():
    from configure import composed
    from omegaconf import OmegaConf

    current = OmegaConf.to_container(composed([]))
    stored = yaml.safe_load((ROOT / "params.yaml").read_text())
    assert stored == current, "params.yaml is stale: run `python stages/configure.py`"


@pytest.mark.parametrize(
    "model", ["tiny", "tiny_massive", "gpt_oss_20b", "gpt_oss_120b", "synthetic_20b", "synthetic_120b"]
)
@pytest.mark.parametrize("engine", ["cpu", "gpu"])
def test_every_model_and_engine_composes(model, engine):
    from configure import composed

    cfg = composed([f"model={model}", f"engine={engine}"])
    assert cfg.model.name == model
    assert len(cfg.model.layers) == {"tiny": 2, "massive": 3, "20b": 24, "120b": 36}[model.rsplit("_", 1)[-1]]


def test_a_local_model_takes_name_and_layers_from_its_directory(tiny):
    from configure import composed

    cfg = composed(["model=local", f"model.path={tiny}"])
    assert cfg.model.name == "source"
    assert cfg.model.layers == [0, 1]
    assert composed(["model=local", f"model.path={tiny}", "model.name=mine"]).model.name == "mine"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_every_project_file_that_it_imports(stage):
    """A missing one is DVC's worst failure: a stale result that says it is up to date."""
    definition = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"][stage]
    dependencies = definition.get("do", definition)["deps"]
    declared = {dep for dep in dependencies if dep.endswith(".py")}
    needed = project_files(ROOT / f"stages/{stage}.py")
    if stage == "code":  # it stands for these
        needed = needed.union(*(project_files(ROOT / f"stages/{each}.py") for each in LAYER_STAGES))
    if stage in ("smoke", "benchmark"):  # these run the whole plugin, which vLLM loads by its entry point
        assert PLUGIN in dependencies
        needed = {file for file in needed if not file.startswith(f"{PLUGIN}/")}
    assert declared == needed


@pytest.mark.parametrize("stage", LAYER_STAGES)
def test_the_layers_stages_depend_on_their_code(stage):
    definition = yaml.safe_load((ROOT / "dvc.yaml").read_text())
    (out,) = definition["stages"]["code"]["outs"]
    assert out in definition["stages"][stage]["do"]["deps"]


def test_the_library_imports_neither_dvc_nor_hydra_nor_vllm():
    for file in (ROOT / "gptoss_nf4").glob("*.py"):
        roots = {name.split(".")[0] for name in direct_imports(file)}
        assert not roots & {"dvc", "hydra", "omegaconf", "vllm"}, file
        assert not any(name.startswith("gptoss_nf4.vllm") for name in direct_imports(file)), file


def test_mode_exact_imports_no_torch_per_layer():
    """73 stages that import torch would cost minutes."""
    code = "import sys, gptoss_nf4.convert.layers, gptoss_nf4.fetch.fetch; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", "import json; " + code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not {"torch", "bitsandbytes", "vllm"} & set(json.loads(done.stdout))


@pytest.mark.parametrize("failing", [None, "requant@1", "dequant@0"])
def test_files_are_recorded_when_nothing_reads_them_any_more(monkeypatch, failing):
    """`dvc commit` takes a file away for a moment: that of a requant's input, once, while it was read."""
    parallel = runpy.run_path(str(ROOT / "stages/parallel.py"))
    events = []

    class Scripts:
        def __init__(self, workers):
            self.failed = False

        def start(self, stage):
            future = Future()
            self.failed |= stage == failing
            events.append(stage)
            future.set_result(not self.failed)
            return future

    scope = parallel["run_stages"].__globals__
    monkeypatch.setitem(scope, "Scripts", Scripts)
    monkeypatch.setitem(scope, "dvc", lambda *arguments: events.append(" ".join(arguments)))
    changed = {"dequant@0", "dequant@1", "requant@1", "normalize"}
    kinds = parallel["kinds_of_stages"]([0, 1, 2], changed)
    started = ["dequant@0", "dequant@1", "requant@0", "requant@1", "normalize"]
    assert [stage for stages in kinds.values() for stage in stages] == started
    if failing is None:
        parallel["run_stages"](kinds, 2)
        commits = ["commit --quiet --force dequant requant", "commit --quiet --force normalize"]
        assert events == [*started, *commits]
        return
    with pytest.raises(SystemExit, match="a stage failed"):
        parallel["run_stages"](kinds, 2)
    done = "dequant requant@0" if failing == "requant@1" else ""
    assert events == [*started, *([f"commit --quiet --force {done}"] if done else [])]
