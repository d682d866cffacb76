"""Which project modules a file imports, directly or through others, read from the syntax tree."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def module_file(name: str) -> Path | None:
    """The project file of a dotted module name; packages count by their __init__.py."""
    for base in (ROOT, ROOT / "stages"):
        path = base.joinpath(*name.split("."))
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None


@cache
def direct_imports(file: Path) -> set[str]:
    """Dotted names of everything that `file` imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def project_files(file: Path) -> set[str]:
    """`file` and all project files that it needs, relative to the repository."""
    seen, waiting = set(), [file]
    while waiting:
        current = waiting.pop()
        if current not in seen:
            seen.add(current)
            waiting += [path for name in direct_imports(current) if (path := module_file(name))]
    return {str(path.relative_to(ROOT)) for path in seen}
