"""What a launch takes of the shared memory, reckoned before it is made.

Triton knows what it allocates itself (`metadata.shared`, CUDA's dynamic shared memory). It does not know what a kernel's
inline assembly declares (static), as `decode.fill_shared` does. CUDA gives a program 48 KiB of both together, unless the
kernel asks for more. Triton asks only where its own part passes 48 KiB (loadBinary in triton/backends/nvidia/driver.c).
So a launch that takes 32 KiB of one and 24 KiB of the other fails, with "invalid argument".
"""

import struct
from typing import NamedTuple

from triton.compiler import CompiledKernel

WITHOUT_ASKING = 48 * 1024
CUDAS_OWN_BYTES = 1024
"""CUDA keeps so much of a multiprocessor's for each program (CUDA C++ Programming Guide, "Compute Capabilities")."""


class SharedMemory(NamedTuple):
    """Bytes that a program takes."""

    static: int
    """Declared in the machine code."""
    dynamic: int
    """Allocated by Triton."""


def shared_memory(compiled: CompiledKernel) -> SharedMemory:
    """Of a program, without CUDA's own: from Hopper on the machine code declares that too, but no limit counts it."""
    own = CUDAS_OWN_BYTES if compiled.metadata.target.arch >= 90 else 0
    return SharedMemory(max(0, declared_bytes(compiled.asm["cubin"]) - own), compiled.metadata.shared)


def declared_bytes(cubin: bytes) -> int:
    """Static shared memory of the kernels in a cubin: the sizes of its sections `.nv.shared.<kernel>`.

    A cubin is an ELF file of 64 bits (System V ABI, chapter 4: header and section header table).
    """
    (table,) = struct.unpack_from("<Q", cubin, 40)
    entry_size, entries, names_index = struct.unpack_from("<HHH", cubin, 58)

    def section(index: int) -> tuple[int, int, int]:
        """Offset of the name in the table of names, offset in the file, size."""
        name, _, _, _, offset, size = struct.unpack_from("<IIQQQQ", cubin, table + index * entry_size)
        return name, offset, size

    _, names, _ = section(names_index)
    total = 0
    for index in range(entries):
        name, _, size = section(index)
        start = names + name
        called = cubin[start : cubin.index(b"\0", start)]
        if called.startswith(b".nv.shared.") and not called.startswith(b".nv.shared.reserved"):
            total += size
    return total


def limit(takes: SharedMemory, of_multiprocessor: int) -> int:
    """How many bytes a program that `takes` so much may have in all. of_multiprocessor: bytes that a multiprocessor has."""
    return WITHOUT_ASKING if takes.dynamic <= WITHOUT_ASKING else of_multiprocessor - CUDAS_OWN_BYTES
