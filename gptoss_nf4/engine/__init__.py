"""Driving vLLM: generating for stage smoke, measuring for stage benchmark. vLLM loads the plugin by itself.

- `generate.py`: greedy generation with log-probabilities.
- `forecast.py`: the seconds and the memory that generating on a CPU will take.
- `measure.py`: time to first token, tokens per second, memory.

May import `check.agreement` and `format`. Imported by the stages and the benchmarks.
"""
