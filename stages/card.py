"""card: the model card, beside the checkpoint and in it."""

from common import METRICS, model_of, stage
from omegaconf import DictConfig

from gptoss_nf4.publish.card import write_card


@stage
def main(cfg: DictConfig) -> str:
    _, artifacts = model_of(cfg)
    write_card(artifacts, METRICS)
    return f"{artifacts.checkpoint_card}"


if __name__ == "__main__":
    main()
