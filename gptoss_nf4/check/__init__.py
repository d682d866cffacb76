"""Checks of a finished checkpoint, and the references that they compare it with. The proof is a room of its own.

- `merge.py`: where an adapter is merged, what of it quantizing lost.
- `fitting.py`: the files hold the tensors that config.json asks for.
- `audit.py`: that, and one dtype throughout.
- `weights.py`: weights as bitsandbytes dequantizes them.
- `reference.py`: transformers' gpt-oss in float32 on the source's weights, a layer at a time.
- `agreement.py`: an engine's log-probabilities against the reference's.

May import `convert`, `source`, `adapters`, `storage`, `format` and `errors`. Imported by `flow`, the stages and the
benchmarks. The plugin imports only `fitting`, and `engine` only `agreement`.
"""
