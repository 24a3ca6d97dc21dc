"""How far vLLM's log-probabilities of its own samples are from the learner's, on the same weights.

    python bench/vllm_parity.py

Random Scout-like and Maverick-like models with chunks of 64 and floors of 32 positions, weights large enough that the
output is far from uniform, and the shipped tiny model. The engine samples; the learner's forward pass (autocast for
bfloat16, as in training) scores the same tokens. Tokens before and behind the first chunk boundary apart: behind it the
engine's chunked attention, NoPE layers and growing queries have to be ours. In bfloat16 a router's near-tie falls the
other way now and then, and that token goes to another expert: hence the long tail.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rl.generator import VllmGenerator  # noqa: E402
from rl.types import EngineSettings, SampleRequest  # noqa: E402

TOYS, VOCABULARY, CHUNK = ("scout", "maverick"), 512, 64
PROMPT_TOKENS = (9, 40, 63, 64, 65, 100, 130)
ANSWER_TOKENS = 48


class Differences(NamedTuple):
    """|Δ log-probability| of the generated tokens, nats."""

    before: list[float]  # at positions of the first chunk
    behind: list[float]


def save_toy(kind: str, directory: Path) -> Path:
    """A random fp32 checkpoint: `scout` (MoE everywhere, QK norm, scaled RoPE) or `maverick` (every other, neither)."""
    import torch
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    torch.manual_seed(0)
    scout = kind == "scout"
    scaled = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 16.0, "low_freq_factor": 1.0,
              "high_freq_factor": 1.0, "original_max_position_embeddings": 64}  # fmt: skip
    config = Llama4TextConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, intermediate_size_mlp=128, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, num_local_experts=8, num_experts_per_tok=1,
        interleave_moe_layer_step=1 if scout else 2, use_qk_norm=scout, attention_chunk_size=CHUNK, floor_scale=32,
        max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        rope_parameters=scaled if scout else {"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    model = Llama4ForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4.0)  # the usual std of .02 gives a nearly uniform output: a weak test
    model.save_pretrained(directory)
    return directory


def sampled(checkpoint: Path, dtype: str, vocabulary: int) -> list[tuple[list[int], Any]]:
    """(prompt ids, answer) for random prompts of every length, from an engine of its own."""
    draw = random.Random(1)
    prompts = [[draw.randrange(3, vocabulary) for _ in range(length)] for length in PROMPT_TOKENS]
    settings = EngineSettings(checkpoint=str(checkpoint), dtype=dtype, max_model_len=256, kv_cache_gib=0.25)

    async def run() -> list[Any]:
        engine = VllmGenerator(settings, "parity")
        try:
            await engine.start()
            requests = [
                SampleRequest(request_id=str(i), prompt_ids=prompt, num_samples=2, max_tokens=ANSWER_TOKENS)
                for i, prompt in enumerate(prompts)
            ]
            return [await engine.sample(request) for request in requests]
        finally:
            engine.stop()

    return [(prompt, answer) for prompt, answers in zip(prompts, asyncio.run(run())) for answer in answers]


def differences(checkpoint: Path, dtype: str, vocabulary: int, chunk: int) -> Differences:
    import torch

    from model.checkpoint import load_policy
    from model.logprobs import token_logprobs

    model, result = load_policy(checkpoint, "float32").eval(), Differences([], [])
    for prompt, answer in sampled(checkpoint, dtype, vocabulary):
        ids = torch.tensor([prompt + answer.token_ids])
        wanted = (torch.arange(ids.shape[1]) >= len(prompt)).unsqueeze(0)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            stats, _ = token_logprobs(model, ids, wanted)
        for offset, (ours, theirs) in enumerate(zip(stats.logprob_T.tolist(), answer.logprobs)):
            (result.before if len(prompt) + offset < chunk else result.behind).append(abs(ours - theirs))
    return result


def main() -> None:
    """Start six engines, one after the other, and print one table."""
    table = Table("model", "dtype", "tokens", "mean", "max", "tokens behind", "mean behind", "max behind",
                  title="|Δ log-probability| of vLLM's samples, first chunk and behind it")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        models = [
            *(
                (f"{kind}-like", save_toy(kind, Path(folder, kind)), VOCABULARY, CHUNK)
                for kind in ("scout", "maverick")
            ),
            ("tiny_base", ROOT / "recipes" / "tiny_base", 700, 256),
        ]
        for name, checkpoint, vocabulary, chunk in models:
            for dtype in ("float32", "bfloat16"):
                cells = []
                for part in differences(checkpoint, dtype, vocabulary, chunk):
                    cells += [str(len(part)), *(f"{f(part):.1e}" if part else "" for f in (_mean, max))]
                table.add_row(name, dtype, *cells)
    Console(width=120).print(table)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    typer.run(main)
