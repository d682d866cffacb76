"""params.yaml and conf/ from any hand: settings, or one line that says what is wrong. Never a traceback."""

import itertools
import random
import shutil
import subprocess
import sys

import pytest
import yaml
from halves import thinned
from json_mutations import retyped
from project_imports import ROOT

from gptoss_nf4.errors import UserError

sys.path.insert(0, str(ROOT / "stages"))
GOOD = (ROOT / "params.yaml").read_text()
TRIES, SEED = 60, 20260104
DTYPE = "dtype: float16"
BROKEN = {
    "empty": b"",
    "null": b"null\n",
    "a list": b"- 1\n",
    "a text": b"hello\n",
    "a number": b"5",
    "an open bracket": GOOD.encode() + b"x: [1,\n",
    "a tab": b"model:\n\tname: x\n",
    "Latin-1": GOOD.encode() + "# smok\xe9\n".encode("latin-1"),
    "UTF-16": GOOD.encode("utf-16"),
    "a NUL": GOOD.encode() + b"\0",
    "a control character": GOOD.encode() + b"\x01",
    "half a character": GOOD.replace("name: tiny", 'name: "\\ud800"').encode(),
    "model is a number": b"model: 5\n",
    "model is null": b"model: null\n",
    "no model": GOOD[GOOD.index("engine:") :].encode(),
    "a reference to nothing": GOOD.replace(DTYPE, "dtype: ${nothing}").encode(),
    "half a reference": GOOD.replace(DTYPE, 'dtype: "${"').encode(),
    "a missing value": GOOD.replace(DTYPE, "dtype: ???").encode(),
    "an unknown alias": GOOD.replace(DTYPE, "dtype: *x").encode(),
    "an object of Python": GOOD.replace(DTYPE, "dtype: !!python/object/apply:os.getcwd []").encode(),
    "a tag of its own": GOOD.replace(DTYPE, "dtype: !x y").encode(),
    "a key twice": GOOD.encode() + b"dtype: bfloat16\n",
    "no date": GOOD.replace(DTYPE, "dtype: 2024-99-99").encode(),
    "a key that is a number": GOOD.encode() + b"5: 6\n",
    "a key that is null": GOOD.encode() + b"null: 6\n",
    "a key that is a list": GOOD.encode() + b"? [1, 2]\n: 6\n",
    "a key that is a mapping": GOOD.encode() + b"? {a: 1}\n: 6\n",
    "brackets in brackets": GOOD.encode() + b"a: " + b"[" * 1000 + b"]" * 1000,
    "a list that holds itself": GOOD.replace("merge: null", "merge: &x [*x]").encode(),
    "thousands of digits": GOOD.replace("blocksize: 64", "blocksize: " + "9" * 5000).encode(),
    "two documents": GOOD.encode() + b"---\na: 1\n",
    "a key of Hydra's": GOOD.encode() + b"defaults: 5\n",
    "Hydra itself": GOOD.encode() + b"hydra: 5\n",
    "a key of the command line's": GOOD.encode() + b"layer: {}\n",
}


def read() -> str:
    """The one line that is said of params.yaml, nothing where it is good. What the stages do first, without a process."""
    from common import require_settings
    from params import settings

    try:
        require_settings(settings())
    except UserError as error:
        return str(error)
    return ""


def configured() -> str:
    """As `read`, by configure.py where one key is typed."""
    from configure import composed, current

    try:
        composed(["dtype=bfloat16"], current())
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("what", thinned(BROKEN, 3))
def test_broken_settings_are_one_line(here, what):
    (here / "params.yaml").write_bytes(GOOD.encode())
    assert read() == configured() == ""
    (here / "params.yaml").write_bytes(BROKEN[what])
    line = read()
    assert "params.yaml" in line or "model.name" in line
    assert "configure.py" in line or "model.name" in line
    assert (line + configured()).isprintable()


@pytest.mark.parametrize("change", ["none there", "a directory"])
def test_settings_that_are_no_file_are_one_line(here, change):
    if change == "a directory":
        (here / "params.yaml").mkdir()
    assert "params.yaml" in read()


@pytest.mark.slow
def test_random_damage_to_the_settings_is_one_line_or_harmless(here):
    """Bytes flipped, lines lost, and each value in another type."""
    rng, outcomes = random.Random(SEED), {"refused": 0, "read": 0}
    for number in range(TRIES):
        if number % 3:
            text = yaml.safe_dump(retyped(yaml.safe_load(GOOD), rng), sort_keys=False).encode()
        else:
            data = bytearray(GOOD.encode())
            for _ in range(rng.randrange(1, 4)):
                data[rng.randrange(len(data))] = rng.choice(b"[]{}:,-&*!|>'\"%@`#? \t\n\x00\x80\xff09azZ~$")
            text = bytes(data)
        (here / "params.yaml").write_bytes(text)
        lines = read(), configured()
        assert all(line.isprintable() for line in lines)
        outcomes["refused" if lines[0] else "read"] += 1
    assert outcomes["refused"] > TRIES // 3
    assert outcomes["read"] > TRIES // 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "typed"), [("normalize", []), ("serve", []), ("parallel", []), ("configure", ["dtype=float32"]), ("disk", [])]
)
def test_the_scripts_say_it_in_one_line(here, name, typed):
    (here / "params.yaml").write_bytes(BROKEN["Latin-1"])
    done = subprocess.run([sys.executable, ROOT / f"stages/{name}.py", *typed], capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if "kernels" not in line]  # transformers misses a package
    assert done.returncode == 1
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: broken settings: params.yaml: got 'utf-8' codec can't decode")


FILES = ("config.yaml", "model/tiny.yaml", "model/other.yaml")
CONTENTS = (b"a: [b\n", b"\xff\xfe", b"- 1\n", b"5", b"[" * 1000, b"? {a: 1}\n: 6\n")


@pytest.mark.parametrize(("file", "content"), thinned(itertools.product(FILES, CONTENTS), 4))
def test_broken_defaults_are_one_line(here, monkeypatch, file, content):
    import configure
    import given

    shutil.copytree(ROOT / "conf", here / "conf")
    (here / "conf" / file).write_bytes(content)
    monkeypatch.setattr(configure, "ROOT", here)
    monkeypatch.setattr(given, "ROOT", here)

    def choose() -> None:
        configure.composed(given.repository_as_model("someone/model") if file == "model/other.yaml" else [])

    with pytest.raises(UserError, match="conf"):
        choose()
