"""Driving vLLM: generating for stage smoke, measuring for stage benchmark. vLLM loads the plugin by itself.

- `generate.py`: greedy generation with log-probabilities.
- `measure.py`: time to first token, tokens per second, memory.

May import `check.agreement`. Imported by the stages and the benchmarks.
"""
