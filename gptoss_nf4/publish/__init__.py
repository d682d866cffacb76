"""Giving a converted checkpoint away: its model card, and uploading it to the Hugging Face hub.

- `card.py`: the model card, made from what the stages found.
- `upload.py`: one commit with everything that was proved, and nothing else.

May import `storage` and `errors`. Imported by the stages only.
"""
