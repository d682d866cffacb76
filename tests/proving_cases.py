"""Tries products through Triton's interpreter, as a layer does on a GPU, and prints what came, as JSON lines.

    python tests/proving_cases.py

The interpreter has to be chosen before the kernels are imported, hence a script.
"""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import quick_interpreter  # noqa: F401
import torch

from gptoss_nf4.format.blocks import OUTPUTS
from gptoss_nf4.vllm.kernels import codebook, sort, tiles
from gptoss_nf4.vllm.kernels.plan import examined
from gptoss_nf4.vllm.proving.inputs import Adapters
from gptoss_nf4.vllm.proving.ladder import fault
from gptoss_nf4.vllm.proving.products import DenseAdapters, Experts, Linear, Product, Router

CPU = torch.device("cpu")
SMALL = {"quant_type": "nf4", "dtype": torch.float16, "most_tokens": 40}


def products() -> dict[str, Product]:
    linear = {"rows": 40, "inputs": 128, "blocksize": 64, "bias": True, **SMALL}
    experts = {"hidden": 64, "intermediate": 64, "w13_blocksize": 64, "w2_blocksize": 32, "experts": 4, "top_k": 2, **SMALL}
    adapters = Adapters(held=3, rank=8)
    across = {"w13_blocks_along": OUTPUTS, "w2_blocks_along": OUTPUTS}
    return {
        "linear": Linear(**linear),
        "linear without bias": Linear(**linear | {"bias": False, "quant_type": "fp4"}),
        "linear with adapters": Linear(**linear | {"rows": 64}, adapters=Adapters(2, 8, (32, 48, 64))),
        "experts": Experts(**experts, here=4),
        "experts of a rank": Experts(**experts, here=2),
        "experts of logits": Experts(**experts, here=4, of_logits=True),
        "experts of logits, of a rank": Experts(**experts, here=3, of_logits=True),
        "experts, blocks along the outputs": Experts(**experts, here=3, of_logits=True, **across),
        "experts with adapters, blocks along the outputs": Experts(
            **experts | {"intermediate": 96}, here=4, w13_adapters=adapters, w2_adapters=adapters, **across
        ),
        "router": Router(5, 96, torch.float16, 40),
        "experts with adapters": Experts(**experts, here=4, w13_adapters=adapters, w2_adapters=adapters),
        "dense": DenseAdapters(12, 64, torch.float16, torch.float32, 40, adapters),
    }


def main() -> None:
    torch.set_default_dtype(torch.float16)  # as vLLM does while it makes layers
    torch.set_default_device("meta")  # vLLM sets the GPU. So what is made on the default device by mistake fails here too.
    for name, product in products().items():
        print(json.dumps({"product": name, "errors": dict(product.errors(CPU))}), flush=True)
    # And when the machine computes wrong: a codebook with two values exchanged, ids of another order.
    right = codebook.codebook("nf4", torch.float16, CPU)
    right.table[:8] = right.table[[1, 0, 2, 3, 5, 4, 6, 7]]
    print(json.dumps({"product": "a wrong table", "fault": fault(products()["linear"], examined(CPU), CPU)}), flush=True)
    right.table[:8] = right.table[[1, 0, 2, 3, 5, 4, 6, 7]]
    pack = tiles.pack_absmax_of_inputs
    tiles.pack_absmax_of_inputs = lambda absmax, dtype: pack(absmax.roll(1, -1), dtype)
    across = products()["experts, blocks along the outputs"]
    print(json.dumps({"product": "absmax of other inputs", "fault": fault(across, examined(CPU), CPU)}), flush=True)
    tiles.pack_absmax_of_inputs = pack
    sort.local_experts = lambda ids, expert_map: 1 - ids.flatten()
    sys.modules["gptoss_nf4.vllm.kernels.experts_launch"].local_experts = sort.local_experts
    print(json.dumps({"product": "wrong experts", "fault": fault(products()["experts"], examined(CPU), CPU)}), flush=True)


if __name__ == "__main__":
    main()
