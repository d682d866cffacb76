"""Sources: telling the layouts of gpt-oss checkpoints apart, and reading all of them through one interface.

- `interface.py`: that interface. Everything above knows a source by it alone.
- `layouts.py`: which layouts can be read, and the advice for the others.
- `split.py`: Unsloth's published layout, in which each expert's weight is a tensor of its own.
- `model.py`: the `model` section of the settings, and opening what stage fetch brought.

May import `storage`, `format` and `errors`. Imported by `fetch`, `samples`, `convert`, `check` and the stages.
"""
