"""The judge_filter stage around an engine whose ratings are written here; the end-to-end run uses a real judge."""

from __future__ import annotations

import asyncio
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from judges.verdict import JudgeFailure, Verdict
from pipeline.config import JudgeFilterStage, Recipe
from pipeline.data import read_examples, write_jsonl
from pipeline.errors import DataError, InfrastructureError
from pipeline.judge_filter import agreement_with, label_ids, run, spread_over_scores
from pipeline.stage import StageContext
from rewards.task import split_of
from rl.types import EngineSettings, SampledAnswer, SampleRequest


class ScriptedEngine:
    """Rates a prompt by the 'level N' in it, and as a policy answers 'Answer: right' up to level 4.

    Where the real engine is another process, this one reads token ids back with the same tokenizer.
    """

    name = "scripted"

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.settings: list[EngineSettings] = []
        self.dead = False

    def generators(self, settings: EngineSettings, architecture_digest: str, count: int | None = None) -> list[Any]:
        self.settings.append(settings)
        return [self]

    async def call_async(self, method: str, *args: Any, timeout_s: float) -> Any:
        await asyncio.sleep(0)
        if self.dead:
            raise InfrastructureError("actor scripted died in score_labels")
        return getattr(self, method)(*args)

    def level(self, ids: list[int]) -> int:
        return int(re.findall(r"level (\d+)", self.tokenizer.decode(ids))[-1])

    def score_labels(self, prompts: list[list[int]], label_ids: list[int]) -> list[list[float]]:
        assert [self.tokenizer.decode([i]) for i in label_ids] == ["1", "2", "3", "4", "5"]
        assert max(map(len, prompts)) < self.settings[-1].max_model_len
        return [self.rating(self.level(ids)) for ids in prompts]

    def rating(self, level: int) -> list[float]:
        if level == 0:  # the judge would rather say something else
            return [-9.0] * 5
        high = (level - 1) / 9
        return [math.log(p) if p else -math.inf for p in (1 - high, 0.0, 0.0, 0.0, high)]

    def sample(self, request: SampleRequest) -> list[SampledAnswer]:
        right = self.level(request.prompt_ids) <= 4
        ids = self.tokenizer.encode(f"Answer: {'right' if right else 'wrong'}", add_special_tokens=False)
        answer = SampledAnswer(token_ids=ids, logprobs=[0.0] * len(ids), versions=[0] * len(ids), finish_reason="stop")
        return [answer] * request.num_samples


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    from model.tokenizer import build_tokenizer, load_tokenizer

    folder = tmp_path_factory.mktemp("judge")
    texts = ["How difficult is this task at level 123456789, from 1 to 5? Answer: right wrong"] * 3
    build_tokenizer(texts, vocab_size=300).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 2048}))
    (folder / "model.safetensors").write_bytes(b"")
    return folder, load_tokenizer(folder)


def questions(levels: list[int]) -> list[dict[str, str]]:
    """Rows on the training side, in order of level, `levels[i]` times level i."""
    rows, number = [], 0
    for level, count in enumerate(levels):
        while count:
            number += 1
            if split_of(prompt := f"Question {number} of level {level}") == "train":
                rows.append({"prompt": prompt, "answer": "right"})
                count -= 1
    return rows


def context_of(
    tmp_path: Path, checkpoint: tuple[Path, Any], rows: list[dict[str, str]], **keys: Any
) -> tuple[StageContext, ScriptedEngine, list[dict[str, Any]]]:
    folder, tokenizer = checkpoint
    write_jsonl(tmp_path / "rows.jsonl", rows)
    stage = JudgeFilterStage.model_validate(
        {
            "name": "keep", "kind": "judge_filter",
            "examples": {"dataset": str(tmp_path / "rows.jsonl"), "format": "prompt_answer"},
            "judge": {"model": str(folder), "max_prompt_tokens": 1500, "batch_prompts": 7},
        } | keys
    )  # fmt: skip
    work, engine = tmp_path / "work", ScriptedEngine(tokenizer)
    work.mkdir()
    events: list[dict[str, Any]] = []
    context = StageContext(
        stage=stage, recipe=Recipe(stages=[stage]), work=work, inputs={}, seed=5,
        cluster=SimpleNamespace(generators=engine.generators),  # type: ignore[arg-type]
        emit=lambda event, **fields: events.append({"event": event} | fields),
    )  # fmt: skip
    return context, engine, events


def test_hard_half_is_kept_and_every_prompt_has_a_verdict_on_disk(tmp_path: Path, checkpoint: tuple[Path, Any]) -> None:
    context, engine, events = context_of(tmp_path, checkpoint, questions([2, *[4] * 10]), keep_easy_share=0.1)
    metrics = run(context)
    assert metrics["num_examples"] == 42 and metrics["num_kept"] == 21 and metrics["kept_share"] == 0.5
    assert metrics["num_failures"] == {"off-label": 2}
    assert metrics["num_by_group"] == {"hard": 17, "easy_share": 2, "unknown": 2, "pruned": 21}
    assert metrics["agreement"] is None

    rows = pq.read_table(context.work / "verdicts.parquet").to_pylist()
    assert len(rows) == 42 and all(row["reason"] and row["decision_reason"] for row in rows)
    unknown = [row for row in rows if "level 0" in row["prompt"]]
    assert all(row["score"] is None and row["probabilities"] is None and row["kept"] for row in unknown)
    assert {row["measured_pass_rate"] for row in rows} == {None}
    hardest = [row for row in rows if "level 10" in row["prompt"]]
    assert all(row["score"] == pytest.approx(5.0) and row["group"] == "hard" for row in hardest)

    kept, pruned = (read_examples(context.work / f"{side}.jsonl") for side in ("kept", "pruned"))
    assert [e.task.prompt for e in kept] == [row["prompt"] for row in rows if row["kept"]]
    assert [e.task.prompt for e in pruned] == [row["prompt"] for row in rows if not row["kept"]]
    assert events[-1]["event"] == "progress" and events[-1]["done"] == events[-1]["total"] == 42
    assert engine.settings[0].prefix_caching


def test_rows_that_are_not_judged_are_said_and_counted(tmp_path: Path, checkpoint: tuple[Path, Any]) -> None:
    rows = questions([0, *[2] * 10])
    context, _, events = context_of(tmp_path, checkpoint, rows + rows[:3])
    metrics = run(context)
    assert metrics["num_examples"] == 20 and metrics["dropped"] == {"duplicate_prompts": 3}
    (note,) = [event["text"] for event in events if event["event"] == "note"]
    assert "3 duplicate prompts" in note


def test_same_seed_keeps_the_same(tmp_path: Path, checkpoint: tuple[Path, Any]) -> None:
    kept = []
    for attempt in ("a", "b"):
        (tmp_path / attempt).mkdir()
        context, _, _ = context_of(tmp_path / attempt, checkpoint, questions([3, *[4] * 5]), keep_easy_share=0.2)
        run(context)
        kept.append((context.work / "kept.jsonl").read_bytes())
    assert kept[0] == kept[1]


def test_agreement_with_a_policy_is_measured_written_and_said(tmp_path: Path, checkpoint: tuple[Path, Any]) -> None:
    context, _, events = context_of(
        tmp_path, checkpoint, questions([1, *[2] * 10]), calibrate_policy=str(checkpoint[0]), calibrate_tasks=10,
        calibrate_samples=3, calibrate_max_tokens=8,
    )  # fmt: skip
    metrics = run(context)
    agreed = metrics["agreement"]
    assert agreed["num_prompts"] == 10 and agreed["num_easy"] == 4  # levels 1 to 4 of ten spread evenly
    assert agreed["auroc_easy"]["value"] == pytest.approx(1.0) and agreed["spearman"]["value"] < -0.8
    assert metrics["tokens_generated"] > 0 and metrics["ungraded"] == 0
    (note,) = [event["text"] for event in events if event["event"] == "note"]
    assert "10 prompts (4 easy)" in note and "AUROC for easy +1.00" in note
    rows = pq.read_table(context.work / "verdicts.parquet").to_pylist()
    rates = {row["prompt"].split()[-1]: rate for row in rows if (rate := row["measured_pass_rate"]) is not None}
    assert rates == {str(level): float(level <= 4) for level in range(1, 11)}


def test_a_dead_engine_ends_the_stage_and_writes_no_verdict(tmp_path: Path, checkpoint: tuple[Path, Any]) -> None:
    context, engine, _ = context_of(tmp_path, checkpoint, questions([0, 4]))
    engine.dead = True
    with pytest.raises(InfrastructureError, match="scripted"):
        run(context)
    assert not list(context.work.iterdir())


def test_too_few_prompts_to_keep_any_is_said(tmp_path: Path, checkpoint: tuple[Path, Any]) -> None:
    context, _, _ = context_of(tmp_path, checkpoint, questions([0, 3]), keep_at_most=0.2)
    with pytest.raises(DataError, match="keep_at_most 0.2 of 3 prompts keeps none"):
        run(context)


def test_prompts_measured_are_spread_from_easiest_to_hardest() -> None:
    replies = [JudgeFailure("off-label") if i % 5 == 0 else Verdict(float(100 - i), (), "") for i in range(100)]
    places = spread_over_scores(replies, 5)
    assert (len(places), places[0], places[-1]) == (5, 99, 1)
    gaps = [before - after for before, after in zip(places, places[1:])]
    assert min(gaps) > 15 and all(place % 5 for place in places)
    assert len(spread_over_scores(replies, 500)) == len(set(spread_over_scores(replies, 500))) == 80
    assert spread_over_scores(replies[:1], 5) == [] and len(spread_over_scores(replies, 1)) == 1


def test_only_prompts_with_both_numbers_are_compared() -> None:
    replies = [Verdict(1.0, (), ""), JudgeFailure("too long"), Verdict(2.0, (), ""), Verdict(3.0, (), "")]
    agreed = agreement_with(replies, {0: 1.0, 1: 0.0, 3: 0.0}, seed=0)
    assert agreed.num_prompts == 2 and agreed.spearman.value == pytest.approx(-1.0)


def test_a_judge_that_has_no_token_for_a_rating_is_refused() -> None:
    tokenizer = SimpleNamespace(encode=lambda label, add_special_tokens: [7, 8])
    with pytest.raises(DataError, match="cuts a rating into several tokens"):
        label_ids(tokenizer, Path("judge"))
