"""gpt-oss's clamped SwiGLU."""

import torch

# transformers `modeling_gpt_oss.py` GptOssExperts; openai/gpt-oss `swiglu`.
SWIGLU_ALPHA = 1.702
SWIGLU_LIMIT = 7.0


def clamped_swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """[..., 2n] with gate in even and up in odd columns -> [..., n]."""
    gate = gate_up[..., 0::2].clamp(max=SWIGLU_LIMIT)
    up = gate_up[..., 1::2].clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
    return gate * torch.sigmoid(SWIGLU_ALPHA * gate) * (up + 1)
