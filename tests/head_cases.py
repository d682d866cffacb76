"""The head's kernels against the weight that was packed; prints, as JSON, what differs. On a GPU, or in the interpreter.

The interpreter has to be chosen before the kernels are imported, hence a script.
"""

import json
import os
import sys

import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

from kernel_cases import poison, relative  # noqa: E402

from gptoss_nf4.vllm.kernels import head_launch, twelve_bits  # noqa: E402
from gptoss_nf4.vllm.kernels.head_launch import Few, Many  # noqa: E402

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
PLANS = [
    (1, None),
    (5, Few(rows=8, warps=4, tiles=1)),
    (8, Few(rows=8, warps=1, tiles=1)),
    (16, None),
    (20, Few(rows=32, warps=4, tiles=2)),
    (17, None),
    (40, None),
    (65, None),
    (128, Many(rows=128, warps=4, tiles=8, stages=4)),
    (130, Many(rows=128, warps=4, tiles=8, stages=3)),
    (48, Many(rows=32, warps=4, tiles=8, stages=2)),
    (head_launch.MAX_ROWS + 1, None),
]


def main() -> None:
    torch.manual_seed(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    twelve_bits.MAX_ESCAPES = 1  # small weights have too few values for a share
    twelve_bits.CHUNK = 3  # parts that do not divide the weight
    head_launch.DENSE_ROWS = 32
    for dtype in (torch.bfloat16, torch.float16):
        weight = odd_weight(dtype)
        packed = twelve_bits.pack(weight)
        report_bits(weight, packed)
        if ON_GPU or dtype == torch.float16:  # in the interpreter products of bfloat16 are products of bit patterns
            report_products(weight, packed)


def report_bits(weight: torch.Tensor, packed: twelve_bits.TwelveBits) -> None:
    dtype = weight.dtype
    report("escapes in a tile", dtype, most=int(packed.starts.diff().max()), none=int(packed.starts.diff().min()))
    report("unpacked", dtype, different=different(poison(lambda: head_launch.dequantize(packed)), weight))
    part = poison(lambda: head_launch.dequantize(packed, first=32, rows=20))
    report("unpacked in part", dtype, different=different(part, weight[32:52]))


def report_products(weight: torch.Tensor, packed: twelve_bits.TwelveBits) -> None:
    dtype = weight.dtype
    for rows, plan in PLANS:
        x = torch.randn(rows, weight.shape[1], device=DEVICE).to(dtype)
        out = poison(lambda x=x, plan=plan: head_launch.linear(x, packed, plan=plan))
        report(f"{rows} rows, {plan}", dtype, error=relative(out, x.double() @ weight.double().T))
    x = torch.randn(3, weight.shape[1], device=DEVICE).to(dtype)
    bias = torch.randn(len(weight), device=DEVICE).to(dtype)
    out = poison(lambda: head_launch.linear(x, packed, bias))
    report("with a bias", dtype, error=relative(out, x.double() @ weight.double().T + bias.double()))
    report("proof", dtype, **proofs(packed, weight))


def odd_weight(dtype: torch.dtype) -> torch.Tensor:
    """100 rows, not whole tiles, and three input tiles, with all that needs care."""
    weight = (torch.randn(100, 192, device=DEVICE) * 0.02).bfloat16()
    weight[:16, ::3] = torch.exp2(-24 * torch.rand(16, 64, device=DEVICE)).bfloat16()  # escapes: several times 32
    weight[16:32] = weight[16:32].abs().clamp(2.0**-8, 2.0**-3)  # none
    weight[40] = 0
    weight[41, 5] = -0.0
    weight[42, 0] = weight[42, 191] = 2.0**-24  # the smallest of float16
    weight[99, 191] = 3.0
    return weight.to(dtype)


def proofs(packed: twelve_bits.TwelveBits, weight: torch.Tensor) -> dict[str, object]:
    """What `flaw` says of the packed weight, and of the same with one thing wrong."""

    def changed(field: str, change) -> str | None:
        tensor = getattr(packed, field).clone()
        change(tensor.view(-1))
        return head_launch.flaw(packed._replace(**{field: tensor}), weight)

    def flip(tensor: torch.Tensor) -> None:
        tensor[len(tensor) // 2] ^= 1 << 9

    return {
        "right": head_launch.flaw(packed, weight),
        "words": changed("words", flip),
        "table": changed("table", flip),
        "places": changed("places", lambda places: places.add_(16)),
        "escapes": changed("escapes", lambda escapes: escapes.neg_()),
    }


def different(result: torch.Tensor, expected: torch.Tensor) -> int:
    return int((result.view(torch.int16) != expected.view(torch.int16)).sum())


def report(case: str, dtype: torch.dtype, **results: object) -> None:
    print(json.dumps({"case": case, "dtype": str(dtype), **results}), flush=True)


if __name__ == "__main__":
    main()
