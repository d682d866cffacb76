"""Sources: telling the layouts of gpt-oss checkpoints apart, and reading all of them through one interface.

- `interface.py`: that interface. Everything above knows a source by it alone.
- `layouts.py`: which layouts can be read, and opening a checkpoint.
- `split.py`: Unsloth's published layout, in which each expert's weight is a tensor of its own.
- `fused.py`: transformers' layout, in which a layer's experts are one tensor: 16-bit, or 4-bit by bitsandbytes.
- `stored.py`: what the two share. `packed.py`: one 4-bit tensor and the sidecars beside it.
- `wrappers.py`: undoing what PEFT, torch.compile and others do to names.
- `refused.py`: what cannot be read, told apart and named.
- `side_files.py`: tokenizer, chat templates and generation config, as transformers loads them.
- `model.py`: the `model` section of the settings, and opening what stage fetch brought.

May import `storage`, `format` and `errors`. Imported by `fetch`, `samples`, `convert`, `check` and the stages.
"""
