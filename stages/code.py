"""code: digests of the files that the layers' stages run, in one file that stands for them.

DVC rewrites dvc.lock after every stage. With twenty files as dependencies of each of 48 layer stages that took longer
than the stages themselves.
"""

from pathlib import Path

import yaml
from common import ROOT, model_of, stage
from omegaconf import DictConfig

from gptoss_nf4.storage.writing import sha256_of, write_json


@stage
def main(cfg: DictConfig) -> str:
    _, artifacts = model_of(cfg)
    files = [Path(name) for name in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["code"]["deps"]]
    write_json(artifacts.code, {str(file): sha256_of(file) for file in files})
    return f"{len(files)} files"


if __name__ == "__main__":
    main()
