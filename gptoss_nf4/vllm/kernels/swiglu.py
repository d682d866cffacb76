"""gpt-oss's clamped SwiGLU within a kernel; `gptoss_nf4.vllm.activation` is the same in torch."""

import triton
import triton.language as tl


@triton.jit
def clamped_swiglu(gate, up, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """float32 gate and up of one shape -> float32."""
    gate = tl.minimum(gate, LIMIT)
    up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
    return gate * tl.sigmoid(ALPHA * gate) * (up + 1)
