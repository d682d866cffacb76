"""What a kernel can do before its inputs are there: ask for its weights, and start while another kernel ends.

`prefetch` brings weights into the L2 cache before a load asks for them. The loop of `products` has one tile in flight
for each warp. In a small kernel, such as an attention projection, that is too little to keep the memory busy. The
experts' kernels have enough warps, and lose by it (NOTES.md).

`start_early`: on Hopper and newer a kernel may be started while the one in front of it runs ("programmatic dependent
launch" in CUDA's words, `early` here). Each of its programs waits for that one's results in `start_early`, and then
lets the next kernel start. A program that returned without waiting would let its successor write over what its
predecessor still reads.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LINE = tl.constexpr(128)  # bytes that a prefetch brings
PREFETCH = tl.constexpr("{ .reg .pred p; setp.ne.b32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }")


@triton.jit
def prefetch(address, used):
    """Ask for the lines of memory at `address`, int64 [...], where `used`. Not for the interpreter."""
    tl.inline_asm_elementwise(PREFETCH, "=r,l,r", [address, used.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def start_early(EARLY: tl.constexpr):
    """Wait until everything that earlier kernels wrote is there, then let the next kernel start."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
