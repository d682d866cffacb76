"""The plugin: what vLLM loads to serve a converted checkpoint. No file of vLLM is changed.

The life of a weight:

1. `register.py` tells each vLLM process that the quantization method `gptoss_nf4` exists.
2. config.json names that method, so vLLM builds `config.GptOssNf4Config` from it. It reads the `settings`, checks the
   checkpoint's headers, and gives each layer its method: `linear.py` for q/k/v and o, `moe.py` for the experts.
3. The method asks whether the kernels work on this machine (`proving/`): all that the layer will ever start are compiled,
   and tried against plain torch. What fails is given up in steps, at last for dequantized weights.
4. The method registers empty parameters for this rank's part of the weight: codes, absmax, bias.
5. vLLM reads the checkpoint and hands each tensor to its parameter's loader (`loading.py`). The loader takes this rank's
   rows or columns and, on a GPU, brings them into the order that the kernels read (`kernels/tiles.py`). `model.py` has
   multiplied what writes to the residual stream by `residual_scale` before. On a GPU, threads do what is large while vLLM
   reads on (`transfer.py`).
6. After loading, a parameter that no tensor has filled is an error. lm_head, which the checkpoint keeps dense, is packed
   into 12 bits a weight without losing one (`head.py`, `kernels/twelve_bits.py`).
7. In each step the method's `apply` calls one operator. On a GPU in 16 bit it is one of `ops.py`, which choose a kernel
   by the number of tokens. On the CPU the experts in use are dequantized (`experts.py`).

Glossary:

- *codes*: 4-bit numbers, two a byte; a weight is `codebook[code] * absmax` of its block.
- *absmax*: one scale for each block of `blocksize` (64) weights along a row, or down a column (`format/blocks.py`).
- *w13*, *w2*: an expert's two weights: gate and up rows [2 * intermediate, hidden], and down [hidden, intermediate].
- *slot*: a token and one of its k experts; a batch has tokens * k slots.
- *packed*: in the kernels' order; a *tile* is the 16 rows by 64 inputs that one warp multiplies at a time.
- *rank*: one process of tensor or expert parallelism.

May import `check.fitting`, `adapters`, `storage`, `format` and `errors`. Imported by vLLM, tests and benchmarks only.
"""
