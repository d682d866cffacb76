"""What the kernels compile to for a GPU that need not be here.

    python -m benchmarks.machine_code [86]

Every launch that gpt-oss-20b makes is recorded and compiled for the compute capability: registers, spills and shared
memory, and the machine instructions of the innermost loop per 4-bit weight.
"""

import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from benchmarks.tables import markdown
from benchmarks.weights import GPT_OSS_20B
from gptoss_nf4.format.dimensions import Dimensions
from gptoss_nf4.vllm.kernels import combine, dense, large, launch, small, sort, tiles
from gptoss_nf4.vllm.kernels.launch import Packed, Routing

TOKENS = (1, 8, 32, 64, 128, 256, 2048)
LINEAR_ROWS = (1, 16, 32, 64)
HOPPER_SHARED_MEMORY = 228 * 1024  # bytes of a multiprocessor
KERNELS = [
    (small, "product"),
    (large, "swiglu_experts"),
    (large, "down_experts"),
    (dense, "dequantize"),
    (combine, "_sum_slots"),
    (sort, "_sort_slots"),
]
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Launch:
    """One launch as recorded: `arguments` by name, tensors on the meta device."""

    kernel: str
    function: object
    arguments: tuple
    options: tuple

    def source(self) -> ASTSource:
        constants = {n: v for n, v in self.arguments if n.isupper() and n not in ("K", "N")}
        signature, attributes = {}, {}
        for place, (name, value) in enumerate(self.arguments):
            if name in constants:
                signature[name] = "constexpr"
            elif isinstance(value, torch.Tensor):
                signature[name] = POINTERS[value.dtype]
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
            # As Triton specializes at a launch: allocations are aligned, and so are most widths.
            if isinstance(value, torch.Tensor) or (isinstance(value, int) and name not in constants and value % 16 == 0):
                attributes[(place,)] = [["tt.divisibility", 16]]
        places = {name: place for place, (name, _) in enumerate(self.arguments)}
        return ASTSource(self.function, signature, {(places[n],): v for n, v in constants.items()}, attributes)

    @property
    def label(self) -> str:
        shown = ("BM", "WARPS", "GATED", "EXPERTS", "SORTED", "SHARED", "STAGES", "PAIR", "S", "SLOTS")
        settings = ", ".join(f"{n} {v}" for n, v in self.arguments if n in shown)
        out = dict(self.arguments).get("out", dict(self.arguments).get("slots"))
        return f"{self.kernel} {out.dtype}".replace("torch.", "") + f" ({settings})"


@contextmanager
def recorded(wgmma: bool) -> Iterator[list[Launch]]:
    """Collect launches instead of making them; `wgmma`: choose as on Hopper."""
    launches: list[Launch] = []

    class Recorder:
        def __init__(self, module, name):
            self.function = getattr(module, name)
            self.kernel = f"{module.__name__.rsplit('.', 1)[1]}.{name}"

        def __getitem__(self, grid):
            def record(*positional, **named):
                names = self.function.arg_names
                given = dict(zip(names, positional, strict=False)) | {n: v for n, v in named.items() if n in names}
                options = tuple((n, v) for n, v in named.items() if n not in names)
                arguments = tuple((n, given[n]) for n in names)
                launches.append(Launch(self.kernel, self.function, arguments, options))

            return record

    with ExitStack() as patches:
        for module, name in KERNELS:
            patches.enter_context(mock.patch.object(module, name, Recorder(module, name)))
        patches.enter_context(mock.patch.object(launch, "_has_wgmma", return_value=wgmma))
        memory = HOPPER_SHARED_MEMORY if wgmma else 0
        patches.enter_context(mock.patch.object(launch, "_shared_memory", return_value=memory))
        patches.enter_context(mock.patch.object(launch, "INTERPRETED", False))
        yield launches


def packed(experts: int, rows: int, columns: int, blocksize: int) -> Packed:
    inputs = tiles.tile_inputs(blocksize)
    codes = torch.empty(experts, rows // 16, columns // inputs, 32, inputs // 16, dtype=torch.int32, device="meta")
    absmax = torch.empty(experts, rows // 16, columns // blocksize, 16, dtype=torch.float16, device="meta")
    bias = torch.empty(experts, rows, dtype=torch.bfloat16, device="meta")
    return Packed(codes, absmax, bias, blocksize, "nf4")


def launches(d: Dimensions, dtype: torch.dtype, wgmma: bool, blocksize: int = 64) -> list[Launch]:
    """Every distinct launch of a model, by kernel and settings."""
    w13 = packed(d.experts, 2 * d.intermediate, d.hidden, blocksize)
    w2 = packed(d.experts, d.hidden, d.intermediate, blocksize)
    qkv, o = packed(1, d.q_rows + 2 * d.kv_rows, d.hidden, blocksize), packed(1, d.hidden, d.q_rows, blocksize)
    meta = torch.device("meta")
    with recorded(wgmma) as found, mock.patch.object(launch, "codebook", _meta_codebook):
        for tokens in TOKENS:
            plan = launch.plan_experts(tokens, d.experts_per_token, d.experts, meta)
            blocks = torch.empty(8, dtype=torch.int32, device=meta)
            routing = Routing(None, blocks, None) if tokens == 1 else Routing(blocks, blocks, blocks)
            if sort.fits(tokens * d.experts_per_token, d.experts):
                ids = torch.empty(tokens, d.experts_per_token, dtype=torch.int32, device=meta)
                sort.sort_slots(ids, plan.rows, d.experts)
            x = torch.empty(tokens, d.hidden, dtype=dtype, device=meta)
            launch.experts(x, torch.empty(tokens, d.experts_per_token, device=meta), routing, w13, w2, plan)
        for rows, (weight, outputs) in itertools.product(LINEAR_ROWS, ((qkv, d.q_rows + 2 * d.kv_rows), (o, d.hidden))):
            inputs = weight.codes.shape[2] * weight.codes.shape[4] * 16
            launch.linear(torch.empty(rows, inputs, dtype=dtype, device=meta), weight, outputs)
        launch.dequantize(qkv, d.q_rows + 2 * d.kv_rows, dtype)
    return list({each.label: each for each in found}.values())


def _meta_codebook(quant_type: str, dtype: torch.dtype, device: torch.device):
    from gptoss_nf4.vllm.kernels.codebook import Codebook

    return Codebook(torch.empty(11, 32, dtype=torch.int32, device="meta"), 1.5)


@dataclass(frozen=True)
class Report:
    """Of one kernel: bytes of shared memory a program, instructions in its longest loop, weights a lane decodes there."""

    label: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    loop: int | None
    weights: int


def report(each: Launch, capability: int) -> Report:
    """Compile `each` for `capability` (86 is an RTX 3090) and read what came out."""
    compiled = triton.compile(each.source(), target=GPUTarget("cuda", capability, 32), options=dict(each.options))
    with tempfile.TemporaryDirectory() as directory:
        ptx = Path(directory) / "kernel.ptx"
        ptx.write_text(compiled.asm["ptx"])
        # Hopper's own instructions belong to sm_90a.
        arch = f"sm_{capability}a" if capability == 90 else f"sm_{capability}"
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={arch}", ptx, "-o", f"{directory}/kernel.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        disassemble = [BIN / "cuobjdump", "-sass", f"{directory}/kernel.cubin"]
        sass = subprocess.run(disassemble, capture_output=True, text=True).stdout
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", said)]
    # Triton counts only what it allocates itself; the codebook's table stands beside it.
    shared = compiled.metadata.shared + sum(int(n) for n in re.findall(r"(\d+) bytes smem", said))
    registers = int(re.search(r"Used (\d+) registers", said)[1])
    settings = dict(each.arguments)
    pair = 2 if each.kernel.endswith("swiglu_experts") or settings.get("PAIR") else 1
    weights = 8 * settings.get("S", 0) * pair
    return Report(each.label, registers, sum(spills), shared, loop_length(sass), weights)


def loop_length(sass: str) -> int | None:
    """Instructions of the longest innermost loop: from the target of a backward branch to the branch."""
    places = [int(m[1], 16) for m in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+\S", sass)]
    loops = []
    for match in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+[^;]*\bBRA\b[^;]*?(0x[0-9a-f]+)", sass):
        end, start = int(match[1], 16), int(match[2], 16)
        if start < end:
            loops.append(sum(start <= place <= end for place in places))
    return max(loops, default=None)


def main() -> None:
    capability = int(sys.argv[1]) if len(sys.argv) > 1 else 86
    rows = []
    for each in launches(GPT_OSS_20B, torch.bfloat16, wgmma=capability == 90):
        r = report(each, capability)
        per_weight = r.loop / r.weights if r.loop and r.weights else None
        rows.append([r.label, r.registers, r.spilled_bytes, r.shared_bytes, r.loop, per_weight and f"{per_weight:.2f}"])
    columns = ["kernel", "registers", "spilled bytes", "shared bytes", "loop", "instructions a weight"]
    print(markdown(columns, rows))


if __name__ == "__main__":
    main()
