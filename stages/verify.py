"""Check a finished checkpoint, on any machine, against the digests that stage prove recorded."""

from common import model_of, stage
from omegaconf import DictConfig

from gptoss_nf4.storage.digests import verify


@stage
def main(cfg: DictConfig) -> str:
    _, artifacts = model_of(cfg)
    checkpoint = artifacts.require(artifacts.checkpoint, "assemble")
    recorded = artifacts.require(artifacts.digest_list, "prove")
    count = verify(checkpoint, recorded, next_step="run `dvc repro prove`, which makes it again")
    return f"{artifacts.checkpoint}, {count} files as they were proved"


if __name__ == "__main__":
    main()
