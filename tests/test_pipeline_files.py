"""dvc.yaml, params.yaml and conf/ agree with each other and with the code."""

import ast
import contextlib
import json
import runpy
import subprocess
import sys
from concurrent.futures import Future

import pytest
import yaml
from project_imports import ROOT, project_files

from gptoss_nf4.errors import UserError

STAGES = (
    "fetch",
    "dequant",
    "requant",
    "normalize",
    "assemble",
    "prove",
    "smoke",
    "adapter",
    "smoke-adapter",
    "benchmark",
    "card",
    "report",
)
# These compute with packages whose versions may matter; the others write texts of what they found.
COMPUTING = set(STAGES) - {"assemble", "card", "report"}
sys.path.insert(0, str(ROOT / "stages"))


def test_params_yaml_is_what_conf_composes():
    from configure import composed
    from omegaconf import OmegaConf

    current = OmegaConf.to_container(composed([]))
    stored = yaml.safe_load((ROOT / "params.yaml").read_text())
    assert stored == current, "params.yaml is stale: run `python stages/configure.py`"


LAYERS = {
    "tiny": 2,
    "tiny_massive": 3,
    "tiny_fused": 2,
    "gpt_oss_20b": 24,
    "gpt_oss_120b": 36,
    "synthetic_20b": 24,
    "synthetic_20b_fused": 24,
    "synthetic_120b": 36,
}


@pytest.mark.parametrize("model", LAYERS)
@pytest.mark.parametrize("engine", ["cpu", "gpu"])
def test_every_model_and_engine_composes(model, engine):
    from configure import composed

    cfg = composed([f"model={model}", f"engine={engine}"])
    assert cfg.model.name == model
    assert len(cfg.model.layers) == LAYERS[model]
    assert {path.stem for path in (ROOT / "conf/model").glob("*.yaml")} == {*LAYERS, "local", "hub"}


def experiment(directory, params, *overrides):
    """What `dvc exp run -S ...` composes in a directory whose params.yaml holds `params`: as dvc/utils/hydra.py does."""
    script = """
import sys
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
with initialize_config_dir(sys.argv[1], version_base=None):
    cfg = compose("experiment", overrides=sys.argv[2:])
OmegaConf.resolve(cfg)
print(OmegaConf.to_yaml(cfg))
"""
    (directory / "params.yaml").write_text(yaml.safe_dump(params))
    command = [sys.executable, "-W", "ignore", "-c", script, str(ROOT / "conf"), *overrides]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    return yaml.safe_load(done.stdout) if done.returncode == 0 else done.stderr


def test_an_experiment_starts_from_the_chosen_settings(tiny, tmp_path):
    from configure import composed
    from omegaconf import OmegaConf

    chosen = OmegaConf.to_container(composed(["model=local", f"model.path={tiny}", "smoke.max_tokens=7"]))
    assert experiment(tmp_path, chosen) == chosen
    changed = experiment(tmp_path, chosen, "dtype=bfloat16", "requant.mode=nf4")
    assert changed == chosen | {"dtype": "bfloat16", "requant": chosen["requant"] | {"mode": "nf4"}}
    other = experiment(tmp_path, chosen, "model=tiny_massive", "engine=gpu")
    expected = OmegaConf.to_container(composed(["model=tiny_massive", "engine=gpu", "smoke.max_tokens=7"]))
    assert {key: other["model"][key] for key in expected["model"]} == expected["model"]
    assert other["engine"]["name"] == "gpu"
    assert other["smoke"]["max_tokens"] == 7
    assert "Could not override 'dtpye'" in experiment(tmp_path, chosen, "dtpye=bfloat16")


def test_dvc_composes_experiments():
    from configparser import ConfigParser

    config = ConfigParser()
    config.read(ROOT / ".dvc/config")
    assert dict(config["hydra"]) == {"enabled": "true", "config_name": "experiment"}
    assert (ROOT / "conf/experiment.yaml").exists()


def test_every_plot_has_a_directory_that_git_keeps_and_a_template_that_is_there():
    """DVC says that it failed to load a plot whose file is not made yet, and nothing of an empty directory."""
    plots = yaml.safe_load((ROOT / "dvc.yaml").read_text())["plots"]
    tracked = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True).split()
    for plot in plots:
        ((directory, properties),) = plot.items()
        assert f"{directory}/.gitignore" in tracked
        template = properties.get("template")
        assert template is None or (ROOT / f".dvc/plots/{template}.json").exists()


@pytest.mark.parametrize(("model", "key"), [("local", "path"), ("hub", "repository")])
def test_a_model_without_its_place_is_refused(model, key):
    from configure import composed

    with pytest.raises(UserError, match=rf"model\.{key}: got nothing.*model={model} model\.{key}="):
        composed([f"model={model}"])


def test_a_local_model_takes_name_and_layers_from_its_directory(tiny):
    from configure import composed

    cfg = composed(["model=local", f"model.path={tiny}"])
    assert cfg.model.name == "source"
    assert cfg.model.layers == [0, 1]
    assert composed(["model=local", f"model.path={tiny}", "model.name=mine"]).model.name == "mine"


def test_adapters_are_directories_or_repositories(tmp_path):
    """Whatever a path contains: Hydra's grammar is quoted, as in a shell."""
    from configure import composed

    directory = tmp_path / "my lora, 1=2 [é]"
    directory.mkdir()
    cfg = composed(["model=gpt_oss_20b", f"adapters={{mine: '{directory}', theirs: someone/their-lora}}"])
    assert cfg.model.name == "gpt_oss_20b"
    assert cfg.adapters.mine.path == cfg.adapters.mine.defined_by == str(directory)
    assert (cfg.adapters.theirs.repository, cfg.adapters.theirs.path) == ("someone/their-lora", None)
    strict = composed([f"adapters={{mine: {{path: '{directory}', any_base: true}}}}"])
    assert strict.adapters.mine.any_base is True


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ("mine: /nowhere/at/all", "no such directory"),
        ("../up: someone/lora", "letters, digits"),
        ("mine: {path: /tmp, repository: a/b}", "a directory or a Hub repository"),
        ("mine: {path: /tmp, rank: 3}", "a directory or a Hub repository"),
        ("mine: 7", "a directory or a Hub repository"),
    ],
)
def test_bad_adapters_are_refused_at_once(entry, named):
    from configure import adapter_entry
    from omegaconf import OmegaConf

    ((name, given),) = OmegaConf.create(f"{{{entry}}}").items()
    with pytest.raises(UserError, match=named):
        adapter_entry(name, given)


def adapter_directory(directory, base=None, name="checkpoint-500"):
    path = directory / "run" / name
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    return path


def test_an_adapter_as_a_model_finds_its_base(tiny, tmp_path, capsys):
    from configure import composed

    known = adapter_directory(tmp_path / "a", "unsloth/gpt-oss-20b-unsloth-bnb-4bit")
    cfg = composed(["model=local", f"model.path={known}", "dtype=bfloat16"])
    assert (cfg.model.name, cfg.dtype, list(cfg.adapters)) == ("gpt_oss_20b", "bfloat16", ["run-checkpoint-500"])
    assert "its base is converted (model=gpt_oss_20b)" in capsys.readouterr().out
    silent = adapter_directory(tmp_path / "b", name="my-lora")
    with pytest.raises(UserError, match=r"adapter without a base.*model\.base="):
        composed(["model=local", f"model.path={silent}"])
    cfg = composed(["model=local", f"model.path={silent}", f"model.base={tiny}"])
    assert (cfg.model.path, cfg.adapters["my-lora"].path) == (str(tiny), str(silent))


def dependencies_of(stage: str) -> list[str]:
    definition = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"][stage]
    return definition.get("do", definition)["deps"]


def test_no_stage_script_hides_a_module_of_the_standard_library():
    """They lie in the directory that Python searches first: `stages/code.py` broke `import pdb`."""
    assert not {path.stem for path in (ROOT / "stages").glob("*.py")} & sys.stdlib_module_names


def holds_code(file: str) -> bool:
    """Whether there is more than a docstring in a file: the __init__ files of the rooms are no dependency."""
    return len(ast.parse((ROOT / file).read_text()).body) > 1


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_every_project_file_that_it_imports(stage):
    """A missing one is DVC's worst failure: a stale result that says it is up to date."""
    needed = {file for file in project_files(ROOT / f"stages/{stage.replace('-', '_')}.py") if holds_code(file)}
    code = {dep for dep in dependencies_of(stage) if dep.startswith(("gptoss_nf4", "stages"))}
    code -= {dep for dep in code if dep.endswith("/templates")}  # which jinja2 reads: see the next test
    covered = {dep: {file for file in needed if file == dep or file.startswith(f"{dep}/")} for dep in code}
    assert needed == set().union(*covered.values())
    assert all(covered.values()), "a dependency that nothing needs"


@pytest.mark.parametrize(("stage", "room"), [("card", "publish"), ("report", "report")])
def test_a_stage_depends_on_its_templates(stage, room):
    assert {f"gptoss_nf4/{room}", f"gptoss_nf4/{room}/templates"} & set(dependencies_of(stage))


@pytest.mark.parametrize("stage", ["smoke", "smoke-adapter", "benchmark"])
def test_the_stages_that_serve_depend_on_the_whole_plugin(stage):
    """vLLM loads it by the entry point in pyproject.toml, so that no import shows it."""
    assert {"gptoss_nf4", "pyproject.toml"} <= set(dependencies_of(stage))


@pytest.mark.parametrize("stage", sorted({*STAGES} - {"smoke", "smoke-adapter", "benchmark"}))
def test_a_kernel_change_runs_no_stage_of_the_conversion(stage):
    assert not [dep for dep in dependencies_of(stage) if (ROOT / dep) in (ROOT / "gptoss_nf4/vllm").parents]


@pytest.mark.parametrize("stage", STAGES)
def test_an_upgraded_package_runs_the_stages_that_compute_with_it(stage):
    assert ("requirements" in dependencies_of(stage)) == (stage in COMPUTING)


def test_mode_exact_imports_no_torch_per_layer():
    """73 stages that import torch would cost minutes."""
    modules = "gptoss_nf4.convert.dequant, gptoss_nf4.convert.requant, gptoss_nf4.fetch.fetch"
    code = f"import sys, {modules}; print(json.dumps(sorted(sys.modules)))"
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
        written = 0

        def __init__(self, workers, modules):
            self.failed = False

        def showing(self, size, what):
            return contextlib.nullcontext()

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
        parallel["run_stages"](kinds, {}, 2)
        commits = ["commit --force dequant requant", "commit --force normalize"]
        assert events == [*started, *commits]
        return
    with pytest.raises(SystemExit, match="a stage failed"):
        parallel["run_stages"](kinds, {}, 2)
    done = "dequant requant@0" if failing == "requant@1" else ""
    assert events == [*started, *([f"commit --force {done}"] if done else [])]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["fetch"], []),
        (["adapter@mine"], []),
        (["adapter"], []),
        (["dequant@1"], ["dequant@1"]),
        (["requant@1"], ["dequant@1", "requant@1"]),
        (["requant@0", "dequant@2"], ["dequant@0", "dequant@2", "requant@0"]),
        (["dequant"], ["dequant@0", "dequant@1", "dequant@2"]),
        (["normalize"], ["normalize"]),
        (["normalize", "requant@2"], ["dequant@2", "normalize", "requant@2"]),
        *[([stage], None) for stage in ("assemble", "prove", "smoke", "smoke-adapter@mine", "benchmark", "card", "report")],
        (["fetch", "assemble"], None),
    ],
)
def test_targets_limit_what_runs_side_by_side(monkeypatch, targets, expected):
    """As DVC's own graph has it: see the next test."""
    from omegaconf import OmegaConf

    monkeypatch.chdir(ROOT)
    parallel = runpy.run_path(str(ROOT / "stages/parallel.py"))
    cfg = OmegaConf.create({"model": {"layers": [0, 1, 2]}, "adapters": {"mine": {}}})
    every = [f"{kind}@{layer}" for kind in ("dequant", "requant") for layer in range(3)] + ["normalize"]
    assert sorted(parallel["stages_for"](targets, cfg)) == sorted(every if expected is None else expected)
    assert parallel["stages_for"](["requant"], cfg) == {*every} - {"normalize"}


def test_targets_need_what_dvc_says_that_they_need(monkeypatch):
    from dvc.repo import Repo
    from omegaconf import OmegaConf

    monkeypatch.chdir(ROOT)
    parallel = runpy.run_path(str(ROOT / "stages/parallel.py"))
    cfg = OmegaConf.load(ROOT / "params.yaml")
    graph = Repo(str(ROOT)).index.graph
    named = {stage.addressing: stage for stage in graph}
    kinds = ("dequant@", "requant@", "normalize")
    for target in [*named, "dequant", "requant"]:
        starts, needed = [name for name in named if name == target or name.startswith(f"{target}@")], set()
        while starts:
            name = starts.pop()
            needed.add(name)
            starts += [each.addressing for each in graph.successors(named[name])]  # what a stage depends on
        assert parallel["stages_for"]([target], cfg) == {name for name in needed if name.startswith(kinds)}, target


UNKNOWN = ["nothing", "requant@7", "requant@", "requant@x", "normalize@0", "adapter@x", "-f", "", "dvc.yaml"]


@pytest.mark.parametrize("target", UNKNOWN)
def test_an_unknown_target_is_one_line(monkeypatch, target):
    from omegaconf import OmegaConf

    monkeypatch.chdir(ROOT)
    parallel = runpy.run_path(str(ROOT / "stages/parallel.py"))
    with pytest.raises(UserError, match="no such stage"):
        parallel["stages_for"]([target], OmegaConf.load(ROOT / "params.yaml"))


def test_a_limited_run_records_the_stages_that_ran_alone(monkeypatch):
    """The kind's name would stand for the other layers too, which are out of date still."""
    parallel = runpy.run_path(str(ROOT / "stages/parallel.py"))
    told = []
    monkeypatch.setitem(parallel["record"].__globals__, "dvc", lambda *arguments: told.append(" ".join(arguments)))
    changed = {"dequant": ["dequant@0", "dequant@1"], "requant": ["requant@0", "requant@1"]}
    parallel["record"]({"dequant": ["dequant@1"], "requant": ["requant@1"]}, changed)
    parallel["record"](changed, changed)
    assert told == ["commit --force dequant@1 requant@1", "commit --force dequant requant"]
