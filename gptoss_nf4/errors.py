"""The one exception that a user is meant to see. Any other is a bug of ours and keeps its traceback."""

# The next step where bytes are not those that somebody saved, and the one where config.json and the weights disagree.
COPY_AGAIN = "copy or download it again from where it is whole, or save it again"
OTHER_CONFIG = "config.json and the weights are not of one model: put the config.json there that was saved with them"
MAX_SHOWN = 600  # characters of what came


class UserError(Exception):
    """A fault in the input or the set-up, told in one line: what, where, what came, what was expected, what to do."""

    def __init__(self, what: str, *, where: object, got: object, expected: object, next_step: str):
        got = str(got)  # it may come from a stranger's file, at any length
        shown = got if len(got) <= MAX_SHOWN else f"{got[:MAX_SHOWN]}..."
        super().__init__(printable(f"{what}: {where}: got {shown}, expected {expected}; {next_step}"))


def printable(text: str) -> str:
    """`text` on one line, with control characters as escapes: it may hold names out of a stranger's checkpoint."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def first_line(error: Exception) -> str:
    """The first line of what a library's error says, at most 200 characters; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
