"""deploy/: the Dockerfile and the systemd unit, and every `vllm serve` line of the documents, without Docker and a GPU."""

import re
import shlex
import shutil
import subprocess
import tomllib
import zipfile
from pathlib import Path

import dockerfile
import pytest
from documents import all_commands, text_of
from packaging.requirements import Requirement
from project_imports import ROOT

from gptoss_nf4.vllm.versions import TESTED_VERSIONS

UNIT, DOCKERFILE = ROOT / "deploy/gptoss-nf4.service", ROOT / "deploy/Dockerfile"
INLINE = re.compile(r"`([^`\n]+)`")


def instructions() -> list[dockerfile.Command]:
    return list(dockerfile.parse_file(str(DOCKERFILE)))


def test_docker_takes_the_dockerfile():
    """By Docker's own parser. It passes unknown words on to the builder, so they are looked up too."""
    assert {each.cmd for each in instructions()} <= {name.upper() for name in dockerfile.all_cmds()}
    assert all(each.value for each in instructions())
    assert instructions()[0].cmd == "FROM"


def test_the_image_is_of_the_version_that_is_locked():
    (image,) = [each.value[0] for each in instructions() if each.cmd == "FROM"]
    (locked,) = [line for line in (ROOT / "requirements" / "gpu.txt").read_text().splitlines() if line.startswith("vllm==")]
    assert image == f"vllm/vllm-openai:v{locked.removeprefix('vllm==')}"


@pytest.mark.parametrize("version", TESTED_VERSIONS)
def test_the_gpus_extra_takes_every_tested_version(version):
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["gpu"]
    (vllm,) = [requirement for each in extra if (requirement := Requirement(each)).name == "vllm"]
    assert vllm.specifier.contains(version)
    assert not vllm.specifier.contains("0.34.0")


def test_what_is_copied_is_there_and_is_enough_to_install_the_package():
    """Of the build context only what .dockerignore lets through. setuptools reads no other file of the project."""
    copied = {source for each in instructions() if each.cmd == "COPY" for source in each.value[:-1]}
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert all((ROOT / source).exists() for source in copied)
    assert copied == let_through
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert {project["project"]["readme"], "pyproject.toml", "gptoss_nf4", "LICENSE"} <= copied
    assert project["tool"]["setuptools"]["packages"]["find"]["include"] == ["gptoss_nf4*"]


@pytest.mark.slow
def test_the_package_installs_from_what_is_copied_alone(tmp_path):
    """The image's RUN line builds this wheel. Here setuptools of this environment does, so that nothing is downloaded."""
    for source in (ROOT / "pyproject.toml", ROOT / "README.md", ROOT / "LICENSE"):
        shutil.copy(source, tmp_path)
    shutil.copytree(ROOT / "gptoss_nf4", tmp_path / "gptoss_nf4", ignore=shutil.ignore_patterns("__pycache__"))
    build = ["pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path / "wheels", tmp_path]
    subprocess.run(build, check=True)
    (wheel,) = (tmp_path / "wheels").glob("gptoss_nf4-*.whl")
    files = {path for path in (ROOT / "gptoss_nf4").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {str(path.relative_to(ROOT)) for path in files} - set(zipfile.ZipFile(wheel).namelist()) == set()


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="this system has no systemd-analyze")
def test_systemd_takes_the_unit(tmp_path):
    """With a program that is here in place of the one in /opt."""
    program = re.search(r"^ExecStart=(\S+)", UNIT.read_text(), re.MULTILINE)
    assert program
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace(program[1], "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    unit.write_text(unit.read_text().replace("Restart=on-failure", "Restart=now and then"))
    assert subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True).stderr


def serve_lines() -> list[str]:
    """The arguments of every `vllm serve` in the documents, in the unit, and behind the image's name in `docker run`."""
    (in_unit,) = re.findall(r"^ExecStart=\S+/vllm serve (.*)", UNIT.read_text(), re.MULTILINE)
    found = [in_unit]
    for command in sorted(all_commands()):
        if command.startswith("vllm serve "):
            found.append(command.removeprefix("vllm serve "))
        elif command.startswith("make serve ARGS="):
            found.append("model " + shlex.split(command)[2].removeprefix("ARGS="))
        elif command.startswith("docker run "):
            found.append(command.split(" gptoss-nf4 ")[1])
    return found


def flags_in_text() -> set[str]:
    """The flags of `vllm serve` that the text names, beside those in whole lines."""
    spans = [span for name in ("README.md", "docs/serving.md", "docs/trouble.md") for span in INLINE.findall(text_of(name))]
    return {flag for span in spans for flag in re.findall(r"--[a-z][a-z0-9-]+", span)} - {"--help"}


@pytest.mark.slow
def test_vllm_knows_every_flag_of_the_documents():
    """vLLM's own parser of `vllm serve` takes them. (Importing it takes half a minute.)"""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
    assert len(serve_lines()) >= 5
    for line in serve_lines():
        validate_parsed_serve_args(parser.parse_args(shlex.split(line)))
    known = {option for action in parser._actions for option in action.option_strings}
    assert flags_in_text() - known == set()
    assert len(flags_in_text()) > 8
    with pytest.raises(SystemExit):
        parser.parse_args(["model", "--no-such-flag"])


def test_paths_of_the_unit_are_those_that_the_documents_name():
    text = (ROOT / "docs/running.md").read_text()
    for path in ("/opt/gptoss-nf4", "/srv/my-finetune"):
        assert path in UNIT.read_text()
        assert path in text
    assert Path(UNIT.name).stem == "gptoss-nf4"
