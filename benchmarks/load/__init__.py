"""`vllm serve` on the embedded model under a crowd of clients, a third of whom hang up: is every answer right?

    python -m benchmarks.load [--seconds 60] [--clients 200] [--rounds 2]

The server computes in float32, with a small KV cache and small steps. So requests wait, run in chunks, take prefixes from
the cache, and are put off and computed again. First it is asked one question at a time. Those answers are compared with
transformers, and only questions are kept whose answers rounding cannot change. Then the clients ask them, all at once,
round after round. The process ends with status 1 where an answer was wrong or lost, something still runs, or memory grew.

- `questions.py`: questions with one right answer.
- `clients.py`: the crowd.
- `watching.py`: the server's metrics and its memory.
- `rounds.py`: all of it in order.
"""
