"""Blocks along the outputs in the plugin, without vLLM's engine: the CPU's dequantization, and what a rank keeps."""

import bitsandbytes.functional as bnb
import pytest
import torch

from gptoss_nf4.errors import UserError
from gptoss_nf4.format.blocks import INPUTS, OUTPUTS, rows_of_outputs
from gptoss_nf4.vllm.dequantize import dequantize
from gptoss_nf4.vllm.expert_weights import W2, W13, ExpertWeight
from gptoss_nf4.vllm.settings import Settings

LAYER = "model.layers.0.mlp.experts"
EXPERTS, HIDDEN, INTERMEDIATE = 3, 192, 320  # 640 rows of w13: a rank of four has two and a half groups of 64
WIDTHS = {W13: (2 * INTERMEDIATE, HIDDEN), W2: (HIDDEN, INTERMEDIATE)}


def transposed(rows: int, columns: int, quant_type: str = "nf4") -> tuple[torch.Tensor, bnb.QuantState, list]:
    """bitsandbytes' own codes and state of [EXPERTS, columns, rows], and the codes and absmax of each in rows."""
    weight = torch.randn(EXPERTS, columns, rows, generator=torch.Generator().manual_seed(rows))
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=quant_type)
    each = zip(packed.view(EXPERTS, -1), state.absmax.view(EXPERTS, -1), strict=True)
    return packed, state, [rows_of_outputs(codes.numpy(), absmax.numpy(), (rows, columns)) for codes, absmax in each]


def stacked(parts: list) -> tuple[torch.Tensor, torch.Tensor]:
    codes, absmax = (torch.stack([torch.from_numpy(part[kind]) for part in parts]) for kind in (0, 1))
    return codes, absmax


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [W13, W2])
def test_the_transpose_of_what_bitsandbytes_gives_bit_for_bit(kind, dtype, quant_type):
    rows, columns = WIDTHS[kind]
    packed, state, parts = transposed(rows, columns, quant_type)
    state.dtype = dtype
    expected = bnb.dequantize_4bit(packed, state).transpose(1, 2)
    codes, absmax = stacked(parts)
    assert torch.equal(dequantize(codes, absmax, 64, quant_type, dtype, OUTPUTS), expected)
    for expert in range(EXPERTS):
        one = dequantize(codes[expert], absmax[expert], 64, quant_type, dtype, OUTPUTS)
        assert torch.equal(one, expected[expert])


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_of_blocks_are_what_bitsandbytes_gives_bit_for_bit(dtype, quant_type):
    weight = torch.randn(EXPERTS, 34, HIDDEN, generator=torch.Generator().manual_seed(3))
    packed, state = bnb.quantize_4bit(weight, blocksize=32, quant_type=quant_type)
    state.dtype = dtype
    codes, absmax = packed.view(EXPERTS, 34, HIDDEN // 2), state.absmax.view(EXPERTS, 34, HIDDEN // 32)
    assert torch.equal(dequantize(codes, absmax, 32, quant_type, dtype), bnb.dequantize_4bit(packed, state))


def weight_of(kind: type[ExpertWeight], tp_size: int, tp_rank: int, directions: dict | None = None) -> ExpertWeight:
    settings = Settings("nf4", 64, "interleaved", directions=directions or {f"{LAYER}.{kind.name}": OUTPUTS})
    rows, columns = WIDTHS[kind]
    rows, columns = (rows // tp_size, columns) if kind is W13 else (rows, columns // tp_size)
    return kind(rows, columns, settings=settings, tp_size=tp_size, tp_rank=tp_rank, packed=False, prefix=LAYER)


@pytest.mark.parametrize(("tp_size", "blocksizes"), [(1, (64, 64)), (2, (64, 64)), (4, (32, 64)), (5, (64, 64))])
@pytest.mark.parametrize("kind", [W13, W2])
def test_ranks_together_have_the_whole_weight(kind, tp_size, blocksizes):
    """Of the rows that a rank has of w13, and of the columns that it has of w2. A group that is cut becomes two."""
    rows, columns = WIDTHS[kind]
    packed, state, parts = transposed(rows, columns)
    state.dtype = torch.float32
    expected = bnb.dequantize_4bit(packed, state).transpose(1, 2)
    stored, found = stacked(parts), []
    for tp_rank in range(tp_size):
        weight = weight_of(kind, tp_size, tp_rank)
        assert (weight.blocks_along, weight.blocksize) == (OUTPUTS, blocksizes[kind is W2])
        codes, absmax, _ = weight.parts(EXPERTS, torch.bfloat16)
        mine = [part.of_rank(tensor) for part, tensor in zip((codes, absmax), stored, strict=True)]
        assert [tuple(tensor.shape) for tensor in mine] == [codes.shape, absmax.shape]
        kept = [part.kept(tensor).contiguous() for part, tensor in zip((codes, absmax), mine, strict=True)]
        found.append(dequantize(*kept, weight.blocksize, "nf4", torch.float32, OUTPUTS))
    assert torch.equal(torch.cat(found, dim=1 if kind is W13 else 2), expected)


def test_the_other_weight_of_a_layer_may_have_the_other_direction():
    only_w2 = {f"{LAYER}.w2": OUTPUTS}
    absmax = {kind: weight_of(kind, 1, 0, only_w2).parts(EXPERTS, torch.bfloat16)[1].shape for kind in WIDTHS}
    assert absmax == {W13: (EXPERTS, 640, 3), W2: (EXPERTS, 3, 320)}
    assert weight_of(W13, 1, 0, only_w2).blocks_along == INPUTS


@pytest.mark.parametrize(
    ("kind", "tp_size", "told"), [(W13, 8, "80 outputs for each rank.*32"), (W2, 64, "5 inputs for each rank.*2")]
)
def test_a_rank_that_cuts_too_much_is_refused(kind, tp_size, told):
    with pytest.raises(UserError, match=rf"tensor parallel size does not fit: {LAYER}: got {told}"):
        weight_of(kind, tp_size, 0)
