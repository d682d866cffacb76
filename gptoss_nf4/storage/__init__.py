"""Files: reading what strangers wrote, and writing our own.

- `reading.py`: small files: errors in one line, sizes bounded, nothing outside the directory.
- `writing.py`: the one place that writes files: beside the target, then renamed.
- `tensor_reader.py`, `tensor_writer.py`: one safetensors file, in pieces.
- `checkpoint.py`: a directory of them, every tensor by name.
- `digests.py`: SHA-256 of a checkpoint's files, recorded and verified.
- `artifacts.py`: the path of every file of a conversion.
- `progress.py`: how far reading or writing is, in bytes.
- `machine.py`: free disk space, cores and free memory.
- `repository.py`: whether a text names a Hub repository or a path.

May import `format` and `errors`. Imported by everything above.
"""
