"""A contender of `benchmarks.serving` as it is, but with an engine on the CPU, for test_real_engines_take_turns."""

import os
from unittest import mock

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.serving import contender
from benchmarks.serving.jobs import CONTENDERS, Job


def engine(job: Job):
    from vllm import LLM

    return LLM(
        str(job.checkpoint),
        dtype=CONTENDERS[job.contender].dtype,
        skip_tokenizer_init=True,
        max_model_len=job.max_model_len,
        max_num_seqs=job.max_num_seqs,
        enforce_eager=True,
        enable_prefix_caching=False,
    )


def profile_of_the_cpu(activities: list) -> profile:
    """Where there is no GPU, a profile of it alone is refused. This one sees no time of a device."""
    return profile(activities=[ProfilerActivity.CPU])


if __name__ == "__main__":
    with (
        mock.patch.object(contender, "engine", engine),
        mock.patch.object(torch.cuda, "synchronize"),
        mock.patch.object(torch.profiler, "profile", profile_of_the_cpu),
    ):
        contender.main()
