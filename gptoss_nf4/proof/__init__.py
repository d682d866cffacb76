"""The proof that a converted checkpoint is its source: it shares nothing with the conversion.

It opens two directories. Names, order of rows, roundings and config.json are written down here once more, from the
published layouts, so that a mistake in the tables of the conversion cannot hide in the proof. 4-bit weights are compared as
bitsandbytes dequantizes them, or, behind a matrix's first rows, by codes and absmax: the same ones are the same weights.

- `prove.py`: the proof in one function, and its result.
- `names.py`: which tensors of a source make which tensor of the result.
- `config.py`: what the result's config.json must say. `bare_config.py`: transformers' class for it, without its models.
- `stored.py`: the values of a stored tensor, a few rows at a time.
- `compare.py`: comparing values: pure functions.

May import `storage`, which brings bytes, and `errors`. Imported by `flow` and stage prove.
"""
