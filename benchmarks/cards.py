"""What GPUs can do, as far as `prediction` reckons with it. Every figure has its source here.

Instructions go to pipes. NVIDIA's documentation of Nsight Compute ("Kernel Profiling Guide", Pipelines) says which go
where; a scheduler issues one a cycle, and a pipe of 16 lanes takes a warp's instruction every other cycle. Widths are those
of the "CUDA C++ Programming Guide", Throughput of Native Arithmetic Instructions, for compute capabilities 8.6 and 9.0.
"""

import re
from dataclasses import dataclass, replace

SCHEDULERS = 4  # of a multiprocessor, on all of them

# Opcodes of machine code by the pipe that takes them. All that begin with U are uniform.
PIPES = {
    "tensor": "HMMA HGMMA IMMA WARPGROUP",
    "caches": "LD LDG LDS LDL LDC ST STG STS STL LDSM STSM LDGSTS LDGDEPBAR ATOM ATOMG ATOMS RED REDUX MATCH SHFL"
    " CCTL CCTLL ERRBAR MEMBAR SYNCS",
    "control": "BRA BRX EXIT BSSY BSYNC BREAK BAR NOP DEPBAR WARPSYNC CALL RET S2R S2UR CS2R YIELD ACQBULK PREEXIT"
    " NANOSLEEP BMOV FENCE",
    "special": "MUFU I2F F2I F2F FRND POPC FLO I2FP BREV",
    "wide product": "IMAD.WIDE IMAD.HI",
    "heavy": "IMAD IDP IMUL HFMA2 HADD2 HMUL2 HSETP2",
    "float": "FFMA FADD FMUL FSWZADD",
    "integer": "PRMT LOP3 LOP SHF SHL SHR LEA IADD IADD3 VIADD VIADDMNMX ISETP PLOP3 SEL FSEL FSETP FMNMX IMNMX VIMNMX"
    " VIMNMX3 SGXT BMSK IABS MOV MOVM P2R R2P F2FP VOTE HMNMX2 FCHK PSETP",
    "uniform": "R2UR VOTEU",
}
_PIPE_OF = {opcode: pipe for pipe, opcodes in PIPES.items() for opcode in opcodes.split()}

# Cycles for which an instruction of a warp occupies its pipe of one scheduler.
CYCLES = {
    "control": 0,  # the issue slot is all that it takes here
    "uniform": 2,
    "special": 8,  # 16 lanes of the multiprocessor
    "heavy": 2,  # 16 lanes: products of integers and packed halves
    "wide product": 4,  # two passes of the same lanes; assumed
    "float": 1,  # 32 lanes
    "integer": 2,  # 16 lanes
}
# One pipe serves several kinds.
SHARED_PIPES = {"heavy": "product", "wide product": "product", "float": "product"}
MEMORY_BYTES = 128  # a cycle, of a multiprocessor's L1 cache and shared memory
# A warp's HMMA.16816 is 2048 products. GA102: 71 TFLOPS with sums in float32 are 64 products a cycle for each scheduler.
# H100: 989 TFLOPS are 512, of which mma.sync gets about half (arXiv 2402.13499, Tensor Core).
HMMA_CYCLES = {86: 32, 90: 8}
HMMA_PRODUCTS = {"16816": 2048, "1688": 1024}
# Of wgmma, which four warps issue together: its shape is in the opcode. 989 TFLOPS are 512 products a cycle and scheduler.
HGMMA_SHAPE = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)\.")
HGMMA_PRODUCTS_A_CYCLE = 512


@dataclass(frozen=True)
class Card:
    """A GPU. Latency is that of memory while it is busy."""

    name: str
    capability: int
    multiprocessors: int
    clock_ghz: float
    read_gb_s: float
    latency_ns: float
    warps: int
    programs: int
    shared_bytes: int
    l2_bytes: int
    registers: int = 65536

    def at(self, read_gb_s: float, clock_ghz: float) -> "Card":
        """The same card as it was measured."""
        return replace(self, read_gb_s=read_gb_s, clock_ghz=clock_ghz)


# Share of the bandwidth on paper that a kernel gets which only reads: an H100's 3.09 of 3.35 TB/s (NOTES.md).
READ_SHARE = 3.09 / 3.35
# Twice the 466 (A100) to 479 (H100) cycles of a load while memory is idle (arXiv 2402.13499, Memory), at about 1.75 GHz.
LATENCY_NS = 540.0

# NVIDIA, "Ampere GA102 GPU Architecture", table of the GeForce RTX 3090; limits of a multiprocessor: "CUDA C++ Programming
# Guide", Compute Capabilities.
RTX_3090 = Card(
    name="RTX 3090",
    capability=86,
    multiprocessors=82,
    clock_ghz=1.695,
    read_gb_s=936 * READ_SHARE,
    latency_ns=LATENCY_NS,
    warps=48,
    programs=16,
    shared_bytes=100 * 1024,
    l2_bytes=6 << 20,
)
# NVIDIA, "H100 Tensor Core GPU Architecture"; the clock is that of its 989.4 TFLOPS: 4096 operations a cycle on 132.
H100 = Card(
    name="H100 SXM",
    capability=90,
    multiprocessors=132,
    clock_ghz=1.83,
    read_gb_s=3090,
    latency_ns=LATENCY_NS,
    warps=64,
    programs=32,
    shared_bytes=228 * 1024,
    l2_bytes=50 << 20,
)
# The same chip with other memory: 4.8 TB/s on paper, of which a kernel that only reads got 4.32 (NOTES.md); 60 MB of L2.
H200 = replace(H100, name="H200", read_gb_s=4320, l2_bytes=60_000_000)
CARDS = {86: RTX_3090, 90: H200}


def pipe_of(opcode: str) -> str:
    """The pipe of an opcode with its modifiers; KeyError for one that is not in `PIPES`."""
    base, *modifiers = opcode.split(".")
    for name in (".".join([base, *modifiers[:1]]), base):
        if name in _PIPE_OF:
            return _PIPE_OF[name]
    if base.startswith("U"):
        return "uniform"
    raise KeyError(f"machine instruction {opcode}: its pipe is not known; add it to benchmarks.cards.PIPES")


def products(opcode: str) -> int:
    """Multiplications of a warp by a tensor-core instruction; 0 for those that only wait."""
    if shape := HGMMA_SHAPE.match(opcode):
        m, n, k = map(int, shape.groups())
        return m * n * k // 4
    return next((count for shape, count in HMMA_PRODUCTS.items() if f".{shape}." in f"{opcode}."), 0)


def cycles(opcode: str, capability: int) -> float:
    """For which a warp's instruction occupies its pipe, of one scheduler."""
    pipe = pipe_of(opcode)
    if pipe == "tensor":
        if opcode.startswith("HGMMA"):
            return products(opcode) / HGMMA_PRODUCTS_A_CYCLE
        return HMMA_CYCLES[capability] * products(opcode) / HMMA_PRODUCTS["16816"]
    if pipe == "caches":  # the multiprocessor's schedulers share it
        width = 16 if ".128" in opcode or opcode.startswith("LDSM") else 8 if ".64" in opcode else 4
        return SCHEDULERS * max(1.0, 32 * width / MEMORY_BYTES)
    return CYCLES[pipe]
