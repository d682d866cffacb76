"""Before a model is served: its kernels are compiled, all of them, and each shows on this machine that it computes right.

- `products.py`: what the layers compute. Each product can start its kernels for any number of tokens, and can be tried
  against plain torch. A new kernel joins by a product of its own, or as a part of one.
- `ladder.py`: what is given up where a product fails, one thing after the other: early starts, the table in shared memory,
  at last the kernels themselves. Each costs speed, never a result.
- `prepare.py`: the process's memory of it. Layers ask here, when they are made, whether kernels compute them.

A wrong or missing kernel shows here and nowhere else: in a running server it would be noise in the answers.

May import `gptoss_nf4.vllm.kernels`, `activation`, `format` and `errors`; imported by the layers' methods and by `lora`.
"""
