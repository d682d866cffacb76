"""vLLM on the CPU with the GPU's path: packed weights and the kernels, run by Triton's interpreter, in float16.

The interpreter has to be chosen before the kernels are imported, hence a script; prints the agreement as JSON.
`lora_in_vllm` does the same with adapters.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"TRITON_INTERPRET": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

from whole_model import log_probabilities, whole_model

import gptoss_nf4.vllm.head
import gptoss_nf4.vllm.linear
import gptoss_nf4.vllm.moe
import gptoss_nf4.vllm.ops
from gptoss_nf4.check.agreement import Agreement
from gptoss_nf4.engine.generate import generate


def use_the_gpus_path() -> dict[str, str]:
    """From now on layers pack their weights. Returns a mapping in which the dtypes of what they keep will be."""
    from kernel_cases import align

    dtypes = {}
    register = gptoss_nf4.vllm.moe.register_parameter

    def register_and_note(layer, prefix, name, shape, dtype, load):
        dtypes[name] = str(dtype)
        register(layer, prefix, name, shape, dtype, load)

    pack_head = gptoss_nf4.vllm.head.packed_or_reason

    def pack_and_note(weight):
        packed = pack_head(weight)
        dtypes["head"] = packed if isinstance(packed, str) else str(packed.words.dtype)
        return packed

    gptoss_nf4.vllm.moe.register_parameter = register_and_note
    gptoss_nf4.vllm.head.packed_or_reason = pack_and_note
    for module in (gptoss_nf4.vllm.head, gptoss_nf4.vllm.linear, gptoss_nf4.vllm.moe):
        module.runs_on_kernels = lambda dtype: True
    # vLLM's own operator has no CPU build.
    gptoss_nf4.vllm.ops.moe_align_block_size = lambda ids, block, experts, expert_map: align(ids, block, [*range(experts)])
    return dtypes


def main(source: str, checkpoint: str) -> None:
    dtypes = use_the_gpus_path()
    engine = {"dtype": "float16", "max_model_len": 32, "max_num_batched_tokens": 32, "max_num_seqs": 1}
    engine["enforce_eager"] = True
    generations = generate(Path(checkpoint), ["2 + 2 ="], 2, engine)
    model, result = whole_model(Path(source)), Agreement()
    for generation in generations:
        result.add(generation, log_probabilities(model, generation.token_ids))
    print(json.dumps(result.as_dict() | {"dtypes": dtypes}))


if __name__ == "__main__":
    main(*sys.argv[1:])
