"""The numbers that are drawn, as lists of records: what `dvc plots show` reads, and the report too.

Each record is a point: `layer` and a `series` by which points are coloured, or the position of a token.
"""

import json
from pathlib import Path

from gptoss_nf4.storage.artifacts import Artifacts
from gptoss_nf4.storage.reading import read_json_object, read_text
from gptoss_nf4.storage.tensor_reader import read_header

LAYER_STAGES = ("dequant", "requant")


def plotted(
    seconds: list[dict], sizes: list[dict], absmax: list[dict], positions: list[dict], benchmark: dict | None
) -> dict[str, list[dict]]:
    """The points of each plot that a conversion has in dvc.yaml, by its directory below plots/."""
    return {
        "seconds": seconds,
        "size": sizes,
        "absmax": absmax,
        "logprobs": positions,
        "speed": (benchmark or {}).get("batches", []),
    }


def sizes(artifacts: Artifacts, layers: int) -> list[dict]:
    """Megabytes of each 4-bit module of the result: codes, absmax and codebook."""
    found: dict[tuple[int, str], int] = {}
    for layer in range(layers):
        for name, info in read_header(artifacts.require(artifacts.layer_weights(layer), f"requant@{layer}")).items():
            place = layer, _within_layer(name.partition(".weight")[0])
            found[place] = found.get(place, 0) + info.bytes
    return [{"layer": layer, "series": module, "megabytes": size / 1e6} for (layer, module), size in found.items()]


def absmax(reports: list[dict]) -> list[dict]:
    """Smallest, mean and largest absmax of each 4-bit module, from the reports of the layers."""
    return [
        {"layer": report["layer"], "series": _within_layer(name), **target["absmax"]}
        for report in reports
        for name, target in report["targets"].items()
        if target.get("absmax")
    ]


def seconds(artifacts: Artifacts, layers: int) -> list[dict]:
    """Seconds that each layer's stages took when they last ran on this machine. What came from DVC's cache has none."""
    measured = {(stage, layer): artifacts.seconds(stage, layer) for stage in LAYER_STAGES for layer in range(layers)}
    return [
        {"layer": layer, "series": stage, "seconds": read_json_object(file)["seconds"]}
        for (stage, layer), file in measured.items()
        if file.exists()
    ]


def stage_seconds(artifacts: Artifacts) -> dict[str, float]:
    """Seconds of each stage when it last ran on this machine; those of the layers added up."""
    found: dict[str, float] = {}
    for file in sorted(artifacts.seconds("any").parent.glob("*.json")):
        stage = file.stem.partition("-")[0]
        found[stage] = found.get(stage, 0.0) + read_json_object(file)["seconds"]
    return found


def read(file: Path) -> list[dict]:
    """The records in `file`; none where there is no such file."""
    return list(json.loads(read_text(file))) if file.exists() else []


def reports_of(artifacts: Artifacts, layers: int) -> list[dict]:
    """The reports of stage requant, in the order of the layers."""
    return [read_json_object(artifacts.require(artifacts.report(layer), f"requant@{layer}")) for layer in range(layers)]


def _within_layer(name: str) -> str:
    """`model.layers.3.mlp.experts.w13` -> `mlp.experts.w13`."""
    return ".".join(name.split(".")[3:])
