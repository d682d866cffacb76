"""Whether a product's kernels work on this machine, and what to give up where they don't.

Each step down costs speed and no result. All are plain data: a `Gpu` that can do less, by which `kernels.plan` chooses.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import triton

from gptoss_nf4.errors import UserError
from gptoss_nf4.vllm.kernels.plan import Decoding, Gpu, gpu_of, settle
from gptoss_nf4.vllm.kernels.shared_memory import limit, shared_memory
from gptoss_nf4.vllm.kernels.variants import META, Launch, compiled, variants
from gptoss_nf4.vllm.proving.products import Product

logger = logging.getLogger("vllm.gptoss_nf4")

MAX_ERROR = 0.15
"""Of `inputs.worst`. Rounding to bfloat16 gives 0.03 at most on these inputs, a wrong weight or slot about 1."""
PROVEN_TRITON = "3.7.1"
# What each step costs: ratios of times in NOTES.md ("Kernels, versions", "Adapters" and "Serving").
WITHOUT_TABLE = "decoding by permutes: the expert kernels take up to 1.25 times as long"
WITHOUT_EARLY = "no early starts: kernels wait for each other, with adapters up to 1.2 times as long"


def weaker(gpu: Gpu) -> Iterator[tuple[Gpu, str]]:
    """What to try one after the other, `gpu` itself first, and what that costs."""
    yield gpu, ""
    if gpu.starts_early:
        yield replace(gpu, starts_early=False), WITHOUT_EARLY
    if gpu.holds_tables:
        permutes = replace(gpu, chosen=Decoding.PERMUTES)
        yield permutes, WITHOUT_TABLE
        if gpu.starts_early:
            yield replace(permutes, starts_early=False), f"{WITHOUT_TABLE}; {WITHOUT_EARLY}"


def fault(product: Product, gpu: Gpu, device: torch.device) -> str | None:
    """What does not work of `product` on `device` taken as `gpu`, in one line; None if all does.

    Compiles every kernel that the product ever starts, reckons its shared memory, and then runs each once.
    UserError where a kernel left the device unusable for this process.
    """
    began = time.monotonic()
    found = []
    if not triton.knobs.runtime.interpret:
        found = launches(product, gpu)
        try:
            kernels = compiled(found)
        except Exception as error:
            return f"a kernel does not compile ({_line(error)})"
        for launch, kernel in zip(found, kernels, strict=True):
            takes = shared_memory(kernel)
            if (allowed := limit(gpu.shared_bytes)) < sum(takes):
                return (
                    f"{launch.kernel} takes {takes.static} bytes of shared memory and Triton's {takes.dynamic}, "
                    f"of {allowed} that CUDA gives"
                )
    compiling = time.monotonic() - began
    before = gpu_of(device)
    settle(device, gpu)
    try:
        for what, off in product.errors(device):
            if not off <= MAX_ERROR:
                return f"wrong results: {what}, off by {off:.2g} times their size"
        _wait(device)
    except Exception as error:
        require_usable(device, error, f"{SWITCH}={Decoding.PERMUTES.value}, or ={Decoding.DEQUANTIZE.value} if that fails")
        return f"a kernel does not run ({_line(error)})"
    finally:
        settle(device, before)
    trying = time.monotonic() - began - compiling
    name = type(product).__name__
    logger.info("gptoss_nf4: %s: %d kernels compiled in %.1f s, tried in %.1f s", name, len(found), compiling, trying)
    return None


def launches(product: Product, gpu: Gpu) -> list[Launch]:
    """One launch of every variant that the product ever starts on `gpu`."""
    settle(META, gpu)
    return variants(product.start, product.most_tokens)


def proven(products: Sequence[Product], gpu: Gpu, device: torch.device) -> tuple[Gpu | None, str | None]:
    """The strongest form of `gpu` on which all `products` work, and a line about what was given up.

    None instead of a `Gpu` where none is left: the products have to be computed without our kernels.
    """
    first = None
    for candidate, cost in weaker(gpu):
        found = next(filter(None, (fault(product, candidate, device) for product in products)), None)
        if found is None:
            return candidate, None if first is None else _told(first, cost)
        first = first or found
    return None, _told(str(first), products[0].without)


def _told(what: str, cost: str) -> str:
    version = triton.__version__
    mend = f"Triton {PROVEN_TRITON} mends it, if {version} is to blame" if version != PROVEN_TRITON else "please report it"
    return f"Triton {version}: {what}. Going on with {cost}. {mend}"


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def require_usable(device: torch.device, error: Exception, instead: str) -> None:
    """UserError where `error` left the device unusable for this process; `instead`: what to start it with again.

    CUDA's errors of one kind, illegal addresses for one, stay: all that the process asks of the device fails then.
    """
    try:
        _wait(device)
    except Exception:
        raise UserError(
            "a kernel broke this process's connection to the GPU",
            where=str(device),
            got=_line(error),
            expected="a kernel that runs, or fails alone",
            next_step=f"start again with {instead}",
        ) from error


SWITCH = "GPTOSS_NF4_DECODING"
"""Environment variable: a value of `Decoding`, in place of what the GPU suggests."""
