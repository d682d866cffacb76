"""What a launch takes of the shared memory, reckoned before it is made.

Triton knows what it allocates itself (`metadata.shared`, CUDA's dynamic shared memory). It does not know what a kernel's
inline assembly declares (static), as `decode.fill_shared` does. CUDA gives a program 48 KiB of both together, unless the
kernel asks for more. Triton asks only where its own part passes 48 KiB (loadBinary in triton/backends/nvidia/driver.c).
So a launch that takes 32 KiB of one and 24 KiB of the other would fail, with "invalid argument". `ask_when_loaded` lets
Triton ask for such kernels too.
"""

import ctypes
import struct
from functools import cache
from typing import NamedTuple

import triton
from triton.compiler import CompiledKernel

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


def limit(of_multiprocessor: int) -> int:
    """How many bytes a program may have in all. of_multiprocessor: bytes that a multiprocessor has."""
    return of_multiprocessor - CUDAS_OWN_BYTES


# Numbers of CUDA's driver API (cuda.h).
STATIC_BYTES = 1  # CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
MAX_DYNAMIC_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
MAX_BYTES_OF_A_PROGRAM = 97  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN


@cache
def ask_when_loaded() -> None:
    """From now on, a kernel that declares shared memory of its own may have all that a program can, see above."""
    triton.knobs.runtime.kernel_load_end_hook.add(_ask)


def _ask(module: object, function: int, name: str, metadata_group: dict, hash: str) -> None:
    """Triton's hook for a kernel that was loaded. `function`: CUDA's handle of it."""
    driver = ctypes.CDLL("libcuda.so.1")
    handle, static, most, device = ctypes.c_void_p(function), ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    failed = driver.cuFuncGetAttribute(ctypes.byref(static), STATIC_BYTES, handle)
    if failed or static.value <= CUDAS_OWN_BYTES:
        return
    failed = driver.cuCtxGetDevice(ctypes.byref(device))
    failed = failed or driver.cuDeviceGetAttribute(ctypes.byref(most), MAX_BYTES_OF_A_PROGRAM, device)
    if not failed:  # and if it does: the launch says what is wrong
        driver.cuFuncSetAttribute(handle, MAX_DYNAMIC_BYTES, most.value - static.value)
