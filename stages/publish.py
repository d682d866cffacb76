"""Upload a checkpoint that was proved to the Hugging Face hub: python stages/publish.py repository=me/my-finetune"""

from common import METRICS, model_of, stage
from omegaconf import DictConfig

from gptoss_nf4.errors import UserError
from gptoss_nf4.publish.upload import publish


@stage
def main(cfg: DictConfig) -> str:
    if not isinstance(cfg.private, bool):
        raise UserError(
            "bad setting",
            where="private",
            got=repr(cfg.private),
            expected="true or false",
            next_step="pass private=false for a repository that everyone may read",
        )
    _, artifacts = model_of(cfg)
    address = publish(
        artifacts, METRICS, str(cfg.repository or ""), cfg.private, say=lambda line: print(f"publish: {line}", flush=True)
    )
    return f"{address}, serve it with `vllm serve {cfg.repository}`"


if __name__ == "__main__":
    main()
