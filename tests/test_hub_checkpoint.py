"""A checkpoint that vLLM takes from the Hub: checked in the cache as in a directory, and once more while it is loaded."""

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from gptoss_nf4.check.fitting import fitting
from gptoss_nf4.errors import UserError
from gptoss_nf4.format.result import expected_tensors
from gptoss_nf4.storage.checkpoint import INDEX_FILE, Checkpoint
from gptoss_nf4.storage.reading import read_json_object
from gptoss_nf4.storage.writing import write_json

REPOSITORY, COMMIT = "someone/my-finetune", "0123456789abcdef0123456789abcdef01234567"
BIAS = "model.layers.0.mlp.router.bias"


@pytest.fixture
def snapshot(converted, tmp_path, monkeypatch) -> Path:
    """The converted checkpoint as a snapshot in a Hub's cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub/models--someone--my-finetune"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT)
    return Path(shutil.copytree(converted, repository / "snapshots" / COMMIT))


def plugin_config(checkpoint: Path):
    from gptoss_nf4.vllm.config import GptOssNf4Config

    return GptOssNf4Config.from_config(read_json_object(checkpoint / "config.json")["quantization_config"])


def hf_config(checkpoint: Path):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(checkpoint)


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_a_snapshot_is_checked_as_a_directory_is(snapshot, revision):
    config = plugin_config(snapshot)
    config.maybe_update_config(REPOSITORY, hf_config(snapshot), revision)
    index = read_json_object(snapshot / INDEX_FILE)
    del index["weight_map"][BIAS]
    write_json(snapshot / INDEX_FILE, index)
    with pytest.raises(UserError, match=rf"missing tensor: {snapshot}: got no {BIAS} "):
        config.maybe_update_config(REPOSITORY, hf_config(snapshot), revision)


def test_what_is_not_whole_in_the_cache_is_checked_while_it_is_loaded(snapshot):
    (snapshot / "layer-1.safetensors").unlink()  # vLLM will download it
    config = plugin_config(snapshot)
    config.maybe_update_config(REPOSITORY, hf_config(snapshot))
    assert config.expected == expected_tensors(read_json_object(snapshot / "config.json"), snapshot)
    unknown = plugin_config(snapshot)
    unknown.maybe_update_config("someone/not-there", hf_config(snapshot))
    assert unknown.expected == config.expected


def test_a_directory_is_checked_once(converted):
    config = plugin_config(converted)
    config.maybe_update_config(str(converted), hf_config(converted))
    assert config.expected is None


def test_tensors_are_checked_as_they_come(converted):
    checkpoint = Checkpoint(converted)
    expected = expected_tensors(checkpoint.config, converted)
    tensors = {name: checkpoint.torch(name) for name in checkpoint.tensors}
    assert dict(fitting(tensors.items(), expected, REPOSITORY)).keys() == tensors.keys()
    spoilt = {
        "missing tensor": {name: tensor for name, tensor in tensors.items() if name != BIAS},
        "wrong tensor": tensors | {BIAS: tensors[BIAS].float()},
        r"wrong tensor.*\[7\]": tensors | {BIAS: tensors[BIAS][:7]},
    }
    for told, each in spoilt.items():
        with pytest.raises(UserError, match=told) as error:
            list(fitting(each.items(), expected, REPOSITORY))
        assert f": {REPOSITORY}: got " in str(error.value)
        assert BIAS in str(error.value)
    assert next(iter(fitting([("other", torch.zeros(1))], {}, REPOSITORY)))[0] == "other"
