"""Runs the functions of `kernels.decode` with their inline assembly, without a GPU; prints wrong weights as JSON lines.

    python tests/ptx_cases.py

Triton's interpreter runs the functions, and `ptx` their assembly, which the interpreter does not know. It has to be chosen
before the kernels are imported, hence a script.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import quick_interpreter  # noqa: F401
import torch
import triton
import triton.language as tl
from emulated_assembly import emulate

from gptoss_nf4.format.codec import CODEBOOKS
from gptoss_nf4.vllm.kernels import decode, head_decode, head_launch
from gptoss_nf4.vllm.kernels.codebook import best_factor, codebook
from gptoss_nf4.vllm.kernels.twelve_bits import pack

WARPS, LANES, WORDS = 2, 32, 4
FUNCTIONS = ("decode", "lookup", "decode_scaled", "lookup_scaled", "decode_times", "lookup_times")
BITS = {torch.bfloat16: 8, torch.float16: 11}


@triton.jit
def decoded(words, absmax, table, out, HOW: tl.constexpr, dtype: tl.constexpr, W: tl.constexpr, S: tl.constexpr):
    """words int32 [W, 32, S], absmax float16 [W, 32, S, r] -> bits of the weights, uint16 [W, 32, S, p, r, h].

    For decode_times and lookup_times, absmax is int32 [W, 32, S, h], pairs.
    """
    w, lane, s = tl.arange(0, W)[:, None, None], tl.arange(0, 32)[None, :, None], tl.arange(0, S)[None, None, :]
    place = w * (32 * S) + lane * S + s
    word = tl.load(words + place)
    if HOW == "decode":
        weight = decode.decode(word, decode.load_table(table), dtype)
    elif HOW == "lookup":
        weight = decode.lookup(word, decode.fill_shared(table), dtype)
    else:
        absmax0, absmax1 = tl.load(absmax + 2 * place), tl.load(absmax + 2 * place + 1)
        if HOW == "decode_scaled":
            weight = decode.decode_scaled(word, absmax0, absmax1, decode.load_table(table), dtype)
        elif HOW == "lookup_scaled":
            weight = decode.lookup_scaled(word, absmax0, absmax1, decode.fill_shared(table), dtype)
        elif HOW == "decode_times":
            weight = decode.decode_times(word, absmax0, absmax1, decode.load_table(table), dtype, False)
        else:
            weight = decode.decode_times(word, absmax0, absmax1, decode.fill_shared(table), dtype, True)
    prh = tl.reshape(tl.arange(0, 8), [1, 1, 1, 2, 2, 2])
    tl.store(out + place[:, :, :, None, None, None] * 8 + prh, weight.to(tl.uint16, bitcast=True))


@triton.jit
def multiplied(values, absmax, out, COUNT: tl.constexpr):
    place = tl.arange(0, COUNT)
    product = decode.times(tl.load(values + place), tl.load(absmax + place))
    tl.store(out + place, product.to(tl.uint16, bitcast=True))


def expected(words: torch.Tensor, absmax: torch.Tensor | None, quant_type: str, dtype: torch.dtype) -> torch.Tensor:
    """By the contract of `codebook`, from the codec: `dtype` [W, 32, S, p, r, h]. absmax broadcasts to that."""
    p, r, h = torch.meshgrid(*[torch.arange(2)] * 3, indexing="ij")
    codes = (words[..., None, None, None].long() >> (4 * (4 * h + 2 * r + p))) & 15
    values = torch.from_numpy(CODEBOOKS[quant_type].astype(np.float64) * best_factor(quant_type, BITS[dtype])).to(dtype)
    if absmax is None:
        return values[codes]
    return (values[codes].double() * absmax.double()).to(dtype)


def main() -> None:
    torch.manual_seed(0)
    decode.COMPILED = tl.constexpr(True)
    words = torch.randint(-(1 << 31), 1 << 31, (WARPS, LANES, WORDS), dtype=torch.int32)
    # Exact in bfloat16: the interpreter cuts off where a GPU rounds.
    absmax = (torch.rand(WARPS, LANES, WORDS, 2) * 4).bfloat16().half()
    for how in FUNCTIONS:
        for dtype in BITS:
            for quant_type in CODEBOOKS:
                assembly = emulate()
                out = torch.zeros(WARPS, LANES, WORDS, 2, 2, 2, dtype=torch.uint16)
                table = codebook(quant_type, dtype, torch.device("cpu")).table
                given, scale = absmax, None
                if how.endswith("scaled"):
                    scale = absmax[..., None, :, None]
                elif how.endswith("times"):
                    pairs = torch.randn(WARPS, LANES, WORDS, 2, 2).to(dtype)  # (h p)
                    given, scale = pairs.view(torch.int32), pairs.mT[..., :, None, :]
                kind = tl.bfloat16 if dtype == torch.bfloat16 else tl.float16
                decoded[(1,)](words, given, table, out, HOW=how, dtype=kind, W=WARPS, S=WORDS)
                right = expected(words, scale, quant_type, dtype)
                wrong = int((out.view(torch.int16) != right.contiguous().view(torch.int16)).sum())
                case = {"function": how, "dtype": str(dtype), "quant_type": quant_type}
                print(json.dumps(case | {"wrong": wrong, "ran": assembly.ran}), flush=True)
    for dtype in BITS:
        values, scale = (torch.randn(512) * 100).to(dtype), torch.rand(512).to(dtype)
        out, assembly = torch.zeros(512, dtype=torch.uint16), emulate()
        multiplied[(1,)](values, scale, out, COUNT=512)
        right = (values.double() * scale.double()).to(dtype)
        wrong = int((out.view(torch.int16) != right.view(torch.int16)).sum())
        print(json.dumps({"function": "times", "dtype": str(dtype), "wrong": wrong, "ran": assembly.ran}), flush=True)
    head_decode.COMPILED = tl.constexpr(True)
    for dtype in BITS:
        weight = (torch.randn(40, 128) * 0.02).bfloat16().to(dtype)
        packed, assembly = pack(weight), emulate()
        wrong = int((head_launch.dequantize(packed).view(torch.int16) != weight.view(torch.int16)).sum())
        case = {"function": "head_decode", "dtype": str(dtype)}
        print(json.dumps(case | {"wrong": wrong, "ran": assembly.ran}), flush=True)


if __name__ == "__main__":
    main()
