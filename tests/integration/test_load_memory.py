"""Host memory of loading and saving a sharded checkpoint, measured in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Llama4TextConfig

from model.checkpoint import save_policy
from model.config import TinyShape, tiny
from model.tokenizer import load_tokenizer
from model.transformer import MoeForCausalLM

MEASURE = """
import sys
from pathlib import Path
from model.checkpoint import load_policy, save_policy
from model.tokenizer import load_tokenizer

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

def peak_bytes(work):
    "Host memory at the worst moment of work(), above what was held before."
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
    result = work()
    return status("VmHWM") - before, result

warm_up, source, out, tokenizer = *sys.argv[1:4], load_tokenizer(sys.argv[4])
save_policy(load_policy(warm_up), tokenizer, warm_up)  # imports and thread pools are not counted
for dtype in ("float32", "bfloat16"):
    loading, policy = peak_bytes(lambda: load_policy(source, dtype))
    saving, _ = peak_bytes(lambda: save_policy(policy, tokenizer, out, "bfloat16", max_shard_bytes=8 * 2**20))
    del policy
    print(loading, saving)
"""


def test_memory_stays_under_the_model_and_one_shard(tmp_path: Path, repo_root: Path) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux to measure a peak")
    tokenizer = load_tokenizer(repo_root / "recipes" / "tiny_base")
    warm_up = MoeForCausalLM(Llama4TextConfig(**tiny(TinyShape(hidden_size=32, num_layers=2), vocab_size=2048)))
    save_policy(warm_up, tokenizer, tmp_path / "warm_up")
    shape = TinyShape(hidden_size=256, num_layers=8, head_dim=64, expert_size=512, dense_size=512)
    policy = MoeForCausalLM(Llama4TextConfig(**tiny(shape, vocab_size=2048))).to(torch.bfloat16)
    source, shard = tmp_path / "source", 8 * 2**20
    save_policy(policy, tokenizer, source, max_shard_bytes=shard)
    assert len(list(source.glob("*.safetensors"))) >= 5
    folders = [tmp_path / "warm_up", source, tmp_path / "out", repo_root / "recipes" / "tiny_base"]
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory goes back at once, and what is taken again is counted
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, folders)],
        cwd=repo_root, env=os.environ | at_once, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    slack = 4 * 2**20  # page tables, file headers, the allocator's own
    for line, bytes_each in zip(run.stdout.splitlines(), (4, 2), strict=True):
        loading, saving = map(int, line.split())
        model = sum(parameter.numel() for parameter in policy.parameters()) * bytes_each
        assert model > 2 * (shard + slack)  # a second copy of it would be seen
        assert 0.9 * model < loading < model + shard + slack, f"{loading / 2**20:.1f} of {model / 2**20:.1f} MiB"
        assert saving < shard + slack, f"{saving / 2**20:.1f} MiB"  # above the model, which is there already
