"""LoRA adapters of gpt-oss as Unsloth or PEFT save them: checked against the base, and brought into one canonical form.

In reading order:

- `peft_fields`: what each field of PEFT's LoraConfig means here: read, without effect, or refused.
- `patterns`: PEFT's rules for `rank_pattern` and `alpha_pattern`.
- `config`: adapter_config.json as an `AdapterConfig`.
- `names`: the one table of the forms that keys have.
- `resolve`: which module each pair of lora_A and lora_B changes, with its rank, scale and order, by names and shapes.
- `canonical`: the tensors themselves, as `Delta`s.
- `base`: whether an adapter was trained on this base.
- `adapter`: a directory of files, as an `Adapter`.
- `peft_form`: writing one layer of an adapter in the form that PEFT loads, for references.

Only `adapter` and `peft_form` touch files. The others are pure functions of a configuration, of tensors by name and of a
base's `Dimensions`.

May import `storage`, `format` and `errors`. Imported by `fetch`, `convert`, `check`, `flow`, the plugin and
the stages.
"""
