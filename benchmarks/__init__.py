"""Benchmarks that anyone can run, on weights that they make themselves: `python -m benchmarks.serving`, `.kernels`."""
