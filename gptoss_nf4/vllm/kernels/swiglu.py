"""gpt-oss's clamped SwiGLU within a kernel; `gptoss_nf4.vllm.activation` is the same in torch."""

import triton
import triton.language as tl

from gptoss_nf4.format.config_fields import SWIGLU_ALPHA, SWIGLU_LIMIT

ALPHA = tl.constexpr(SWIGLU_ALPHA)
LIMIT = tl.constexpr(SWIGLU_LIMIT)


@triton.jit
def clamped_swiglu(gate, up):
    """float32 gate and up of one shape -> float32."""
    gate = tl.minimum(gate, LIMIT)
    up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
    return gate * tl.sigmoid(gate * ALPHA) * (up + 1)
