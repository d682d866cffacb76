"""Adapters in the plugin: `--enable-lora` on a converted checkpoint, with adapters as Unsloth or PEFT saved them.

vLLM's own LoRA support is used as far as it goes: it schedules requests by adapter and keeps the stacks of lora_A and
lora_B. On the CPU it also applies them to the linear layers. What it lacks is added here:

1. `model.py` gets the LoRA manager of its model, since vLLM sets it as an attribute, and calls `attach`.
2. `attach.py` refuses options that we do not serve, and gives the manager our loader. On the CPU it mends vLLM's operators.
3. `loading.py` reads an adapter's files by `gptoss_nf4.adapters`, in float32, whatever form they are in, and hands vLLM the
   factors that its stacks want. What writes to the residual stream is scaled as the base is.
4. `experts.py` computes the experts with the factors of each token's adapter.
5. On a GPU, `linear.py` puts our kernels in the place of vLLM's in the linear layers.

For an adapter, vLLM starts eleven kernels a layer in each step, and we five, up to 32 requests. A @ x takes one kernel for
each of the four products, and B @ (A @ x) is added within the product's own (`kernels.lora`). The router, a dense layer,
takes one. With more requests q/k/v and o add B @ (A @ x) after their product.

May import `gptoss_nf4.adapters` and what lies below; imported by `vllm/model.py` and `vllm/moe.py`.
"""
