"""benchmark: load time, time to first token, tokens per second and peak memory of `vllm serve`."""

from common import METRICS, engine_of, model_of, stage
from omegaconf import DictConfig

from gptoss_nf4.files import write_json
from gptoss_nf4.vllm.serve import measure


@stage
def main(cfg: DictConfig) -> None:
    model, artifacts = model_of(cfg)
    engine_args = engine_of(cfg)
    artifacts.require(artifacts.checkpoint / "config.json", "assemble")
    result = measure(
        artifacts.checkpoint,
        engine_args,
        list(cfg.benchmark.batch_sizes),
        cfg.benchmark.rounds,
        cfg.benchmark.input_tokens,
        cfg.benchmark.output_tokens,
        artifacts.root / "benchmark",
    )
    write_json(METRICS / "benchmark.json", {"model": model.name, "dtype": cfg.dtype, "engine": cfg.engine.name, **result})
    print(
        f"benchmark: ready in {result['load_seconds']:.1f} s, "
        f"peak {result['peak_host_bytes'] / 2**30:.2f} GiB of host memory"
    )
    for row in result["batches"]:
        print(
            f"benchmark: batch {row['batch']}: {row['output_tokens_per_second']:.1f} tokens/s, "
            f"first token after {row['median_time_to_first_token_ms']:.0f} ms"
        )


if __name__ == "__main__":
    main()
