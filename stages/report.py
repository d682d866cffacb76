"""report: everything that the other stages found, as one HTML file. Alone, it tells what is there and what is missing."""

from common import model_of, stage
from omegaconf import DictConfig
from plotting import draw

from gptoss_nf4.report.page import page
from gptoss_nf4.storage.writing import write_text


@stage
def main(cfg: DictConfig) -> str:
    _, artifacts = model_of(cfg)
    facts = draw(cfg)
    write_text(artifacts.page, page(facts))
    return f"{artifacts.page}" + (f", {len(facts.missing)} parts missing" if facts.missing else "")


if __name__ == "__main__":
    main()
