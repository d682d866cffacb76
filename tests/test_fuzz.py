"""A short run of the fuzzer on each target, from its corpus; longer ones: see tests/fuzz/fuzz.py."""

import importlib.util
import re
import shutil
import subprocess
import sys

import pytest
from project_imports import ROOT

FUZZ = ROOT / "tests/fuzz"
RUNS, SEED = 20_000, 20260103


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("atheris"), reason="atheris has no build for this platform")
@pytest.mark.parametrize("target", ["header", "state", "config"])
def test_no_input_gets_past_the_checks(target, tmp_path, capsys):
    corpus = shutil.copytree(FUZZ / "corpus" / target, tmp_path / "corpus")  # the fuzzer adds to it
    before = len(list(corpus.iterdir()))
    options = [f"-runs={RUNS}", f"-seed={SEED}", f"-artifact_prefix={tmp_path}/", str(corpus)]
    done = subprocess.run(
        [sys.executable, FUZZ / "fuzz.py", target, *options], cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    runs, covered = re.findall(r"#(\d+)\s+DONE\s+cov: (\d+)", done.stderr)[0]
    assert int(runs) >= RUNS
    found = len(list(corpus.iterdir()))
    assert found > before > 0  # it is guided: inputs that reach more code are kept
    with capsys.disabled():
        print(f"\nfuzz {target}: {runs} inputs, {covered} edges covered, corpus {before} -> {found}, no fault")
