"""Shared checkpoints: the embedded model, and one with everything that Unsloth's dynamic quantization may leave out.

torch and what needs it are imported where they are used. pytest-xdist reads this file before it starts the workers: they
waited for an import of five seconds that only they need.
"""

import gc
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import profiles  # noqa: F401  how many examples hypothesis draws
import pytest

from gptoss_nf4.storage.artifacts import Artifacts
from gptoss_nf4.storage.checkpoint import INDEX_FILE

if TYPE_CHECKING:
    import torch

    from gptoss_nf4.source.model import Model

# What tests start is no part of a `make test` around them: make would name itself make[1] and tell its directories.
for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):
    os.environ.pop(name, None)

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

if "PYTEST_XDIST_WORKER" in os.environ:  # while modules are imported, which leaves little garbage: 3 of 20 s of its start
    gc.disable()


def pytest_configure(config: pytest.Config) -> None:
    """Let bitsandbytes come without PyTorch's compiler, before anything else imports it: that takes seconds to load, and
    20 to compile what one test calls once. Of pytest-xdist, the workers."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        import gptoss_nf4.eager_bnb  # noqa: F401


def pytest_collection_finish() -> None:
    """From now on garbage is collected, without a look at all modules each time."""
    gc.enable()
    gc.freeze()


@pytest.fixture
def plugin_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """`caplog` that has the plugin's lines too where vLLM has set up its logging: that keeps them from the root logger."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    return caplog


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working directory: params.yaml and artifacts/ are written below it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """The embedded checkpoint; do not write into it."""
    from gptoss_nf4.samples import embedded

    directory = tmp_path_factory.mktemp("tiny") / "source"
    embedded.write_checkpoint(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_fused(tmp_path_factory) -> Path:
    """The embedded checkpoint in the fused layout; do not write into it."""
    from gptoss_nf4.samples import embedded

    directory = tmp_path_factory.mktemp("tiny_fused") / "source"
    embedded.write_checkpoint(directory, stacked=True)
    return directory


@pytest.fixture
def source_copy(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the embedded checkpoint to damage."""
    return Path(shutil.copytree(tiny, tmp_path / "source"))


@pytest.fixture(scope="session")
def massive(tmp_path_factory) -> Path:
    """The embedded checkpoint whose residual stream leaves float16; do not write into it."""
    from gptoss_nf4.samples import embedded

    directory = tmp_path_factory.mktemp("massive") / "source"
    embedded.write_checkpoint(directory, embedded.MASSIVE_DIMENSIONS, massive=True)
    return directory


@pytest.fixture(scope="session")
def converted(tiny: Path, tmp_path_factory) -> Path:
    """The embedded model converted by the default settings; do not write into it."""
    return converted_below(tmp_path_factory.mktemp("converted"), tiny).checkpoint


@pytest.fixture(scope="session")
def converted_fused(tiny_fused: Path, tmp_path_factory) -> Path:
    """The same of the fused layout; do not write into it."""
    return converted_below(tmp_path_factory.mktemp("converted_fused"), tiny_fused).checkpoint


def converted_below(root: Path, source: Path) -> Artifacts:
    """`source` converted to float16 below `root`, by the default settings."""
    from gptoss_nf4.convert.plan import RequantOptions
    from gptoss_nf4.flow import convert

    model, artifacts = local(source, root)
    convert(model, artifacts, RequantOptions(), "float16")
    return artifacts


def local(directory: Path, root: Path) -> tuple["Model", Artifacts]:
    from gptoss_nf4.source.model import Model

    return Model(name="test", kind="local", path=str(directory)), Artifacts(root)


def converted_for_interpreter(source: Path, root: Path, stacked: bool = False) -> Artifacts:
    """Write a gpt-oss to `source` that Triton's interpreter runs in seconds, and convert it to float16 below `root`.

    stacked: in the fused layout, whose blocks run along the outputs.
    """
    from gptoss_nf4.format.dimensions import Dimensions
    from gptoss_nf4.samples import embedded

    d = Dimensions(
        layers=1,
        hidden=128,
        intermediate=64,
        experts=4,
        experts_per_token=2,
        heads=2,
        kv_heads=1,
        head_dim=64,
        vocabulary=262,
    )
    embedded.write_checkpoint(source, d, stacked=stacked)
    return converted_below(root, source)


def edit_shard(directory: Path, layer: int, change) -> None:
    """Apply `change(tensors)` to one layer's shard and drop the index, so that names may come and go."""
    from safetensors.torch import load_file, save_file

    (file,) = directory.glob(f"model-{layer + 1:05d}-of-*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    (directory / INDEX_FILE).unlink(missing_ok=True)


def make_dense(tensors: dict[str, "torch.Tensor"], module: str) -> None:
    """Replace a 4-bit module by a 16-bit one of fresh values, as Unsloth's dynamic quantization leaves it."""
    import torch

    from gptoss_nf4.format.quant_state import QuantState
    from gptoss_nf4.samples import embedded

    key = f"{module}.weight.quant_state.bitsandbytes__nf4"
    shape = QuantState.from_json(bytes(tensors[key].numpy()), key).shape
    for name in [name for name in tensors if name.startswith(f"{module}.weight.")]:
        del tensors[name]
    weight = embedded.random_tensor(f"dense {module}", shape, std=2.0 / shape[1] ** 0.5)
    tensors[f"{module}.weight"] = weight.to(torch.bfloat16)
