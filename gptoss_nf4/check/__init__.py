"""Checks of a finished checkpoint, and what they compare it with.

- `proof.py`: every weight against the source's, through bitsandbytes.
- `fitting.py`, `audit.py`: the files hold what config.json says; one dtype throughout.
- `weights.py`: weights as bitsandbytes reads them.
- `reference.py`: transformers' gpt-oss in float32 on the source's weights.
- `agreement.py`: an engine's log-probabilities against the reference's.

May import `convert`, `source`, `storage`, `format` and `errors`. Imported by `flow`, the stages and the benchmarks; the
plugin imports `fitting` alone, `engine` `agreement` alone.
"""
