"""vLLM's log-probabilities of its samples are the learner's: the little world of bench/vllm_parity.py, with bounds."""

from __future__ import annotations

import pytest

from bench.vllm_parity import CHUNK, TOYS, VOCABULARY, differences, save_toy

BOUNDS = {"float32": (1e-6, 1e-5), "bfloat16": (5e-2, None)}  # mean, max; in bfloat16 a token may change its expert


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("kind", TOYS)
def test_before_and_behind_the_chunk_boundary(tmp_path, kind, dtype):
    mean_bound, max_bound = BOUNDS[dtype]
    for part in differences(save_toy(kind, tmp_path / kind), dtype, VOCABULARY, CHUNK):
        assert len(part) > 100
        assert sum(part) / len(part) < mean_bound
        assert max_bound is None or max(part) < max_bound
