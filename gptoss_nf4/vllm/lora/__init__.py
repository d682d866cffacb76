"""Adapters in the plugin: `--enable-lora` on a converted checkpoint, with adapters as Unsloth or PEFT saved them.

vLLM's own LoRA support is used as far as it goes: it schedules requests by adapter, keeps the stacks of lora_A and
lora_B, and applies them to the linear layers. What it lacks is added here:

1. `model.py` gets the LoRA manager of its model, since vLLM sets it as an attribute, and calls `attach`.
2. `attach.py` refuses options that we do not serve, gives the manager our loader, and mends vLLM's CPU operators.
3. `loading.py` reads an adapter's files by `gptoss_nf4.adapters`, in float32, whatever form they are in, and hands vLLM the
   factors that its stacks want. What writes to the residual stream is scaled as the base is.
4. `experts.py` computes the experts with the factors of each token's adapter.

May import `gptoss_nf4.adapters` and what lies below; imported by `vllm/model.py` and `vllm/moe.py`.
"""
