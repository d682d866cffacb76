"""bitsandbytes without torch's compiler, whose modules take three times as long to import as both.

bitsandbytes 0.50 gives `torch.compile` a function for backends that have no kernel of their own, and that imports the
compiler. The CPU and CUDA have kernels, so nothing that is left out here would ever run.
"""

from typing import Any


def import_bitsandbytes() -> None:
    """Import bitsandbytes, so that later imports find it. Before other threads run: torch is another one meanwhile."""
    import torch

    def uncompiled(function: Any = None, **options: object) -> Any:
        return (lambda each: each) if function is None else function

    compiling = torch.compile
    setattr(torch, "compile", uncompiled)  # noqa: B010  mypy refuses the assignment
    try:
        import bitsandbytes  # noqa: F401
    finally:
        setattr(torch, "compile", compiling)  # noqa: B010
