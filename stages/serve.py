"""Serve what was converted last: python stages/serve.py [arguments of `vllm serve`, such as --port 8001]"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from common import adapters_of, require_settings
from omegaconf import DictConfig
from params import settings

from gptoss_nf4.engine.serve import Memory, ServedAdapter, cpu_cache_gib, serve_arguments
from gptoss_nf4.errors import UserError
from gptoss_nf4.source.model import adapter_directory
from gptoss_nf4.storage.artifacts import Artifacts
from gptoss_nf4.storage.checkpoint import Checkpoint
from gptoss_nf4.storage.machine import available_memory
from gptoss_nf4.storage.reading import read_json_object

MIB = 1 << 20
CPU_CACHE = "VLLM_CPU_KVCACHE_SPACE"  # in GiB
QUERY = ["nvidia-smi", "--query-gpu=memory.free,memory.total", "--format=csv,noheader,nounits"]


def memory() -> Memory | None:
    """Of the first GPU that CUDA may use; of the machine where there is none. None where nvidia-smi does not tell."""
    if not shutil.which(QUERY[0]):
        free = available_memory()
        return Memory(free, free, gpu=False)
    try:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]  # which nvidia-smi does not heed
        query = [*QUERY, f"--id={visible}"] if visible else QUERY
        told = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
        free, total = (int(mib) * MIB for mib in told.splitlines()[0].split(","))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
    return Memory(free, total, gpu=True)


def served_adapters(cfg: DictConfig, artifacts: Artifacts) -> list[ServedAdapter]:
    """The adapters to serve beside the base. None where one is merged: they belong beside the base that was."""
    if cfg.requant.merge is not None:
        return []
    found = []
    for adapter in adapters_of(cfg):
        directory = adapter_directory(adapter, artifacts)
        described = read_json_object(artifacts.adapter(adapter.name))
        found.append(ServedAdapter(adapter.name, directory, described["largest_rank"]))
    return found


def command(cfg: DictConfig) -> list[str]:
    """The whole `vllm serve` command for the checkpoint of params.yaml. UserError where it is not there."""
    artifacts = Artifacts.of(cfg.model.name)  # the source need not be there any more
    artifacts.require(artifacts.checkpoint / "config.json", "assemble")
    adapters = served_adapters(cfg, artifacts)
    return ["vllm", "serve", *serve_arguments(*described(artifacts), adapters, memory())]


def described(artifacts: Artifacts) -> tuple[Path, dict, int]:
    """The checkpoint, its config.json and the bytes of its tensors."""
    checkpoint = Checkpoint(artifacts.checkpoint)
    return artifacts.checkpoint, checkpoint.config, sum(info.bytes for info in checkpoint.tensors.values())


def environment(cfg: DictConfig) -> dict[str, str]:
    """What `make serve` adds to the environment, unless it is set: without a GPU, how large the KV cache is."""
    found = memory()
    if found is None or found.gpu or CPU_CACHE in os.environ:
        return {}
    gib = cpu_cache_gib(*described(Artifacts.of(cfg.model.name)), found.free)
    return {CPU_CACHE: str(gib)} if gib else {}


def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(f"{__doc__}\nAll arguments: vllm serve --help")
        return
    try:
        cfg = settings()
        require_settings(cfg)
        full = [*command(cfg), *sys.argv[1:]]
        added = environment(cfg)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(*(f"{name}={value}" for name, value in added.items()), shlex.join(full), flush=True)
    os.environ |= added
    os.execv(Path(sys.executable).with_name("vllm"), full)


if __name__ == "__main__":
    main()
