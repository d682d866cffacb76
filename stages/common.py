"""What all stage scripts share: how a stage starts, and its settings as the library's types."""

from ending import end_with_run

end_with_run()  # before the imports, which take a second

import fcntl  # noqa: E402
import functools  # noqa: E402
import os  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from pathlib import Path  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # stages run from a checkout, installed or not

import hydra  # noqa: E402
from checks import ADAPTER_FIELDS, CHECKS, adapters, check  # noqa: E402
from hydra.errors import HydraException  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402
from omegaconf.errors import OmegaConfBaseException  # noqa: E402
from params import reason, settings  # noqa: E402
from yaml import YAMLError  # noqa: E402

from gptoss_nf4.errors import UserError, printable  # noqa: E402
from gptoss_nf4.format.dimensions import Dimensions  # noqa: E402
from gptoss_nf4.source.model import SAMPLE_KINDS, SYNTHETIC_KINDS, AdapterSource, Model  # noqa: E402
from gptoss_nf4.storage.artifacts import Artifacts  # noqa: E402
from gptoss_nf4.storage.writing import write_json  # noqa: E402

METRICS = Path("metrics")
PLOTS = Path("plots")  # a directory for each plot of dvc.yaml
NO_STAGES = {"verify", "publish"}  # scripts whose seconds are of no interest later
_is_stage = False  # whether this script's arguments are overrides of settings


def stage(function: Callable[[DictConfig], str]) -> Callable[[], None]:
    """Make `function` a script's main: run it with params.yaml and the command line's overrides, print what it returns.

    The time is added to that line. A UserError ends the script with one line and status 1, Ctrl-C with status 130.
    """

    @functools.wraps(function)
    def report(cfg: DictConfig) -> None:
        started = time.monotonic()
        name = Path(sys.argv[0]).stem
        with _one_line():  # here, since Hydra adds a line of its own to an error
            require_settings(cfg)
            line = function(cfg)
            seconds = time.monotonic() - started
            if name not in NO_STAGES:
                write_json(Artifacts.of(cfg.model.name).seconds(name, cfg.layer), {"seconds": seconds})
        print(f"{name}: {line}, {seconds:.1f} s\n", end="", flush=True)  # one write: others print too

    run = hydra.main(version_base="1.3", config_path="../conf", config_name="stage")(report)

    def main() -> None:
        global _is_stage
        _is_stage = True
        end_with_run()  # again, since a fork has none of its server's threads
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises, instead of printing several lines
        with _one_line():
            settings()  # says what is wrong with params.yaml in better words than Hydra
            run()

    return main


@contextmanager
def _one_line() -> Iterator[None]:
    """End the script with one line and status 1 where the settings cannot be composed, or a UserError says why."""
    try:
        yield
    except UserError as error:
        sys.exit(f"error: {error}")
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        line = printable(reason(error))
        sys.exit(f"error: {line}; `python stages/configure.py` writes params.yaml, and chooses model= and engine=")


def require_settings(cfg: DictConfig) -> None:
    """UserError for the first setting in `cfg` that cannot be. Before this, its values may have any type."""
    found = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    check(found, CHECKS | {"adapters": adapters})


def model_of(cfg: DictConfig) -> tuple[Model, Artifacts]:
    """The model of params.yaml, and where its artifacts lie."""
    fields = {key: cfg.model[key] for key in ("name", "kind", "path", "repository", "revision", "expected")}
    if cfg.model.kind in SYNTHETIC_KINDS:
        fields["dimensions"] = Dimensions(layers=len(cfg.model.layers), **cfg.model.dimensions)
    model, artifacts = Model(**fields), Artifacts.of(cfg.model.name)
    if model.kind in SAMPLE_KINDS and artifacts.manifest.exists() and Path(sys.argv[0]).stem != "fetch":
        _bring_sample(artifacts)
    return model, artifacts


def _bring_sample(artifacts: Artifacts) -> None:
    """Have stage fetch write a sample again that is gone, though its description is there.

    DVC brings the description from its cache, into a queued experiment's directory or another clone. A sample is no output:
    the synthetic one would be kept twice. Other sources lie where every directory finds them.
    """
    artifacts.root.mkdir(parents=True, exist_ok=True)
    with (artifacts.root / ".sample.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the stages of several layers may start at once
        try:
            (artifacts.source / "config.json").stat()
        except PermissionError:
            return  # the stage says what it cannot read
        except FileNotFoundError:
            overrides = sys.argv[1:] if _is_stage else []  # those of other scripts are not settings
            subprocess.run([sys.executable, str(ROOT / "stages/fetch.py"), *overrides], check=True)


def adapters_of(cfg: DictConfig) -> list[AdapterSource]:
    """The adapters of params.yaml."""
    return [AdapterSource(name, **{key: entry[key] for key in ADAPTER_FIELDS}) for name, entry in cfg.adapters.items()]


def adapter_of(cfg: DictConfig) -> AdapterSource:
    """The adapter that `adapter=NAME` names on the command line. UserError for an unknown name."""
    return adapter_named(cfg, cfg.adapter)


def adapter_named(cfg: DictConfig, name: str) -> AdapterSource:
    """The adapter of that name. UserError for an unknown name."""
    for adapter in adapters_of(cfg):
        if adapter.name == name:
            return adapter
    raise UserError(
        "no such adapter",
        where="params.yaml",
        got=f"adapter={name}",
        expected=f"one of {sorted(cfg.adapters)}",
        next_step="run `python stages/configure.py adapters.NAME=DIRECTORY`",
    )


def engine_of(cfg: DictConfig) -> dict:
    """vLLM's arguments for this run. Also sets the engine's environment variables, so call it before vLLM is imported.

    The dtype is always given: vLLM would round a float32 checkpoint to 16 bit.
    """
    os.environ.update({key: "" if value is None else str(value) for key, value in cfg.engine.env.items()})
    return {"dtype": cfg.dtype} | OmegaConf.to_container(cfg.engine.args)


def layer_of(cfg: DictConfig) -> int:
    """The layer that `layer=L` names on the command line. UserError where the model has no such layer."""
    if type(cfg.layer) is not int or cfg.layer not in cfg.model.layers:
        raise UserError(
            "no such layer",
            where=f"model {cfg.model.name}",
            got=f"layer={cfg.layer}",
            expected=f"0 to {len(cfg.model.layers) - 1}",
            next_step="pass one of these, such as layer=0",
        )
    return cfg.layer
