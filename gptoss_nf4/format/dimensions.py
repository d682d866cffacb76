"""A gpt-oss model's dimensions, read from its config.json; none is hard-coded anywhere."""

from dataclasses import asdict, dataclass
from pathlib import Path

from gptoss_nf4.format.config_fields import count, require_served


@dataclass(frozen=True)
class Dimensions:
    """Counts and widths of a gpt-oss model, in elements."""

    layers: int
    hidden: int
    intermediate: int
    experts: int
    experts_per_token: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @classmethod
    def from_config(cls, config: dict, where: Path) -> "Dimensions":
        """Read the config.json of transformers 4.5x or 5.

        UserError for another model, for a count that is missing or out of range, and for a value that vLLM would ignore.
        `where` is the file, for errors.
        """
        require_served(config, where)
        return cls(
            layers=count(config, "num_hidden_layers", where),
            hidden=count(config, "hidden_size", where),
            intermediate=count(config, "intermediate_size", where),
            experts=count(config, "num_local_experts", where),
            experts_per_token=count(config, "num_experts_per_tok", where),
            heads=count(config, "num_attention_heads", where),
            kv_heads=count(config, "num_key_value_heads", where),
            head_dim=count(config, "head_dim", where),
            vocabulary=count(config, "vocab_size", where),
        )

    def as_dict(self) -> dict[str, int]:
        return asdict(self)

    @property
    def q_rows(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_rows(self) -> int:
        return self.kv_heads * self.head_dim
