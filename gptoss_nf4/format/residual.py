"""`residual_scale`: a power of two that keeps gpt-oss's residual stream inside float16.

Activations grow with depth. On the 120b the stream reaches 45,344 at layer 34 and passes float16's 65,504 at the next
layer; from there on all is NaN (onnxruntime-genai #2444). But the stream is read by RMSNorm alone. So everything that
writes to it may be multiplied by s, if each norm's eps is multiplied by s^2: the network's function stays the same.

The checkpoint itself is not scaled. Its config.json records s, and the plugin scales while it loads. So a reader with
bitsandbytes needs to know nothing of s, weights stay comparable with the source's, and another s changes no layer's file.
A power of two changes the exponent alone, so only values that become subnormal are rounded. They are counted here.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gptoss_nf4.errors import UserError
from gptoss_nf4.format.counts import Counts

if TYPE_CHECKING:
    import torch

AUTO = "auto"
AUTO_FLOAT16 = 2.0**-6  # room for 4.2 million, 92 times what was seen at layer 34 of the 120b
SMALLEST = 2.0**-14  # the smallest float16 that is not subnormal
KEY = "residual_scale"  # in config.json's quantization_config
# Relative error of rounding to float16 itself. Scaling must not cost more.
MAX_RELATIVE_LOSS = 2.0**-11

# The tensors of the fused checkpoint that write to the stream. Of a 4-bit weight absmax is scaled, and the codes stay.
WRITERS = re.compile(
    r"model\.(embed_tokens\.weight|layers\.\d+\.(self_attn\.o_proj|mlp\.experts\.w2)\.(bias|weight|weight\.absmax))"
)


def resolve(setting: object, dtype: str) -> float:
    """The scale that `residual_scale` of params.yaml stands for. UserError where it is neither auto nor a power of two."""
    if setting == AUTO:
        return AUTO_FLOAT16 if dtype == "float16" else 1.0
    return check_scale(setting, where=KEY)


def check_scale(scale: object, where: object) -> float:
    """Return `scale` as a float if it is a power of two from SMALLEST to 1. UserError, which names `where`, otherwise."""
    if (
        isinstance(scale, (int, float))
        and not isinstance(scale, bool)  # JSON's true is an int to Python
        and SMALLEST <= scale <= 1
        and math.frexp(scale)[0] == 0.5
    ):
        return float(scale)
    raise UserError(
        "bad residual_scale",
        where=where,
        got=repr(scale),
        expected="auto or a power of two from 2^-14 to 1",
        next_step="use residual_scale=auto",
    )


def scale_of(quantization_config: Mapping, where: object) -> float:
    """The scale that a converted checkpoint records, 1 where it records none. UserError names `where` for a bad one."""
    return check_scale(quantization_config.get(KEY, 1.0), where)


def writes_to_stream(name: str, tensor_is_floating: bool = True) -> bool:
    """Whether tensor `name` of the fused checkpoint is to be scaled. 4-bit codes, which are not floating, never are."""
    return tensor_is_floating and WRITERS.fullmatch(name) is not None


@dataclass
class ScalingLoss(Counts):
    """What multiplying `values` values by a power of two lost in their own dtype. The squares are summed in float64."""

    values: int = 0
    became_subnormal: int = 0
    became_zero: int = 0
    squared_error: float = 0.0
    squared_sum: float = 0.0

    @property
    def relative_error(self) -> float:
        """RMS error divided by RMS value. Three digits: more would depend on the order of summing."""
        return float(f"{math.sqrt(self.squared_error / self.squared_sum):.3g}") if self.squared_sum else 0.0


def scaling_loss(stored: "torch.Tensor", scale: float) -> ScalingLoss:
    """What `stored * scale` loses in the dtype of `stored` (any floating one, any shape): bits of subnormal results.

    A 16-bit dtype has 65,536 values. Counting them and looking at each once tells the same as looking at all of `stored`,
    which has to be finite.
    """
    import torch

    if stored.element_size() != 2:
        return _loss(stored, torch.ones(1, dtype=torch.float64), scale)
    patterns = stored.contiguous().view(-1).view(torch.uint16).numpy()
    counts = torch.from_numpy(np.bincount(patterns, minlength=1 << 16))
    found = counts.nonzero().view(-1)  # others may be infinities and NaN
    values = found.to(torch.int32).to(torch.int16).view(stored.dtype)
    return _loss(values, counts[found].double(), scale)


def _loss(values: "torch.Tensor", counts: "torch.Tensor", scale: float) -> ScalingLoss:
    """What `values * scale` loses. `counts`, float64: how often each of `values` counts, or [1] for once."""
    import torch

    smallest = torch.finfo(values.dtype).smallest_normal
    counts = counts.expand(values.shape)
    # float64 only for the few that may change: scaling the others is exact.
    may_change = values.abs() < smallest / scale
    few, times = values[may_change], counts[may_change]
    after, exact = (few * scale).double(), few.double() * scale
    normal_before = few.abs() >= smallest
    lost = (after == 0) & (few != 0)
    return ScalingLoss(
        values=int(counts.sum()),
        became_subnormal=int(times[normal_before & (after != 0) & (after.abs() < smallest)].sum()),
        became_zero=int(times[lost].sum()),
        squared_error=float(((after - exact).square() * times).sum()) / scale**2,
        squared_sum=float((values.double().square() * counts).sum()),
    )


def require_small(loss: ScalingLoss, name: str, scale: float) -> ScalingLoss:
    """Return `loss`, that of tensor `name`, if it is at most MAX_RELATIVE_LOSS. UserError otherwise."""
    if loss.relative_error > MAX_RELATIVE_LOSS:
        raise UserError(
            f"{KEY} {scale:g} loses too much",
            where=name,
            got=f"a relative error of {loss.relative_error:.2g}, "
            f"{loss.became_zero} of {loss.values} values became zero and {loss.became_subnormal} subnormal",
            expected=f"at most {MAX_RELATIVE_LOSS:.2g}",
            next_step=f"use a larger {KEY}, or dtype=bfloat16",
        )
    return loss


def report(losses: Mapping[str, ScalingLoss], scale: float) -> dict:
    """The section `scaling` of metrics/dtypes.json: the sums, and each tensor that lost something."""
    total = sum(losses.values(), ScalingLoss())
    return {
        KEY: scale,
        "values": total.values,
        "became_subnormal": total.became_subnormal,
        "became_zero": total.became_zero,
        "largest_relative_error": max((loss.relative_error for loss in losses.values()), default=0.0),
        # A list: of a mapping DVC would make a column for each tensor.
        "by_tensor": [
            {
                "tensor": name,
                "values": loss.values,
                "became_subnormal": loss.became_subnormal,
                "became_zero": loss.became_zero,
                "relative_error": loss.relative_error,
            }
            for name, loss in losses.items()
            if loss.became_subnormal or loss.became_zero
        ],
    }
