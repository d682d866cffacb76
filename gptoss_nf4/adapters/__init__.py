"""LoRA adapters of gpt-oss: what Unsloth or PEFT saved, checked against the base and brought into one canonical form.

The room reads top down:

- `peft_fields`: what each field of PEFT's LoraConfig means here: read, without effect, or refused.
- `patterns`: PEFT's rule for `rank_pattern` and `alpha_pattern`.
- `config`: adapter_config.json as an `AdapterConfig`.
- `names`: the one table of key forms.
- `resolve`: which module each pair of lora_A and lora_B changes, with its rank, scale and order. Names and shapes only.
- `canonical`: the tensors themselves, as `Delta`s.
- `base`: whether an adapter was trained on this base.
- `adapter`: a directory of files, as an `Adapter`.

All but `adapter` are pure functions of a configuration, of tensors by name and of a base's `Dimensions`. They serve two
users: the pipeline, which opens directories by `Adapter`, and the vLLM plugin, which holds tensors that vLLM has loaded.
The room may import `gptoss_nf4.errors`, `format` and `storage`, with torch; never vLLM, DVC or Hydra. Stages, `convert`,
`check` and `vllm` may import it.
"""
