"""What README.md, CONTRIBUTING.md and docs/ say to run: the shell commands and pieces of Python in their code blocks."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from project_imports import ROOT

DOCUMENTS = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
SHELL, PYTHON, TEXT = "bash", "python", "text"


@dataclass(frozen=True)
class Block:
    """A code block: fenced, in the language behind the fence, or indented, which is shell."""

    language: str
    lines: list[str]


def text_of(document: str) -> str:
    return (ROOT / document).read_text()


def blocks(text: str) -> Iterator[Block]:
    fenced: Block | None = None
    for line in text.splitlines():
        if fenced and line.startswith("```"):
            yield fenced
            fenced = None
        elif fenced:
            fenced.lines.append(line)
        elif line.startswith("```"):
            fenced = Block(line.removeprefix("```").strip() or SHELL, [])
        elif line.startswith("    "):
            yield Block(SHELL, [line.strip()])
    assert fenced is None, "a fence is not closed"


def commands(text: str) -> list[str]:
    """Every line of the shell blocks, without prompts and comments; a line that ends in a backslash goes on in the next."""
    found = []
    for block in blocks(text):
        if block.language == SHELL:
            lines = re.sub(r"\s*\\\n\s*", " ", "\n".join(block.lines)).splitlines()
            bare = (re.sub(r"(^|\s+)#.*", "", line.strip().removeprefix("$ ")) for line in lines)
            found += [line for line in bare if line]
    return found


def snippets(text: str) -> dict[str, str]:
    """The pieces of Python by name: each begins with a comment, `# name.py`."""
    found: dict[str, str] = {}
    for block in blocks(text):
        if block.language == PYTHON:
            named = re.match(r"# (\w+\.py)\b", block.lines[0])
            assert named, f"a piece of Python without a name: {block.lines[0]}"
            assert named[1] not in found
            found[named[1]] = "\n".join(block.lines) + "\n"
    return found


def all_commands() -> set[str]:
    return {command for document in DOCUMENTS for command in commands(text_of(document))}


def all_snippets() -> dict[str, str]:
    found: dict[str, str] = {}
    for document in DOCUMENTS:
        here = snippets(text_of(document))
        assert not found.keys() & here.keys()
        found |= here
    return found
