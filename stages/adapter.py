"""adapter@NAME: bring one adapter, check it against the base, describe what it changes."""

from common import adapter_of, model_of, stage
from omegaconf import DictConfig

from gptoss_nf4.fetch.adapter import fetch_adapter
from gptoss_nf4.source.model import open_source


@stage
def main(cfg: DictConfig) -> str:
    model, artifacts = model_of(cfg)
    adapter = adapter_of(cfg)
    found = fetch_adapter(adapter, model, open_source(model, artifacts), artifacts)
    print(f"adapter: {found['base']['statement']}", flush=True)
    changed = found["modules"].values()
    largest = max(about["relative_size"] or 0 for about in changed)
    return f"{adapter.name}, {len(changed)} modules, rank up to {found['largest_rank']}, at most {largest:.2g} of a weight"


if __name__ == "__main__":
    main()
