"""SFT of the shipped tiny model in FP8 loses no more than half a percent of BF16's loss."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch

from model.kernels import fp8
from model.precision import Fp8Settings
from pipeline.config import RouterSettings, TrainSettings
from pipeline.data import Example, write_examples
from pipeline.sft import SftJob, SftTrainerActor
from rewards.domains import generate, worked_solution

BASE = Path(__file__).resolve().parents[2] / "recipes" / "tiny_base"
TOLERANCE = 0.005


def last_losses(tmp_path: Path, fp8_settings: Fp8Settings | None) -> list[float]:
    tmp_path.mkdir()
    job = SftJob(
        stage="warm", checkpoint=BASE, kept=KEPT[0], work=tmp_path, router=RouterSettings(), seed=3, fp8=fp8_settings,
        train=TrainSettings(learning_rate=1e-3, batch_examples=16, dtype="bfloat16"),
    )  # fmt: skip
    SftTrainerActor(job).train()
    lines = [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    if fp8_settings:
        assert all(line["fp8/layers"] == 2 for line in lines), "a layer fell back"
    return [line["loss"] for line in lines[-4:]]


KEPT: list[Path] = []


@pytest.fixture(scope="module")
def bf16(tmp_path_factory) -> float:
    folder = tmp_path_factory.mktemp("sft")
    KEPT[:] = [folder / "kept.jsonl"]
    rng, domains = random.Random(11), ("maths", "code", "reasoning", "dialogue")
    tasks = [generate(domains[i % 4], 1 + i % 8, i, "train") for i in range(192)]
    write_examples(KEPT[0], [Example(task, worked_solution(task, "careful", rng)) for task in tasks])
    losses = last_losses(folder / "bf16", None)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("recipe", ["tensor", "row", "block128"])
def test_fp8_is_within_half_a_percent_of_bf16(tmp_path, bf16, recipe):
    losses = last_losses(tmp_path / recipe, Fp8Settings(recipe=recipe, min_snr_db=0.0, keep_first_and_last=False))
    print(f"{recipe}: {sum(losses) / len(losses):.5f}, BF16 {bf16:.5f}")
    assert sum(losses) / len(losses) == pytest.approx(bf16, rel=TOLERANCE)


def test_two_bits_of_mantissa_fewer_would_be_seen(tmp_path, bf16, monkeypatch):
    """FP8's numbers rounded to powers of two: a format that is too coarse must fail the test above."""
    plain = fp8._quantise

    def coarse(*args, **kwargs):
        stored = plain(*args, **kwargs)
        mantissa, exponent = torch.frexp(stored.q.float())
        powers = torch.ldexp(mantissa.sign() * 0.5, exponent)
        return dataclasses.replace(stored, q=powers.to(stored.q.dtype))

    monkeypatch.setattr(fp8, "_quantise", coarse)
    losses = last_losses(tmp_path / "coarse", Fp8Settings(min_snr_db=-100.0, keep_first_and_last=False))
    assert abs(sum(losses) / len(losses) / bf16 - 1) > TOLERANCE
