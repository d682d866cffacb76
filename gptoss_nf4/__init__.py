"""Exact conversion of Unsloth NF4 gpt-oss checkpoints into fused 4-bit checkpoints that vLLM serves.

The library (everything outside `gptoss_nf4.vllm`) imports neither DVC, Hydra nor vLLM.
"""

__version__ = "0.1.0"
