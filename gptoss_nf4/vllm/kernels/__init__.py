"""The Triton kernels. They know tensors, and neither vLLM nor files.

To be read in this order: `tiles` (the order of weights in memory, and the letters of all axes), `codebook` (the contract
of decoding), `decode`, `arguments`, then the kernels in `small`, `large`, `lora`, `dense`, `sort` and `combine`. `plan`
chooses among them, and `launch` starts them.
"""
