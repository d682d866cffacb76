"""Sources that need no download.

- `embedded.py`: a small gpt-oss of random weights, written by bitsandbytes itself in the published layout.
- `synthetic.py`: the published layout at full size, filled with random codes, for measuring the conversion.

May import `source`, `storage`, `format` and `errors`. Imported by `fetch`, tests and benchmarks.
"""
