"""The audit of a finished checkpoint: it is whole, and every floating tensor has the same dtype."""

from gptoss_nf4.check.fitting import require_fitting
from gptoss_nf4.errors import UserError
from gptoss_nf4.format import names
from gptoss_nf4.format.dtypes import FLOATING, SAFETENSORS_NAMES
from gptoss_nf4.format.quant_state import QuantState
from gptoss_nf4.storage.checkpoint import Checkpoint

# Quantization data is no weight: it is float32 whatever the model's dtype.
QUANTIZATION_SIDECARS = (".absmax", ".quant_map")


def audit(checkpoint: Checkpoint, dtype: str) -> dict[str, int]:
    """Check that the checkpoint holds what its config.json says, and that every floating tensor is in `dtype`.

    absmax and codebooks are not counted. A quantization state counts by the dtype it names. UserError names the tensor.

    Returns:
        Number of tensors and states by safetensors dtype, in which there is one entry.
    """
    require_fitting(checkpoint)
    expected = SAFETENSORS_NAMES[dtype]
    found: dict[str, int] = {}
    for name, info in checkpoint.tensors.items():
        stored = info.dtype
        if f".{names.STATE_PREFIX}" in name:
            stored = SAFETENSORS_NAMES[QuantState.from_json(checkpoint.raw(name).tobytes(), name).dtype]
        elif name.endswith(QUANTIZATION_SIDECARS) or info.dtype not in FLOATING:
            continue
        found[stored] = found.get(stored, 0) + 1
        if stored != expected:
            raise UserError(
                "mixed dtypes",
                where=name,
                got=stored,
                expected=f"{expected} everywhere",
                next_step="run `dvc repro -f normalize assemble`",
            )
    return found
