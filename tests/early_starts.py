"""What Triton's first form of a kernel (TTIR) says of an early start: what happens before it waits for its predecessors.

A kernel that starts before the one in front of it has ended may read its own weights at once. All else that it reads may
still be written, and what it writes may still be read, until it has executed `griddepcontrol.wait` (PTX ISA, "Parallel
Synchronization and Communication Instructions"). A program that returns without it lets its successors do so too early.
"""

import re
from dataclasses import dataclass

# As inline assembly up to Triton 3.8, as operations of their own since.
WAIT = re.compile(r"griddepcontrol\.wait|grid_dependency_wait")
NEXT = re.compile(r"griddepcontrol\.launch_dependents|grid_dependency_launch_dependents")
NAME = r"%[\w.]+"
TOUCHES = ("tt.load", "tt.store", "tt.atomic")


@dataclass(frozen=True)
class Touch:
    """A load or store: the pointers among the kernel's arguments that its address comes from."""

    operation: str
    pointers: frozenset[str]


def blocks(ttir: str) -> list[list[str]]:
    """The function's lines, cut where control may leave: at its conditional branches. Loops and ifs lie within a block."""
    body = ttir[ttir.index("tt.func public") :]
    lines = body[: body.index("\n  } loc")].splitlines()
    found: list[list[str]] = [[]]
    for line in lines[1:]:
        if line.startswith("  ^bb"):  # deeper ones are those of reductions
            found.append([])
        else:
            found[-1].append(line)
    return found


def pointers(ttir: str) -> list[str]:
    """Names of the function's arguments that are pointers: %x, %weight, %weight_0 (%weight.codes since Triton 3.9)."""
    header = next(line for line in ttir.splitlines() if "tt.func public" in line)
    return re.findall(rf"({NAME}): !tt.ptr", header)


def touches(ttir: str) -> list[tuple[int, int, Touch | str]]:
    """In the order of the text: block, depth (1 is the function's own level), and a Touch, "wait", "next" or "return"."""
    roots = {name: frozenset([name]) for name in pointers(ttir)}
    found: list[tuple[int, int, Touch | str]] = []
    for number, lines in enumerate(blocks(ttir)):
        for line in lines:
            depth = (len(line) - len(line.lstrip())) // 2 - 1
            text = re.sub(r" loc\(.*$", "", line.strip())
            marks = {"wait": WAIT.search(text), "next": NEXT.search(text), "return": text.startswith("tt.return")}
            found += [(number, depth, mark) for mark, seen in marks.items() if seen]
            parts = re.match(rf"({NAME}[^=]*) = (.*)", text)
            results, operation = parts.groups() if parts else ("", text)
            operands = re.findall(NAME, operation)
            of_operands = frozenset().union(*(roots.get(name, frozenset()) for name in operands))
            kind = operation.split(" ", 1)[0]
            if kind.startswith(TOUCHES):
                address = frozenset(roots.get(operands[0], frozenset()))
                assert address, f"an address from nowhere: {text}"
                found.append((number, depth, Touch(kind, address)))
                of_operands = frozenset()  # what was loaded is no address
            for name in re.findall(NAME, results):
                roots[name] = of_operands
            for inner, outer in re.findall(rf"({NAME}) = ({NAME})", operation):  # what a loop carries along
                roots[inner] = roots.get(outer, frozenset())
    return found


def faults(ttir: str, may_read: str) -> list[str]:
    """Why the kernel may not start early, one line each. may_read: a pattern of the arguments that it may read at once."""
    wrong, waited = [], set()
    for block, depth, what in touches(ttir):
        if what == "wait" and depth == 1:
            waited.add(block)
        if waited & {0, block}:  # every program has come through the first block
            continue
        if what == "next":
            wrong.append("the next kernel may start before this one has waited")
        elif what == "return":
            wrong.append("a program returns without having waited")
        elif isinstance(what, Touch):
            allowed = what.operation == "tt.load" and all(re.fullmatch(may_read, name) for name in what.pointers)
            wrong += [] if allowed else [f"{what.operation} of {', '.join(sorted(what.pointers))} before it waits"]
    return wrong
