"""Stages fetch and adapter: bringing a source or an adapter, and describing what came.

- `fetch.py`: stage fetch.
- `adapter.py`: stage adapter.
- `hub.py`: downloading from the Hugging Face hub, with digests checked.
- `licence.py`: what a source's own card says of its licence and its base.
- `owner.py`: which source a directory of artifacts belongs to.
- `tensor_digests.py`: SHA-256 of every tensor, remembered for files that have not changed.
- `budget.py`: the disk, memory and time that the conversion will take.

May import `samples`, `source`, `adapters`, `storage`, `format` and `errors`. Imported by `flow` and the stages.
"""
