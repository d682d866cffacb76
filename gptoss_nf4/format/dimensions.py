"""A gpt-oss model's dimensions, read from its config.json; none is hard-coded anywhere."""

from dataclasses import asdict, dataclass
from pathlib import Path

from gptoss_nf4.errors import UserError

# gpt-oss's clamped SwiGLU (transformers `modeling_gpt_oss.py` GptOssExperts; openai/gpt-oss `swiglu`).
SWIGLU_ALPHA = 1.702
SWIGLU_LIMIT = 7.0
# vLLM 0.32.0 builds these values into its gpt-oss and reads none of them from config.json. A checkpoint with others would
# be served wrongly, without a word (models/gpt_oss.py: RMSNorm(eps=1e-5), `layer_idx % 2 == 0`; layers/activation.py:
# SwigluOAIAndMul(limit=7.0)).
RMS_NORM_EPS = 1e-5
LAYER_TYPES = ("sliding_attention", "full_attention")

# Names are made for every layer and expert, so a hostile config.json could cost memory. These bounds are small enough that
# it does not, and far beyond any gpt-oss.
LARGEST = {"num_hidden_layers": 1000, "num_local_experts": 4096}
MAX_WIDTH = 1 << 24


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
        _expect(config.get("model_type"), "gpt_oss", "model_type", where, "choose a gpt-oss: no other model is converted")

        def count(*keys: str) -> int:
            value = next((config[key] for key in keys if config.get(key) is not None), None)
            largest = LARGEST.get(keys[0], MAX_WIDTH)
            if type(value) is not int or not 1 <= value <= largest:
                raise UserError(
                    "bad config",
                    where=where,
                    got=f"{keys[0]}={str(value)[:40]}",
                    expected=f"a number from 1 to {largest}",
                    next_step="restore the model's own config.json",
                )
            return value

        dimensions = cls(
            layers=count("num_hidden_layers"),
            hidden=count("hidden_size"),
            intermediate=count("intermediate_size"),
            experts=count("num_local_experts"),
            experts_per_token=count("num_experts_per_tok", "experts_per_token"),
            heads=count("num_attention_heads"),
            kv_heads=count("num_key_value_heads"),
            head_dim=count("head_dim"),
            vocabulary=count("vocab_size"),
        )
        fixed = "restore the model's own config.json: vLLM has this value built in and would serve another wrongly"
        _expect(config.get("rms_norm_eps", RMS_NORM_EPS), RMS_NORM_EPS, "rms_norm_eps", where, fixed)
        _expect(config.get("swiglu_limit", SWIGLU_LIMIT), SWIGLU_LIMIT, "swiglu_limit", where, fixed)
        _expect(config.get("tie_word_embeddings", False), False, "tie_word_embeddings", where, fixed)
        alternating = [LAYER_TYPES[layer % 2] for layer in range(dimensions.layers)]
        _expect(config.get("layer_types") or alternating, alternating, "layer_types", where, fixed)
        return dimensions

    def as_dict(self) -> dict[str, int]:
        return asdict(self)

    @property
    def q_rows(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_rows(self) -> int:
        return self.kv_heads * self.head_dim


def _expect(got: object, expected: object, key: str, where: Path, next_step: str) -> None:
    if got != expected:
        raise UserError(
            "unsupported config", where=where, got=f"{key}={got!r}", expected=repr(expected), next_step=next_step
        )
