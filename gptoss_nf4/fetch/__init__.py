"""Stage fetch: bringing a source, and describing what came.

- `fetch.py`: the stage.
- `hub.py`: downloading from the Hugging Face hub, with digests checked.
- `tensor_digests.py`: SHA-256 of every tensor, remembered for files that stayed the same.
- `budget.py`: the disk, memory and time that the conversion will take.

May import `samples`, `source`, `storage`, `format` and `errors`. Imported by `flow` and stage fetch.
"""
