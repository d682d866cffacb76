"""An adapter of random weights on everything that Unsloth trains by default.

In PEFT's fused form, since that is what vLLM's own loader takes too.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.serving.jobs import Job

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

    from gptoss_nf4.format.dimensions import Dimensions

STD = 0.01  # of lora_A and lora_B: too little to change where the router sends a token


def ensure(directory: Path, d: "Dimensions", rank: int) -> None:
    """The adapter in `directory`, made where it is missing."""
    import torch
    from safetensors.torch import save_file

    from gptoss_nf4.storage.writing import write_json

    config = directory / "adapter_config.json"
    if config.exists():
        return
    directory.mkdir(parents=True, exist_ok=True)
    modules = {  # inputs, outputs, experts
        "self_attn.q_proj": (d.hidden, d.q_rows, 1),
        "self_attn.k_proj": (d.hidden, d.kv_rows, 1),
        "self_attn.v_proj": (d.hidden, d.kv_rows, 1),
        "self_attn.o_proj": (d.q_rows, d.hidden, 1),
        "mlp.experts.base_layer": (d.hidden, 2 * d.intermediate, d.experts),  # PEFT's name of gate_up_proj
        "mlp.experts": (d.intermediate, d.hidden, d.experts),  # and of down_proj
    }
    generator, tensors = torch.Generator().manual_seed(0), {}
    for layer in range(d.layers):
        for module, (inputs, outputs, experts) in modules.items():
            for factor, shape in (("A", (experts * rank, inputs)), ("B", (outputs, experts * rank))):
                values = torch.randn(shape, generator=generator) * STD
                tensors[f"base_model.model.model.layers.{layer}.{module}.lora_{factor}.weight"] = values.bfloat16()
    save_file(tensors, directory / "adapter_model.safetensors")
    write_json(  # last: its presence says that the adapter is whole
        config,
        {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": rank,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    )


def requests(job: Job, count: int) -> "list[LoRARequest]":
    """`count` of them. vLLM knows adapters by number, so the same files serve as all."""
    from vllm.lora.request import LoRARequest

    return [LoRARequest(f"adapter-{number}", number, str(job.adapter)) for number in range(1, count + 1)]
