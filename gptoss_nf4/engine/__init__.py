"""Driving vLLM: generating for stage smoke, measuring for stage benchmark. vLLM loads the plugin by itself.

- `generate.py`: greedy generation with log-probabilities.
- `serve.py`: the arguments of `vllm serve` for a checkpoint, its adapters and the memory that there is.
- `noise.py`: warnings that say nothing about a run of ours.
- `forecast.py`: the seconds and the memory that generating on a CPU will take.
- `measure.py`: time to first token, tokens per second, memory.

May import `check.agreement` and `format`. Imported by the stages and the benchmarks.
"""
