"""What this process knows about its kernels: layers ask here, when they are made, whether kernels compute them."""

import logging
import os
from collections.abc import Sequence
from dataclasses import replace

import torch

from gptoss_nf4.errors import UserError
from gptoss_nf4.vllm.kernels.plan import Decoding, Gpu, gpu_of, settle
from gptoss_nf4.vllm.proving.ladder import SWITCH, proven
from gptoss_nf4.vllm.proving.products import Product

logger = logging.getLogger("vllm.gptoss_nf4")
_working: dict[torch.device, dict[Product, bool]] = {}


def all_work(products: Sequence[Product], device: torch.device) -> bool:
    """Whether our kernels compute all of `products` on `device`."""
    return all([works(product, device) for product in products])


def works(product: Product, device: torch.device) -> bool:
    """Whether our kernels compute `product` here. They are compiled and tried when it is asked for first.

    Where something has to be given up for it, that holds for the whole device: what worked before is tried again so.
    """
    known = _working.setdefault(device, {})
    if product in known:
        return known[product]
    gpu = asked_for(gpu_of(device), os.environ.get(SWITCH))
    if gpu.decoding is Decoding.DEQUANTIZE:
        if not known:
            logger.warning("gptoss_nf4: %s=%s: our kernels are not used", SWITCH, gpu.decoding.value)
        known[product] = False
        return False
    before = [other for other, working in known.items() if working]
    found, told = proven([product], gpu, device)
    if found is not None and found != gpu and before:
        found, told = proven([product, *before], gpu, device)
    known[product] = found is not None
    if found is not None:
        settle(device, found)
    if told is not None:
        logger.warning("gptoss_nf4: %s", told)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # vLLM counts what is left
    return known[product]


def asked_for(gpu: Gpu, switch: str | None) -> Gpu:
    """`gpu` with the decoding that the user asks for by the environment variable. UserError for what is none."""
    if not switch or gpu.chosen is not None:
        return gpu
    values = [decoding.value for decoding in Decoding]
    if switch not in values:
        raise UserError(
            "unknown decoding",
            where=SWITCH,
            got=switch,
            expected=f"one of {', '.join(values)}",
            next_step="unset it, or set it to one of these",
        )
    return replace(gpu, chosen=Decoding(switch))
