"""Making one engine's LoRA manager serve the adapters of a converted checkpoint."""

import sys
from types import FrameType

import torch
from vllm.config import VllmConfig
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.worker_manager import WorkerLoRAManager

from gptoss_nf4.errors import UserError
from gptoss_nf4.format.dimensions import Dimensions
from gptoss_nf4.format.result import MERGED_ADAPTER
from gptoss_nf4.vllm.loading import with_number
from gptoss_nf4.vllm.lora.linear import use_kernels
from gptoss_nf4.vllm.lora.loading import AdapterLoader
from gptoss_nf4.vllm.lora.products import products_with_adapters
from gptoss_nf4.vllm.proving.ladder import PROVEN_TRITON
from gptoss_nf4.vllm.proving.prepare import all_work

# Options of vLLM that give its experts other stacks than those that `experts.py` reads.
UNSUPPORTED = ("enable_mixed_moe_lora_format", "enable_moe_shared_loras", "fully_sharded_loras")


def attach(manager: LoRAModelManager, vllm_config: VllmConfig, residual_scale: float) -> None:
    """Called once for each rank, when vLLM has wrapped the modules of its model."""
    _require_supported(vllm_config)
    config = vllm_config.model_config.hf_config.to_dict()
    dimensions = Dimensions.from_config(config, vllm_config.model_config.model)
    merged = (config.get("quantization_config") or {}).get(MERGED_ADAPTER)
    _worker_manager()._lora_model_cls = AdapterLoader(manager, dimensions, residual_scale, merged)
    # CUDA graphs are padded, and the kernels read vLLM's buffer beyond the tokens that it sets.
    for punica_wrapper in manager.punica_wrapper_mapping.values():
        punica_wrapper._token_lora_indices.fill_(-1)
    on_kernels = any(getattr(module, "nf4_packed", False) for module in manager.model.modules())
    for module in manager.modules.values():
        if not isinstance(module, BaseLinearLayerWithLoRA):
            continue
        if on_kernels:
            use_kernels(module)
        elif manager.device.type == "cpu":
            _add_a_row_for_no_adapter(module)
    if on_kernels:
        _require_working(manager, vllm_config.scheduler_config.max_num_batched_tokens)


def _require_working(manager: LoRAModelManager, most_tokens: int) -> None:
    """Compile and try the kernels with stacks of these sizes. UserError where they don't work."""
    for name, module in manager.modules.items():
        products = products_with_adapters(module, most_tokens)
        if not all_work(products, with_number(manager.device)):
            raise UserError(
                "the kernels for adapters do not work here",
                where=name,
                got="the fault in the warning above",
                expected="kernels that compute what torch does",
                next_step=f"install Triton {PROVEN_TRITON}, or serve without --enable-lora",
            )


def _require_supported(vllm_config: VllmConfig) -> None:
    for option in UNSUPPORTED:
        if getattr(vllm_config.lora_config, option, False):
            raise UserError(
                "unsupported LoRA option",
                where=vllm_config.model_config.model,
                got=f"{option}=True",
                expected="False",
                next_step=f"start vLLM without --{option.replace('_', '-')}",
            )


def _worker_manager() -> WorkerLoRAManager:
    """The object that loads adapters into this rank's manager.

    vLLM hands it to nobody, but it is the caller's caller: it is making the manager right now.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, WorkerLoRAManager):
            return owner
        frame = frame.f_back
    raise UserError(
        "no place for adapters in this vLLM",
        where="gptoss_nf4.vllm.lora",
        got="a LoRA manager that no worker manager makes",
        expected="vLLM's WorkerLoRAManager",
        next_step="use a vLLM that the plugin was tested with, or serve without --enable-lora",
    )


def _add_a_row_for_no_adapter(module: BaseLinearLayerWithLoRA) -> None:
    """Give the stacks of a linear layer a last row of zeros.

    vLLM's CPU operators index the stacks with -1 for tokens of the base, and that is the last row
    (vllm/lora/ops/torch_ops/lora_ops.py): without it they would get the last adapter's part.
    """

    def with_zeros(stacks: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(torch.cat((stack, torch.zeros_like(stack[:1]))) for stack in stacks)

    module.lora_a_stacked = with_zeros(module.lora_a_stacked)
    module.lora_b_stacked = with_zeros(module.lora_b_stacked)
