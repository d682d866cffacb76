"""Serving full-size gpt-oss-20b: the plugin against what else vLLM offers, all in one run on one GPU.

    python -m benchmarks.serving                          # weights are made in --directory (30 GB) and kept there
    python -m benchmarks.serving --together 7 --kv-gib 3 --max-model-len 32768    # on a GPU of 140 GB: all in turn

The plugin runs in the configuration that a conversion makes by default (float16, residual_scale 1/64), and in bfloat16. The
others are the stock MXFP4 checkpoint with each expert backend of vLLM, and our own checkpoint with every expert dequantized
on every forward. A contender that does not start, or dies, is a line in the report, and the others go on.

Every contender is an engine in a process of its own, with CUDA graphs. Engines that are up together take turns, cell by
cell: a cell is a batch size, or the length of a prompt. One measures at a time, while the others wait. So each cell has as
many values as there are rounds. One round before these is not counted. At the end each cell is measured once on the device,
by the profiler.

Engines that start at the same time read their weights one after the other. Still, others compile meanwhile, so the times of
loading are worse than those of an engine that starts alone (`--together 1`).

An engine that is up alone gets --gib of GPU memory, by default what `vllm serve` takes of a 24 GB card. Those that are up
together get a KV cache of fixed size, since none can tell whose memory grows.

With --lora 16, each contender runs without and with LoRA: requests on the base, on one adapter of q, k, v, o and all
experts, and on eight in a batch.

Results go to metrics/serving.json after every round, logs beside the weights.
"""
