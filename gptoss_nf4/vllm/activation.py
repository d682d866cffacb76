"""gpt-oss's clamped SwiGLU."""

import torch

from gptoss_nf4.format.config_fields import SWIGLU_ALPHA, SWIGLU_LIMIT


def clamped_swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """The activation of `gate_up` [..., 2n], gate in even and up in odd columns: [..., n] in the same dtype."""
    gate = gate_up[..., 0::2].clamp(max=SWIGLU_LIMIT)
    up = gate_up[..., 1::2].clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
    return gate * torch.sigmoid(SWIGLU_ALPHA * gate) * (up + 1)
