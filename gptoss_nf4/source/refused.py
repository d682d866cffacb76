"""What cannot be read, told apart and named: paths that hold no checkpoint, and checkpoints of other kinds."""

import difflib
import os
import re
from collections.abc import Callable, Collection
from pathlib import Path

from gptoss_nf4.errors import UserError
from gptoss_nf4.storage.checkpoint import ADAPTER_CONFIG, Checkpoint, is_adapter
from gptoss_nf4.storage.reading import reading
from gptoss_nf4.storage.repository import OWNER_AND_NAME
from gptoss_nf4.storage.tensor_reader import TensorInfo

CONVERT_THE_SOURCE = "convert the checkpoint in safetensors that it was made from"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".distcp")
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".zst", ".7z")
SAVE_AGAIN = "save the fine-tune in 4 bit or in 16 bit"

_REPOSITORY = re.compile(rf"(?:https?://huggingface\.co/|hf://)?({OWNER_AND_NAME.pattern})/?")
# (what it is, its sign in a tensor among all names, what to do). The first that any tensor shows counts.
_KINDS: tuple[tuple[str, Callable[[TensorInfo, Collection[str]], object], str], ...] = (
    (
        "a LoRA adapter that is not merged",
        lambda info, _: ".lora_" in info.name or ".modules_to_save." in info.name,
        "save the adapter alone, then pass its directory as model.path",
    ),
    (
        "stock MXFP4",
        lambda info, _: re.search(r"\.(experts\.(gate_up|down)_proj_|mlp[12]_weight\.)(blocks|scales)$", info.name),
        "vLLM serves this checkpoint as it is; there is nothing to convert",
    ),
    ("fp8", lambda info, _: info.dtype.startswith("F8_") and "scale" not in info.name, SAVE_AGAIN),
    ("int8 of bitsandbytes", lambda info, _: info.name.endswith((".SCB", ".weight_format")), SAVE_AGAIN),
    ("GPTQ or AWQ", lambda info, _: info.name.endswith((".qweight", ".qzeros", ".g_idx")), SAVE_AGAIN),
    ("compressed-tensors", lambda info, _: info.name.endswith((".weight_packed", ".weight_scale")), SAVE_AGAIN),
    ("int8", lambda info, names: info.dtype == "I8" and f"{info.name}.absmax" not in names, SAVE_AGAIN),
)


def require_directory(given: str) -> Path:
    """What the user gave as model.path, as a path. UserError where it is no directory says what it is instead."""
    path = Path(os.path.expanduser(given))  # ~nobody stays as it is
    with reading(path):
        if not path.exists():
            raise _missing(given, path)
        if not path.is_dir():
            raise _not_a_directory(path)
    return path


def require_checkpoint(directory: Path) -> None:
    """Check that a directory holds config.json and weights. UserError says what it holds instead. Only names are read."""
    with reading(directory):
        weights = (directory / "config.json").exists() and any(directory.glob("*.safetensors"))
        if not weights or is_adapter(directory):
            raise _without_weights(directory)


def repository_of(given: str) -> str | None:
    """The Hub repository that `given` names, as owner/name or by its address. None where it is a path."""
    repository = _REPOSITORY.fullmatch(given)
    return repository[1] if repository and not Path(Path(given).parts[0]).exists() else None


def _refusal(where: object, got: str, next_step: str) -> UserError:
    expected = "a directory with config.json and *.safetensors"
    return UserError("no checkpoint", where=where, got=got, expected=expected, next_step=next_step)


def _missing(given: str, path: Path) -> UserError:
    if repository := repository_of(given):
        use = f"to download it: python stages/configure.py model=hub model.repository={repository}"
        return _refusal(given, "no such path, but the form of a Hub repository", use)
    if path.is_symlink():
        return _refusal(path, f"a link to {path.readlink()}, which is not there", "mount or restore what it points to")
    path = path.absolute()
    above = next(parent for parent in path.parents if parent.exists())
    missing = path.relative_to(above).parts[0]
    near = difflib.get_close_matches(missing, [each.name for each in above.iterdir()], n=1)
    return _refusal(
        path,
        f"no such directory: {above} has no {missing!r}",
        f"check the path; there is {above / near[0]}" if near else "check the path",
    )


def _not_a_directory(path: Path) -> UserError:
    kind = path.suffix.lower()
    if kind == ".gguf":
        return _refusal(path, "a GGUF file", CONVERT_THE_SOURCE)
    if kind in ARCHIVES:
        return _refusal(path, "an archive", "unpack it, then pass the directory")
    return _refusal(path, "a file", f"pass the directory that it is in: {path.parent}")


def _without_weights(path: Path) -> UserError:
    """The error for a directory without config.json or without *.safetensors, and for an adapter."""
    files = [each.name for each in path.iterdir()]
    kinds = {Path(name).suffix.lower() for name in files}
    config = "config.json" in files
    if is_adapter(path):
        use = f"its base is converted and both are served: python stages/configure.py model=local model.path={path}"
        return _refusal(path, "a LoRA adapter", use)
    below = _checkpoints_below(path)
    if below and ".safetensors" not in kinds:
        return _refusal(
            path,
            f"a directory with {len(below)} {'checkpoint' if len(below) == 1 else 'checkpoints'} below it",
            f"pass one of them, such as {below[-1]}",
        )
    if ".gguf" in kinds:
        return _refusal(path, "a GGUF file and no *.safetensors", CONVERT_THE_SOURCE)
    if ".safetensors" in kinds:
        return _refusal(path, "*.safetensors and no config.json", "copy the base model's config.json there")
    if kinds & set(PICKLED) or any(re.match(r"pytorch_model_fsdp|global_step", name) for name in files):
        return _refusal(
            path, "pickled or sharded training state and no *.safetensors", "save the model with save_pretrained"
        )
    return _refusal(path, "no *.safetensors" if config else "neither config.json nor *.safetensors", "check the path")


def _checkpoints_below(path: Path) -> list[Path]:
    """Directories up to two levels below that hold a checkpoint or an adapter, by number: checkpoint-500 after -60."""
    found = {
        file.parent
        for depth in ("*", "*/*")
        for name in ("config.json", ADAPTER_CONFIG)
        for file in path.glob(f"{depth}/{name}")
    }
    return sorted(found, key=lambda each: [int(part) if part.isdecimal() else 0 for part in re.split(r"(\d+)", each.name)])


def require_known_kind(checkpoint: Checkpoint) -> None:
    """UserError for a checkpoint that is quantized in a way that no layout here has, or that holds an adapter."""
    for kind, sign, next_step in _KINDS:
        shown = next((info for info in checkpoint.tensors.values() if sign(info, checkpoint.tensors)), None)
        if shown:
            raise unsupported(checkpoint, f"{kind} ({shown.name}, {shown.dtype}{_by(checkpoint)})", next_step)


def unsupported(checkpoint: Checkpoint, found: str = "", next_step: str = "") -> UserError:
    """The error for a checkpoint in no layout that can be read; `found` names what is known of it."""
    if not found:
        example = next(iter(sorted(checkpoint.tensors)), "no tensor")
        found = f"an unknown layout, with tensors like {example}{_by(checkpoint)}"
        next_step = f"convert the checkpoint that Unsloth saved, or {SAVE_AGAIN}"
    return UserError(
        "unsupported layout",
        where=checkpoint.directory,
        got=found,
        expected="experts as mlp.experts.gate_up_projs.<e>.weight or mlp.experts.gate_up_proj, floating or 4-bit",
        next_step=next_step,
    )


def _by(checkpoint: Checkpoint) -> str:
    """What config.json says of the quantization, as the rest of a list. Empty where it says nothing."""
    quantization = checkpoint.config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return f", quant_method {method!r} in config.json" if method else ""
