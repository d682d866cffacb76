"""NF4 attention projections (qkv_proj, o_proj) in vLLM."""

import torch
from torch.nn.functional import linear, pad
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import LinearMethodBase

from gptoss_nf4.vllm import ops  # noqa: F401  (registers torch.ops.gptoss_nf4)
from gptoss_nf4.vllm.dequantize import dequantize
from gptoss_nf4.vllm.kernels.tiles import pack, padded_rows
from gptoss_nf4.vllm.loading import (
    Loader,
    blocksize_of_shard,
    current_device,
    most_tokens,
    register_parameter,
    repeat_absmax,
    require_filled,
    require_packable,
    runs_on_kernels,
)
from gptoss_nf4.vllm.proving.prepare import all_work
from gptoss_nf4.vllm.proving.products import Linear
from gptoss_nf4.vllm.settings import Settings


class Nf4LinearMethod(LinearMethodBase):
    """Keeps codes and absmax in rows, so that vLLM's own column, row and q/k/v sharding cuts both alike."""

    def __init__(self, settings: Settings, prefix: str):
        self.settings = settings
        self.prefix = prefix

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        *,
        weight_loader: Loader,
        **extra_weight_attrs: object,
    ) -> None:
        """Register `weight` uint8 [out, in / 2] and `absmax` float32 [out, in / blocksize], both of this rank."""
        rows = sum(output_partition_sizes)
        blocksize = blocksize_of_shard(self.settings.blocksize, input_size_per_partition, self.prefix)
        layer.nf4_blocksize = blocksize
        layer.nf4_rows = rows
        # A rank of tensor parallelism may have no bias: the first one adds it.
        biases = (True,) if get_tensor_model_parallel_world_size() == 1 else (True, False)
        layer.nf4_products = [
            Linear(rows, input_size_per_partition, blocksize, self.settings.quant_type, params_dtype, bias, most_tokens())
            for bias in biases
        ]
        layer.nf4_packed = runs_on_kernels(params_dtype) and all_work(layer.nf4_products, current_device())

        def load_absmax(parameter: torch.nn.Parameter, tensor: torch.Tensor, *args: object) -> None:
            weight_loader(parameter, repeat_absmax(tensor, self.settings.blocksize, blocksize), *args)

        dims = {"output_dim": 0, "input_dim": 1, **extra_weight_attrs}
        codes, absmax = (rows, input_size_per_partition // 2), (rows, input_size_per_partition // blocksize)
        register_parameter(layer, self.prefix, "weight", codes, torch.uint8, weight_loader, **dims)
        register_parameter(layer, self.prefix, "absmax", absmax, torch.float32, load_absmax, **dims)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        require_filled(layer)
        if not layer.nf4_packed:
            return
        require_packable(layer.absmax.data, f"{self.prefix}.absmax")
        codes, absmax = pack(layer.weight.data, layer.absmax.data, layer.nf4_blocksize)
        layer.weight = torch.nn.Parameter(codes[None], requires_grad=False)
        layer.absmax = torch.nn.Parameter(absmax[None], requires_grad=False)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None, **adapters: object
    ) -> torch.Tensor:
        """x [..., in] -> [..., out] in x's dtype.

        adapters: of a packed layer, what `ops.packed_linear_with_adapters` takes in addition.
        """
        if not layer.nf4_packed:
            weight = dequantize(layer.weight, layer.absmax, layer.nf4_blocksize, self.settings.quant_type, x.dtype)
            return linear(x, weight, bias)
        if bias is not None:
            bias = pad(bias, (0, padded_rows(layer.nf4_rows) - layer.nf4_rows))[None]
        operators = torch.ops.gptoss_nf4
        out = (operators.packed_linear_with_adapters if adapters else operators.packed_linear)(
            x.reshape(-1, x.shape[-1]),
            layer.weight,
            layer.absmax,
            bias,
            layer.nf4_rows,
            layer.nf4_blocksize,
            self.settings.quant_type,
            **adapters,
        )
        return out.view(*x.shape[:-1], layer.nf4_rows)
