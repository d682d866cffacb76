"""The conversion, one module for each stage.

- `plan.py`: what one layer becomes: its fused modules, and which of them are 4-bit.
- `dequant.py`, `requant.py`: a layer's absmax, then its fused 4-bit tensors. Neither imports torch in mode exact.
- `merge.py`: what an adapter adds to the weights, where one is merged.
- `normalize.py`: everything that is not 4-bit, in one dtype.
- `assemble.py`: the index, config and tokenizer that make the files one checkpoint.

May import `source`, `adapters`, `storage`, `format` and `errors`. Imported by `check`, `flow` and the stages.
"""
