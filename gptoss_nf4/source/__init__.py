"""Sources: telling the layouts of gpt-oss checkpoints apart, and reading each through one face.

- `interface.py`: the face. Everything above knows a source by it alone.
- `layouts.py`: the table of layouts that can be read, and what to do with the others.
- `split.py`: Unsloth's published layout, one 4-bit weight an expert.
- `model.py`: the `model` section of the settings, and opening what stage fetch brought.

May import `storage`, `format` and `errors`. Imported by `fetch`, `samples`, `convert`, `check` and the stages.
"""
