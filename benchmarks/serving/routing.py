"""How many experts a batch uses: contenders are comparable only if it is the same for all."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from vllm import LLM

ROUTED_TOKENS = 256  # beyond the CUDA graphs' sizes: within a graph no function of ours is called to watch the router


def chosen_experts(llm: "LLM") -> "list[torch.Tensor]":
    """The router's choices for random tokens, [ROUTED_TOKENS or more, k] for each layer.

    None at all where the backend routes within its own kernel. It sees the same router and the same kind of tokens.
    """
    from gptoss_nf4.engine.measure import generate, random_prompts

    chosen: list[torch.Tensor] = []

    def watch(model: Any) -> bool:
        runners = [module for module in model.modules() if type(module).__name__ == "MoERunner"]
        routers: list[Any] = [getattr(runner, "router", None) for runner in runners]
        if not routers or not all(hasattr(router, "set_capture_fn") for router in routers):
            return False
        for runner, router in zip(runners, routers, strict=True):
            method = runner.routed_experts.quant_method
            if hasattr(method, "chooses"):  # the plugin's experts choose for themselves; now they are told
                method.chooses = False
            router.set_capture_fn(lambda ids: chosen.append(ids.detach().cpu()))
        return True

    if not all(llm.apply_model(watch)):
        return []
    generate(llm, random_prompts(1, ROUTED_TOKENS, llm.model_config.get_vocab_size()), 1)
    return [ids for ids in chosen if len(ids) >= ROUTED_TOKENS]  # the others are warming up


def distinct_experts(chosen: "list[torch.Tensor]", batches: list[int]) -> dict[int, float]:
    """Mean number of distinct experts of a layer by batch, from choices [ROUTED_TOKENS or more, k] of each layer."""

    def mean(batch: int) -> float:
        groups = [ids[start : start + batch] for ids in chosen for start in range(0, ROUTED_TOKENS, batch)]
        return sum(len(group.unique()) for group in groups) / len(groups)

    return {batch: mean(batch) for batch in batches}


def expert_bytes(llm: "LLM") -> int:
    """Bytes of the weights, scales and biases that the experts of one token have, over all layers."""

    def count(model: Any) -> int:
        total = 0
        for layer in model.modules():
            if any(base.__name__ == "RoutedExperts" for base in type(layer).__mro__):
                each = sum(parameter.nbytes for parameter in layer.parameters()) / layer.global_num_experts
                total += int(each * layer.moe_config.experts_per_token)
        return total

    return sum(llm.apply_model(count))
