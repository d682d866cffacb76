"""An adapter of all modules at gpt-oss-20b's dimensions, r = 16: 3,264 tensors, 0.75 GB, converted in little memory."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from project_imports import ROOT
from safetensors.numpy import save_file

from gptoss_nf4.format.dimensions import Dimensions

pytestmark = pytest.mark.slow

RANK = 16
MEMORY_BOUND = 1 << 30
CPU_SECONDS_BOUND = 30  # 15 s on 2 cores
CONVERT = """
import json, re, sys, time
from pathlib import Path
import torch
from gptoss_nf4.adapters.adapter import Adapter
from gptoss_nf4.format.dimensions import Dimensions
torch.set_num_threads(2)
start = time.perf_counter(), time.process_time()
count = 0
for layer, deltas in Adapter(Path(sys.argv[1])).layers(Dimensions(**json.loads(sys.argv[2]))):
    count += len(deltas)
peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
seconds, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
print(json.dumps({"deltas": count, "seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peak}))
"""


def write_adapter(directory: Path, d: Dimensions) -> int:
    """Unsloth's form with a module for each expert; returns the number of tensors."""
    modules = {
        "self_attn.q_proj": (d.q_rows, d.hidden),
        "self_attn.k_proj": (d.kv_rows, d.hidden),
        "self_attn.v_proj": (d.kv_rows, d.hidden),
        "self_attn.o_proj": (d.hidden, d.q_rows),
    }
    for e in range(d.experts):
        modules[f"mlp.experts.gate_up_projs.{e}"] = (2 * d.intermediate, d.hidden)
        modules[f"mlp.experts.down_projs.{e}"] = (d.hidden, d.intermediate)
    tensors = {}
    for layer in range(d.layers):
        for module, (rows, columns) in modules.items():
            key = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{key}.lora_A.weight"] = np.full((RANK, columns), 0.01, np.float32)
            tensors[f"{key}.lora_B.weight"] = np.full((rows, RANK), 0.01, np.float32)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return len(tensors)


def test_time_and_memory(tmp_path):
    model = OmegaConf.load(ROOT / "conf/model/synthetic_20b.yaml")
    d = Dimensions(layers=len(model.layers), **model.dimensions)
    modules = 4 + 2 * d.experts
    assert write_adapter(tmp_path, d) == 2 * d.layers * modules
    command = [sys.executable, "-c", CONVERT, str(tmp_path), json.dumps(asdict(d))]
    made = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    assert made["deltas"] == d.layers * 6
    assert made["peak_bytes"] < MEMORY_BOUND, made
    assert made["cpu_seconds"] < CPU_SECONDS_BOUND, made
