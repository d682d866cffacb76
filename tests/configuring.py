"""Running stages/configure.py and other scripts in a working directory, for the tests of settings."""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import yaml
from omegaconf import OmegaConf
from project_imports import ROOT

sys.path.insert(0, str(ROOT / "stages"))


def script(cwd: Path, name: str, *arguments: str, ok: bool = True) -> str:
    """What stages/NAME.py prints in `cwd`. A failure has to be one line."""
    done = subprocess.run([sys.executable, ROOT / f"stages/{name}.py", *arguments], cwd=cwd, capture_output=True, text=True)
    if ok:
        assert done.returncode == 0, done.stderr
        return done.stdout
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def refused(*typed: str) -> str:
    """The one line with which `configure.py TYPED` ends, run in this process."""
    with pytest.raises(SystemExit) as ended:
        configured(*typed)
    line = str(ended.value)
    assert line.startswith("error: ")
    assert "\n" not in line
    return line


def params(cwd: Path) -> dict:
    """params.yaml as DVC reads it."""
    from dvc.utils.serialize import load_yaml

    return dict(load_yaml(cwd / "params.yaml"))


def link(source: Path, directory: Path) -> Path:
    """A checkpoint in `directory`: the embedded model's files, linked."""
    shutil.copytree(source, directory, copy_function=os.link)
    return directory


COMPOSED: dict[tuple, dict] = {}  # by what was chosen: most of a run is Hydra's composing, which gives the same each time


def configured(*typed: str) -> None:
    """Run `configure.py TYPED` in this process, in the working directory. The directory of conf/ is the project's."""
    import configure

    compose = configure._from_conf

    def composed(chosen: dict[str, str]) -> dict:
        key = tuple(chosen.items())
        COMPOSED[key] = COMPOSED.get(key) or compose(chosen)
        return copy.deepcopy(COMPOSED[key])

    with mock.patch.object(configure, "_from_conf", composed), mock.patch.object(sys, "argv", ["configure.py", *typed]):
        configure.main()


def written(cwd: Path, *typed: str) -> dict:
    """params.yaml after `configure.py TYPED`."""
    assert Path.cwd() == cwd
    configured(*typed)
    stored = params(cwd)
    as_hydra_reads_it = OmegaConf.to_container(OmegaConf.load(cwd / "params.yaml"), resolve=True)
    assert stored == yaml.safe_load((cwd / "params.yaml").read_text()) == as_hydra_reads_it
    return stored
