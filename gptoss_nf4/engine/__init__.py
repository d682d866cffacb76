"""What drives vLLM: generating for stage smoke, measuring for stage benchmark. Not the plugin, which vLLM loads by itself.

- `generate.py`: greedy generation with log-probabilities.
- `measure.py`: time to first token, tokens per second, memory.

May import `check.agreement`. Imported by the stages and the benchmarks.
"""
