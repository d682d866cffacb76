"""The Triton kernels: they know tensors, and neither vLLM nor files. `launch` is their only entrance."""
