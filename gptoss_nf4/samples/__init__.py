"""Sources that need no download.

- `embedded.py`: a small gpt-oss of random weights, written by bitsandbytes itself in the published layout or the fused one.
- `synthetic.py`: both layouts at full size, filled with random codes, for measuring the conversion.
- `fused.py`: what the fused layout calls its tensors.

May import `source`, `storage`, `format` and `errors`. Imported by `fetch`, tests and benchmarks.
"""
