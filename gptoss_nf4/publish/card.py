"""The model card: README.md beside the weights, with the front matter that the Hub reads. Nobody types a line of it."""

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from gptoss_nf4.errors import UserError
from gptoss_nf4.storage.artifacts import Artifacts
from gptoss_nf4.storage.digests import read_digests
from gptoss_nf4.storage.reading import read_json_object
from gptoss_nf4.storage.writing import sha256_of, write_text

TAGS = ["gpt-oss", "nf4", "bitsandbytes", "4-bit", "gptoss-nf4"]
UNKNOWN_LICENSE = "unknown"  # one of the Hub's identifiers


def write_card(artifacts: Artifacts, metrics: Path, repository: str | None = None) -> None:
    """Write the card, and a copy of it into the checkpoint. `repository` is where that will be served from, if known.

    UserError where stage prove has not run, or not for this model.
    """
    text = card(artifacts, metrics, repository)
    write_text(artifacts.card, text)
    write_text(artifacts.checkpoint_card, text)


def card(artifacts: Artifacts, metrics: Path, repository: str | None = None) -> str:
    """The card's text: YAML between two lines of dashes, then Markdown."""
    manifest = read_json_object(artifacts.require(artifacts.manifest, "fetch"))
    config = read_json_object(artifacts.require(artifacts.checkpoint / "config.json", "assemble"))
    digests = read_digests(artifacts.require(artifacts.digest_list, "prove"))
    exactness = metric(artifacts, metrics / "exactness.json", "prove")
    dtypes = metric(artifacts, metrics / "dtypes.json", "normalize")
    environment = Environment(
        loader=PackageLoader("gptoss_nf4.publish"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    body = environment.get_template("card.md").render(
        name=artifacts.root.name,
        manifest=manifest,
        base_model=base_model(manifest),
        config=config,
        quantization=config["quantization_config"],
        exactness=exactness,
        dtypes=dtypes,
        digests=digests,
        digest_of_list=sha256_of(artifacts.digest_list),
        digest_list=artifacts.digest_list.name,
        place=repository or artifacts.checkpoint,
    )
    return f"---\n{front_matter(manifest, config)}\n---\n\n{body}"


def front_matter(manifest: dict, config: dict) -> str:
    """The card's YAML, as huggingface_hub writes it."""
    from huggingface_hub import ModelCardData

    base = base_model(manifest)
    data = ModelCardData(
        base_model=base,
        base_model_relation="quantized" if base else None,
        library_name="vllm",
        license=manifest.get("license") or UNKNOWN_LICENSE,
        pipeline_tag="text-generation",
        tags=[*TAGS, config["dtype"]],
    )
    return str(data.to_yaml()).strip()


def base_model(manifest: dict) -> str | None:
    """The Hub's name of what was converted, or of what a local source's own card names as its base. None where neither."""
    return manifest["source"].get("repository") or manifest.get("base_model")


def metric(artifacts: Artifacts, path: Path, stage: str) -> dict:
    """The metrics in `path`. UserError where they are missing, or of another model than that of `artifacts`."""
    found = read_json_object(artifacts.require(path, stage))
    if found.get("model") != artifacts.root.name:
        raise UserError(
            "metrics of another model",
            where=path,
            got=str(found.get("model")),
            expected=artifacts.root.name,
            next_step=f"run `dvc repro {stage}`",
        )
    return found
