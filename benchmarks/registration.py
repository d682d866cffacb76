"""What the plugin adds to every start of vLLM: the time that its entry point takes.

    python -m benchmarks.registration

vLLM calls the entry points of its plugins in four places, for any model. Each row is a fresh process that has imported the
module which calls them there, as in a real start, and nothing else. Takes about two minutes.
"""

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.tables import markdown

ROOT = Path(__file__).resolve().parent.parent
CALLERS = (  # of vllm.plugins.load_general_plugins, in vLLM 0.32.0
    "vllm.engine.arg_utils",
    "vllm.v1.engine.core",
    "vllm.v1.worker.worker_base",
    "vllm.model_executor.models.registry",
)
SCRIPT = """
import importlib, json, sys, time
from importlib.metadata import entry_points

importlib.import_module("vllm.plugins")
importlib.import_module(sys.argv[1])
(entry,) = entry_points(group="vllm.general_plugins", name="gptoss_nf4")
before = set(sys.modules)
started = time.perf_counter()
entry.load()()
milliseconds = 1e3 * (time.perf_counter() - started)
imported = sorted(set(sys.modules) - before)

import torch
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

print("\\n" + json.dumps({
    "milliseconds": milliseconds,
    "imported": imported,
    "registered": "gptoss_nf4" in QUANTIZATION_METHODS,
    "cuda_initialized": torch.cuda.is_initialized(),
}))
"""


@dataclass(frozen=True)
class Registration:
    """What the entry point did in one fresh process; `imported` are the modules that were not there before."""

    milliseconds: float
    imported: list[str]
    registered: bool
    cuda_initialized: bool


def register_after(module: str) -> Registration:
    """Call the entry point in a fresh process that has imported `module`."""
    command = [sys.executable, "-c", SCRIPT, module]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return Registration(**json.loads(done.stdout.splitlines()[-1]))  # vLLM may have printed something before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="processes for each row, of which the median is shown")
    args = parser.parse_args()
    rows = []
    for module in CALLERS:
        runs = [register_after(module) for _ in range(args.runs)]
        ours = [name for name in runs[0].imported if name.startswith("gptoss_nf4")]
        milliseconds = statistics.median(run.milliseconds for run in runs)
        rows.append([module, f"{milliseconds:.1f}", len(runs[0].imported), len(ours)])
    print(markdown(["imported before", "ms", "modules it imports", "of them ours"], rows))


if __name__ == "__main__":
    main()
