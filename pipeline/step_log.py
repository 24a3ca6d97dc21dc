"""What every step of stage 2 leaves behind: its row of metrics, its rollouts, what its groups said and what was learnt.

Called by `pipeline/online_rl.py`. A row or file that belongs to a step is undone with it when a kill comes before the
next state; what a state says was written is made durable before it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model.disk import naming, sync
from pipeline.data import task_to_json
from pipeline.stage import StageContext
from rl.loop import StepRecord
from rl.types import RolloutGroup

STEPS, CURRICULUM, OBSERVATIONS, RENEWED = LOGS = (
    "steps.jsonl", "curriculum.jsonl", "observations.jsonl", "renewed.jsonl",
)  # fmt: skip
PARQUET_BUFFER = 1 << 20  # bytes; pyarrow itself writes every page and header apart


class StepLog:
    """What every step leaves behind. A resumed run keeps steps up to `after`: later ones were undone by a kill."""

    def __init__(self, context: StageContext, num_steps: int, prompts_too_long: int = 0, after: int = 0) -> None:
        import pyarrow as pa

        self.context, self.num_steps, self.prompts_too_long = context, num_steps, prompts_too_long
        self.steps, *_ = (rows_up_to(context.work / name, after) for name in LOGS)
        self._logs = {name: (context.work / name).open("a") for name in LOGS}
        self._parts = context.scratch / "rollouts"
        self._parts.mkdir(parents=True, exist_ok=True)
        for part in self._parts.iterdir():
            if part.suffix != ".parquet" or (part.stem.isdigit() and int(part.stem) > after):
                part.unlink()
        self._lost: Counter[str] = Counter()  # group → times, since this process began: a resumed run loses it again
        self._unsynced: list[Path] = []  # parts
        self._schema = pa.schema(
            [
                ("task_json", pa.string()),
                ("task_id", pa.string()),
                ("domain", pa.string()),
                ("level", pa.int32()),
                ("group_id", pa.string()),
                ("step", pa.int32()),
                ("version", pa.int32()),
                ("prompt_ids", pa.list_(pa.int32())),
                ("answer_ids", pa.list_(pa.int32())),
                ("text", pa.string()),
                ("score", pa.float64()),
                ("reason", pa.string()),
                ("finish_reason", pa.string()),
                ("logprobs", pa.list_(pa.float32())),
                ("token_versions", pa.list_(pa.int32())),
            ]
        )

    def write(self, record: StepRecord) -> None:
        """One step's row of metrics, its rollouts, what its groups said, and the posteriors after them. What was
        discarded stands under step 0, which trains on nothing, in the file of its step: undone with it by a kill."""
        rows = [*self._rollout_rows(record.groups, record.step), *self._rollout_rows(record.discarded, 0)]
        self._write_rollouts(rows, f"{record.step:06}")
        self.steps.append(record.metrics)
        self._append(STEPS, [record.metrics])
        asked = dict.fromkeys(outcome.choice.entry for outcome in record.outcomes)
        self._append(CURRICULUM, [{"step": record.step} | row for row in record.curriculum.rows(asked)])
        self._append(OBSERVATIONS, [
            {
                "step": record.step, "slot": one.slot, "turn": one.turn, "entry": one.choice.entry,
                "version": one.version, "expected": round(one.choice.expected, 4), "passes": one.passes,
                "total": one.total, "size": one.choice.size, "kept": one.kept,
            }
            for one in record.outcomes if one.total and not one.choice.prefix
        ])  # fmt: skip
        self._append(RENEWED, [
            {"step": record.step, "source": new.source, "parents": list(new.parents), "task": task_to_json(new.task)}
            for new in record.renewed
        ])  # fmt: skip
        metrics = record.metrics
        rate = {"pass_rate": round(metrics["pass_rate"], 3)} if "pass_rate" in metrics else {}
        self.context.progress(
            record.step,
            self.num_steps,
            "steps",
            **rate,
            tokens_per_s=round(metrics["tokens_per_s"]),
            staleness=round(metrics.get("staleness_mean", 0.0), 2),
        )

    def _append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        with naming(self.context.work / name):
            self._logs[name].write("".join(json.dumps(row) + "\n" for row in rows))
            self._logs[name].flush()

    def write_lost(self, group: RolloutGroup) -> None:
        """A group that is not used, graded by nobody or too late: its rollouts stand under step 0 too."""
        self._lost[group.group_id] += 1
        self._write_rollouts(self._rollout_rows([group], 0), f"lost-{group.group_id}-{self._lost[group.group_id]}")

    def _rollout_rows(self, groups: Sequence[RolloutGroup], step: int) -> list[dict[str, Any]]:
        return [
            {
                "task_json": json.dumps(task_to_json(group.task)), "task_id": group.task.task_id,
                "domain": group.task.domain, "level": group.task.level, "group_id": group.group_id,
                "step": step, "version": group.leased_at_version, "prompt_ids": group.prompt_ids,
                "answer_ids": rollout.answer.token_ids, "text": rollout.text, "score": rollout.score,
                "reason": rollout.reason, "finish_reason": rollout.answer.finish_reason,
                "logprobs": rollout.answer.logprobs, "token_versions": rollout.answer.versions,
            }
            for group in groups
            for rollout in group.rollouts
        ]  # fmt: skip

    def _write_rollouts(self, rows: list[dict[str, Any]], name: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        partial = self._parts / f"{name}.partial"
        with naming(partial), pa.output_stream(partial, buffer_size=PARQUET_BUFFER) as file:
            pq.write_table(pa.Table.from_pylist(rows, schema=self._schema), file)
        self._unsynced.append(partial.replace(partial.with_suffix(".parquet")))

    def sync(self) -> None:
        """Make durable what was written so far: before a state that says it was. From any thread."""
        written, self._unsynced = self._unsynced, []
        work = self.context.work
        for path in (*written, self._parts, self.context.scratch, *(work / name for name in LOGS), work):
            sync(path)

    def close(self) -> None:
        """What could not be written before is tried once more."""
        for name, log in self._logs.items():
            with naming(self.context.work / name):
                log.close()

    def finish(self) -> None:
        """All rollouts in one file, in the order of the steps. The parts stay: a kill may still undo the file."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        place = self.context.work / "rollouts.parquet"
        with (
            naming(place),
            pa.output_stream(place, buffer_size=PARQUET_BUFFER) as file,
            pq.ParquetWriter(file, self._schema) as writer,
        ):
            for part in sorted(self._parts.iterdir()):
                writer.write_table(pq.read_table(part, schema=self._schema))

    def summary(self) -> dict[str, Any]:
        first, last = self.steps[:5], self.steps[-5:]
        groups = sum(step["groups"] for step in self.steps)
        return {
            "steps": len(self.steps),
            "tokens_generated": self.steps[-1]["generated_tokens"],
            "tokens_trained": self.steps[-1]["trained_tokens"],
            "pass_rate_first_steps": _mean(first, "pass_rate"),
            "pass_rate_last_steps": _mean(last, "pass_rate"),
            "signal_share": 1 - sum(step["zero_signal_groups"] for step in self.steps) / groups,
            "staleness_max": max(step.get("staleness_max", 0.0) for step in self.steps),
            "mismatch_k3": _mean(self.steps, "mismatch_k3"),
            "groups_lost": self.steps[-1]["groups_lost"],
            "tokens_discarded": sum(step["discarded_tokens"] for step in self.steps),
            "empty_slots": sum(step["empty_slots"] for step in self.steps),
            "states": self.steps[-1]["states"],
            "ungraded": sum(step["ungraded"] for step in self.steps),
            "prompts_too_long": self.prompts_too_long,
        }


def rows_up_to(path: Path, step: int) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines up to a step; the rest is cut away, at once: a kill undoes no row that stays.
    A torn line is a later one."""
    kept, end = [], 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            break
        if row["step"] > step:
            break
        kept.append(row)
        end += len(line)
    with path.open("ab") as file:
        file.truncate(end)
    return kept


def _mean(rows: list[dict[str, Any]], key: str) -> float:
    values = [row[key] for row in rows if key in row]
    return sum(values) / len(values) if values else 0.0
