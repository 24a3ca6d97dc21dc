"""Both TRL stages through `run(context)`: what the driver mines, hands over, forwards and leaves behind."""

from __future__ import annotations

import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from test_dpo import pairs_for
from test_sft import examples
from tiny_checkpoints import load_plain, save_tiny

import pipeline.dpo
import pipeline.sft
from pipeline.config import DpoStage, SftStage
from pipeline.data import write_examples
from pipeline.errors import DataError
from pipeline.stage import StageContext
from pipeline.trainer_actor import PROGRESS_FILE, train_in_actor


class ThreadCluster:
    """Runs actors in threads of this process, so that a failing line is seen where it stands."""

    def __init__(self) -> None:
        self.running = 0

    def start(self, name, actor_class, *args, num_threads=1, env=None):
        self.running += 1
        return ThreadActor(actor_class(*args))

    def stop(self, actor) -> None:
        self.running -= 1


class ThreadActor:
    def __init__(self, instance) -> None:
        self.instance = instance
        self.pool = ThreadPoolExecutor(1)

    async def call_async(self, method, *args, timeout_s, **kwargs):
        call = self.pool.submit(getattr(self.instance, method), *args, **kwargs)
        return await asyncio.wait_for(asyncio.wrap_future(call), timeout_s)


def context_for(tmp_path: Path, stage, inputs: dict[str, Path]) -> tuple[StageContext, list[dict]]:
    events: list[dict] = []
    work = tmp_path / "work"
    work.mkdir()
    context = StageContext(
        stage=stage, recipe=None, work=work, inputs=inputs, seed=1, cluster=ThreadCluster(),
        emit=lambda event, **fields: events.append({"event": event, **fields}),
    )  # fmt: skip
    return context, events


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_sft_stage_forwards_notes_and_progress_and_leaves_only_its_artifacts(tmp_path):
    init, keep = save_tiny("llama4", tmp_path / "init"), tmp_path / "keep"
    keep.mkdir()
    write_examples(keep / "kept.jsonl", examples(12))
    stage = SftStage(name="warm", kind="sft", init=str(init), examples="keep", train={"batch_examples": 4})
    context, events = context_for(tmp_path, stage, {"keep": keep})
    metrics = pipeline.sft.run(context)

    assert json.loads(json.dumps(metrics))["num_examples"] == 12
    assert [event["done"] for event in events if event["event"] == "progress"] == [1, 2, 3]
    assert {event["total"] for event in events if event["event"] == "progress"} == {3}
    assert "Answer: 0<|eot|>»" in next(event["text"] for event in events if event["event"] == "note")
    assert files(context.work) == {"checkpoint", "losses.jsonl"}
    assert context.cluster.running == 0
    load_plain(context.work / "checkpoint")


def rollouts_of(pair, good: float = 1.0) -> list[dict]:
    common = {key: value for key, value in asdict(pair).items() if key in pipeline.dpo.ROLLOUT_COLUMNS}
    return [
        common | {"answer_ids": ids, "score": score, "text": "", "reason": reason, "finish_reason": "stop"}
        for ids, score, reason in ((pair.chosen_ids, good, "correct"), (pair.rejected_ids, 0.0, "no final answer"))
    ]


def test_dpo_stage_mines_trains_and_leaves_pairs_with_their_category(tmp_path):
    import pyarrow
    import pyarrow.parquet

    init, climb = save_tiny("dense", tmp_path / "init"), tmp_path / "climb"
    climb.mkdir()
    rows = [row for pair in pairs_for(init, 8) for row in rollouts_of(pair)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), climb / "rollouts.parquet")
    stage = DpoStage(
        name="tidy", kind="dpo", policy=str(init), rollouts="climb", max_length_ratio=4.0, train={"batch_examples": 4}
    )
    context, events = context_for(tmp_path, stage, {"climb": climb})
    metrics = pipeline.dpo.run(context)

    assert metrics["num_pairs"] == 8 and metrics["pairs_by_category"] == {"format": 8}
    assert json.loads(json.dumps(metrics))["num_steps"] == 2
    assert [event["done"] for event in events if event["event"] == "progress"] == [1, 2]
    assert files(context.work) == {"checkpoint", "losses.jsonl", "pairs.parquet"}
    assert {row["category"] for row in pyarrow.parquet.read_table(context.work / "pairs.parquet").to_pylist()} == {
        "format"
    }
    assert pipeline.dpo.read_pairs(context.work / "pairs.parquet")[0].chosen_ids == rows[0]["answer_ids"]


def test_no_pair_is_an_error_that_counts_and_names_the_keys(tmp_path):
    import pyarrow
    import pyarrow.parquet

    init, climb = save_tiny("dense", tmp_path / "init"), tmp_path / "climb"
    climb.mkdir()
    rows = [row for pair in pairs_for(init, 3) for row in rollouts_of(pair, good=0.5)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), climb / "rollouts.parquet")
    stage = DpoStage(name="tidy", kind="dpo", policy=str(init), rollouts="climb")
    context, _ = context_for(tmp_path, stage, {"climb": climb})
    with pytest.raises(DataError, match=r"3 groups .*'no_full_score': 3.*stages\.tidy\.last_steps.*stages\.climb"):
        pipeline.dpo.run(context)

    lenient = stage.model_copy(update={"when_no_pairs": "keep_policy"})
    (tmp_path / "again").mkdir()
    context, _ = context_for(tmp_path / "again", lenient, {"climb": climb})
    metrics = pipeline.dpo.run(context)
    assert metrics["num_pairs"] == 0 and metrics["groups_dropped"] == {"no_full_score": 3}
    weights = "checkpoint/model.safetensors"
    assert (context.work / weights).read_bytes() == (init / "model.safetensors").read_bytes()


@dataclass
class SleepyJob:
    work: Path


class SleepyActor:
    def __init__(self, job: SleepyJob) -> None:
        self.job = job

    def train(self) -> dict:
        (self.job.work / PROGRESS_FILE).write_text('{"event": "note", "text": "whole"}\n{"event": "note", "te')
        time.sleep(1.5)
        return {}


def test_a_passed_deadline_stops_the_actor_and_a_half_written_line_is_not_forwarded(tmp_path):
    stage = SftStage(name="warm", kind="sft", init="x", examples="keep")
    context, events = context_for(tmp_path, stage, {})
    with pytest.raises(TimeoutError):
        train_in_actor(context, SleepyActor, SleepyJob(context.work), 0.8)
    assert events == [{"event": "note", "text": "whole"}]
    assert context.cluster.running == 0
    assert files(context.work) == set()
