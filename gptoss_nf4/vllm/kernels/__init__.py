"""The Triton kernels. They know tensors, and neither vLLM nor files.

To be read in this order: `tiles` (the order of weights in memory, and the letters of all axes), `codebook` (the contract
of decoding), `decode`, `arguments`, then the kernels in `router`, `routing`, `products`, `small`, `operands`, `large`,
`dense`, `sort` and `combine`, and those of adapters in `lora`, `shrink` and `expand`. `plan` chooses among them,
`linear_launch` and `experts_launch` start them. `variants` finds and compiles all that a product ever starts, and
`shared_memory` reckons what a launch takes.

The head has its own: `twelve_bits` (the format), `head_decode`, `head` and `head_large` (the kernels for few and for many
rows), and `head_launch`, which starts them.
"""
