"""The one exception that a user is meant to see; anything else is a bug of ours and keeps its traceback."""


class UserError(Exception):
    """A fault in the input or the set-up, told in one line: what, where, got, expected, what to do next."""

    def __init__(self, what: str, *, where: object, got: object, expected: object, next_step: str):
        line = f"{what}: {where}: got {got}, expected {expected}; {next_step}"
        super().__init__(printable(line))


def printable(text: str) -> str:
    """`text` on one line, with control characters (names may come from a checkpoint) shown as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
