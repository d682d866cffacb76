"""What the bytes mean: pure functions and tables that know nothing of files.

- `config_fields.py`, `rope.py`, `switches.py`: every field of config.json, and which of them vLLM would ignore.
- `dimensions.py`: a model's counts and widths, from its config.json.
- `names.py`: the table of names, and which tensors make which fused one.
- `codec.py`, `bnb.py`: 4-bit codes to values, by our own code and by bitsandbytes'.
- `quant_state.py`: bitsandbytes' quantization state.
- `rows.py`: moving whole rows, which changes no weight.
- `blocks.py`: the dimension along which blocks run, and turning codes from one to the other, which changes none either.
- `dtypes.py`, `cast.py`, `counts.py`: names of dtypes, casting, and counts of what is lost.
- `residual.py`: the scale that keeps the residual stream inside float16.
- `result.py`: which tensors a converted checkpoint holds.

May import `errors`. Imported by everything above, the plugin and its kernels included.
"""
