"""benchmark: load time, time to first token, tokens per second and peak memory of vLLM on the converted checkpoint."""

import os
import time

from common import METRICS, engine_of, model_of, stage
from omegaconf import DictConfig
from plotting import draw

from gptoss_nf4.engine.measure import PeakMemory, measure_batch
from gptoss_nf4.engine.noise import leave_out_noise
from gptoss_nf4.storage.writing import write_json


@stage
def main(cfg: DictConfig) -> str:
    model, artifacts = model_of(cfg)
    engine_args = engine_of(cfg)
    artifacts.require(artifacts.checkpoint / "config.json", "assemble")
    memory = PeakMemory(os.getpid())
    memory.start()
    leave_out_noise()
    from vllm import LLM

    started = time.monotonic()
    llm = LLM(str(artifacts.checkpoint), enable_prefix_caching=False, disable_log_stats=False, **engine_args)
    load_seconds = time.monotonic() - started
    sizes = (cfg.benchmark.input_tokens, cfg.benchmark.output_tokens, cfg.benchmark.rounds)
    batches = [measure_batch(llm, batch, *sizes, llm.model_config.get_vocab_size()) for batch in cfg.benchmark.batch_sizes]
    memory.stop()
    llm.llm_engine.engine_core.shutdown()
    result = {
        "load_seconds": load_seconds,
        "peak_host_bytes": memory.host_bytes,
        "peak_gpu_bytes": memory.gpu_bytes,
        "input_tokens": cfg.benchmark.input_tokens,
        "output_tokens": cfg.benchmark.output_tokens,
        "batches": batches,
    }
    write_json(METRICS / "benchmark.json", {"model": model.name, "dtype": cfg.dtype, "engine": cfg.engine.name, **result})
    draw(cfg)
    for row in batches:
        print(
            f"benchmark: batch {row['batch']}: {row['output_tokens_per_second']:.1f} tokens/s, "
            f"first token after {row['median_time_to_first_token_ms']:.0f} ms"
        )
    return f"ready in {load_seconds:.1f} s, peak {memory.host_bytes / 2**30:.2f} GiB of host memory"


if __name__ == "__main__":
    main()
