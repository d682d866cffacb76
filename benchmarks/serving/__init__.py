"""Serving full-size gpt-oss-20b: the plugin against what else vLLM offers, all in one run on one GPU.

    python -m benchmarks.serving                    # weights are made in --directory (27 GB) and kept there
    python -m benchmarks.serving --together 3       # on a large GPU: start so many of the others at once

The others are the stock MXFP4 checkpoint with each of its expert backends, and our own checkpoint with every expert
dequantized on every forward.

With --lora 16, each contender runs without and with LoRA: requests on the base, on one adapter of q, k, v, o and all
experts, and on eight in a batch. To compare adapters, let all take turns on a large GPU:

    python -m benchmarks.serving --contenders nf4 mxfp4-marlin --lora 16 --together 4 --kv-gib 1 --passes 3 \\
        --max-model-len 4096

Every contender is an engine in a process of its own, with CUDA graphs and at most --gib of GPU memory. One measures at a
time, while the others wait. Most of a run is starting engines, so several can start together. Then none can tell whose
memory grows, and each gets a KV cache of fixed size instead of what --gib leaves. The plugin's engine starts alone, unless
--kv-gib fixes the size of its cache too.

Results go to metrics/serving.json, logs beside the weights.
"""
