"""Exact conversion of Unsloth NF4 gpt-oss checkpoints into fused 4-bit checkpoints that vLLM serves.

`flow.py` shows the whole conversion in one function. The parts, from the ground up; imports go up this list only:

    errors.py    the one exception that a user is meant to see
    eager_bnb.py bitsandbytes without PyTorch's compiler
    format/      what the bytes mean: dimensions, names, the NF4 codec; pure
    storage/     files: reading what strangers wrote; writing beside the target, then renaming
    source/      the layouts that can be read, behind one interface
    adapters/    LoRA adapters as Unsloth and PEFT save them, in one canonical form
    samples/     sources that need no download
    fetch/       bringing a source or an adapter, and describing it
    convert/     the conversion, a module for each stage
    proof/       the proof that the result is the source; of the above it imports only storage, errors and eager_bnb
    check/       other checks of the result
    flow.py      all of it in order

Beside them stand `vllm/`, the plugin that serves the result, `engine/`, which drives vLLM for smoke and benchmark,
`report/`, the page that tells all results, and `publish/`, the model card and the upload.
Nothing else here imports vLLM, and nothing at all imports DVC, Hydra or OmegaConf: the stages do. The contracts in
pyproject.toml say the same to import-linter.
"""
