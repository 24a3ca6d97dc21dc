"""SFT of the shipped tiny model in FP8 loses no more than half a percent of BF16's loss."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import get_args

import pytest
import torch

from model.checkpoint import load_policy
from model.kernels import fp8
from model.precision import Fp8Settings, Scope
from model.tokenizer import encode_example, load_tokenizer
from model.transformer import IGNORED
from pipeline.config import RouterSettings, TrainSettings
from pipeline.data import Example, write_examples
from pipeline.sft import SftJob, SftTrainerActor
from rewards.domains import generate, worked_solution

BASE = Path(__file__).resolve().parents[2] / "recipes" / "tiny_base"
TOLERANCE = 0.005


def loss_after(work: Path, fp8_settings: Fp8Settings | None, layers: int = 2) -> float:
    """Of the trained model on examples that it has not seen, in fp32: a batch's own loss differs by more than FP8 does
    as soon as one token takes another expert."""
    work.mkdir()
    job = SftJob(
        stage="warm", checkpoint=BASE, kept=KEPT[0], work=work, router=RouterSettings(), seed=3, fp8=fp8_settings,
        train=TrainSettings(learning_rate=1e-3, batch_examples=16, dtype="bfloat16"),
    )  # fmt: skip
    SftTrainerActor(job).train()
    lines = [json.loads(line) for line in (work / "losses.jsonl").read_text().splitlines()]
    if fp8_settings:
        assert all(line["fp8/layers"] == layers for line in lines), "a layer fell back"
    model, tokenizer = load_policy(work / "checkpoint", "float32"), load_tokenizer(work / "checkpoint")
    loss, tokens = 0.0, 0
    with torch.no_grad():
        for example in examples(range(1000, 1192)):
            ids, learned = encode_example(tokenizer, example.task.prompt, example.answer)
            ids_BS, learned_BS = torch.tensor([ids]), torch.tensor([learned])
            labels_BS = ids_BS.masked_fill(~learned_BS, IGNORED)
            loss += float(model(input_ids=ids_BS, labels=labels_BS, num_items_in_batch=1.0).loss)
            tokens += sum(learned)
    return loss / tokens


def examples(seeds: range) -> list[Example]:
    rng, domains = random.Random(11), ("maths", "code", "reasoning", "dialogue")
    tasks = [generate(domains[i % 4], 1 + i % 8, i, "train") for i in seeds]
    return [Example(task, worked_solution(task, "careful", rng)) for task in tasks]


KEPT: list[Path] = []


@pytest.fixture(scope="module")
def bf16(tmp_path_factory) -> float:
    folder = tmp_path_factory.mktemp("sft")
    KEPT[:] = [folder / "kept.jsonl"]
    write_examples(KEPT[0], examples(range(192)))
    return loss_after(folder / "bf16", None)


@pytest.mark.parametrize("recipe", ["tensor", "row", "block128"])
def test_fp8_is_within_half_a_percent_of_bf16(tmp_path, bf16, recipe):
    loss = loss_after(tmp_path / recipe, Fp8Settings(recipe=recipe, min_snr_db=0.0, keep_first_and_last=False))
    print(f"{recipe}: {loss:.5f}, BF16 {bf16:.5f}")
    assert loss == pytest.approx(bf16, rel=TOLERANCE)


def test_with_everything_in_scope_it_is_within_two_percent(tmp_path, bf16):
    """Attention, shared experts and dense layers too, in all layers."""
    settings = Fp8Settings(min_snr_db=0.0, keep_first_and_last=False, scope=get_args(Scope))
    loss = loss_after(tmp_path / "everything", settings, layers=4)
    print(f"everything: {loss:.5f}, BF16 {bf16:.5f}")
    assert loss == pytest.approx(bf16, rel=4 * TOLERANCE)


def test_two_bits_of_mantissa_fewer_would_be_seen(tmp_path, bf16, monkeypatch):
    """FP8's numbers rounded to powers of two: a format that is too coarse must fail the test above."""
    plain = fp8._quantise

    def coarse(*args, **kwargs):
        stored = plain(*args, **kwargs)
        mantissa, exponent = torch.frexp(stored.q.float())
        powers = torch.ldexp(mantissa.sign() * 0.5, exponent)
        return dataclasses.replace(stored, q=powers.to(stored.q.dtype))

    monkeypatch.setattr(fp8, "_quantise", coarse)
    loss = loss_after(tmp_path / "coarse", Fp8Settings(min_snr_db=-100.0, keep_first_and_last=False))
    print(f"coarse: {loss:.5f}, BF16 {bf16:.5f}")
    assert abs(loss / bf16 - 1) > 4 * TOLERANCE
