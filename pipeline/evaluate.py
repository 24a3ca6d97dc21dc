"""The evaluate stage: held-out pass@k of one or more checkpoints, by the generator class that makes the rollouts.

Called by the runner. Promises: every answer lies in answers.parquet with its score and reason; an answer that could not
be graded is counted and never scored; equal tasks get equal seeds under every checkpoint; the digest in results.json is
that of the bytes that were evaluated.

What each wait waits for, and what ends it: a free place at a generator (another task's answers), a task's answers (the
engine, its death, or SAMPLE_DEADLINE_S), a grade (the sandbox's own limits).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from pipeline.config import EvaluateStage
from pipeline.data import load_tasks
from pipeline.engines import engine_settings
from pipeline.errors import DataError, InfrastructureError
from pipeline.stage import StageContext
from rewards.grade import grade
from rewards.pass_at_k import mean_with_interval, pass_at_k
from rewards.sandbox import Sandbox, SandboxUnavailable
from rewards.task import Score, Task, Ungraded
from rl.types import SampledAnswer, SampleRequest

if TYPE_CHECKING:
    from pipeline.cluster import Actor

PASSED = 1.0  # an answer is right at full score; partial credit is for training
SAMPLE_DEADLINE_S = 600.0  # longest wait for all answers to one task
NUM_GRADERS = 2  # answers graded at once
PROGRESS_EVERY_S = 1.0
PART_RESAMPLES = 300  # for the interval of a domain, level or cell; there are many
UNASKED = "unasked"  # finish_reason where the prompt leaves no room for an answer

Estimate = dict[str, float]  # value, low, high in [0, 1]; tasks: how many it is the mean of


@dataclass(frozen=True, slots=True, kw_only=True)
class GradedAnswer:
    """One row of answers.parquet."""

    policy: str
    task_id: str
    domain: str
    level: int
    prompt: str
    sample: int  # 0 … samples - 1
    text: str
    score: float | None  # None: ungraded
    reason: str
    finish_reason: str  # "stop", "length", or UNASKED
    num_tokens: int


def run(context: StageContext) -> dict[str, Any]:
    """Evaluate every policy; leaves results.json and answers.parquet."""
    stage = context.stage
    assert isinstance(stage, EvaluateStage)
    started_at = time.monotonic()
    tasks = load_tasks(stage.tasks, context.seed)
    if not tasks:
        raise DataError(f"stages.{stage.name}.tasks: no task; widen levels or raise tasks_per_level")
    # All are found before any is sampled: a wrong path should not cost the first checkpoint's evaluation.
    checkpoints = {policy: context.checkpoint(policy) for policy in stage.policies}
    pace = Pace(context, total=len(checkpoints) * len(tasks) * stage.samples)
    results = []
    with started_sandbox() as sandbox, AnswerFile(context.work / "answers.parquet") as file:
        for policy, checkpoint in checkpoints.items():
            policy_started_at = time.monotonic()
            pace.policy = policy
            answers = Examination(context, policy, checkpoint, sandbox, pace).answers(tasks)
            file.write(answers)
            result = {
                "policy": policy,
                "checkpoint_digest": checkpoint_digest(checkpoint),
                **summarise(answers, stage.k, context.seed),
                "seconds": round(time.monotonic() - policy_started_at, 3),
            }
            results.append(result)
            context.emit("metric", policy=policy, pass_at_k=values(result), ungraded=result["ungraded"])
    report = {"k": stage.k, "samples": stage.samples, "num_tasks": len(tasks), "policies": results}
    (context.work / "results.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    return {
        "pass_at_k": {result["policy"]: values(result) for result in results},
        "num_tasks": len(tasks),
        "ungraded": sum(sum(result["ungraded"].values()) for result in results),
        "tokens_generated": sum(result["tokens_generated"] for result in results),
        "seconds": round(time.monotonic() - started_at, 3),
    }


@contextmanager
def started_sandbox() -> Iterator[Sandbox]:
    try:
        sandbox = Sandbox(workers=NUM_GRADERS)
        sandbox.start()
    except SandboxUnavailable as error:
        raise InfrastructureError(str(error)) from error
    try:
        yield sandbox
    finally:
        sandbox.stop()


# --- sampling and grading -----------------------------------------------------------------------------------------


@dataclass
class Pace:
    """How far the stage is; tells the live view about once a second."""

    context: StageContext
    total: int  # answers of all policies
    policy: str = ""
    done: int = 0
    tokens: int = 0
    started_at: float = field(default_factory=time.monotonic)
    told_at: float = 0.0

    def add(self, answers: Sequence[GradedAnswer]) -> None:
        self.done += len(answers)
        self.tokens += sum(answer.num_tokens for answer in answers)
        now = time.monotonic()
        if now - self.told_at >= PROGRESS_EVERY_S or self.done == self.total:
            self.told_at = now
            rate = round(self.tokens / max(1e-9, now - self.started_at))
            self.context.progress(self.done, self.total, "answers", tokens_per_s=rate, policy=self.policy)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A task as the engine is asked it."""

    task: Task
    prompt_ids: list[int]
    max_tokens: int  # below 1: the prompt leaves no room for an answer


class Examination:
    """One checkpoint answering every task."""

    def __init__(self, context: StageContext, policy: str, checkpoint: Path, sandbox: Sandbox, pace: Pace) -> None:
        from model.tokenizer import load_tokenizer, stop_token_ids

        assert isinstance(context.stage, EvaluateStage)
        self.context, self.stage, self.policy, self.checkpoint = context, context.stage, policy, checkpoint
        self.sandbox, self.pace = sandbox, pace
        self.engine = engine_settings(context.stage.dtype, checkpoint, context.seed)
        try:
            self.tokenizer = load_tokenizer(checkpoint)
        except ValueError as error:
            raise DataError(str(error)) from error
        self.stop_token_ids = tuple(stop_token_ids(self.tokenizer, checkpoint))

    def answers(self, tasks: Sequence[Task]) -> list[GradedAnswer]:
        """`stage.samples` graded answers to every task, in the order of the tasks."""
        from model.checkpoint import architecture_digest

        questions = [self.question(task) for task in tasks]
        generators = self.context.cluster.generators(
            self.engine, architecture_digest(self.checkpoint), self.stage.engines
        )
        places = max(
            1, 2 * self.engine.max_num_seqs // self.stage.samples
        )  # tasks at one engine: it always has a queue
        graders = ThreadPoolExecutor(NUM_GRADERS, thread_name_prefix="grader")
        try:
            by_task = asyncio.run(self._answer_all(questions, generators * places, graders))
        finally:
            graders.shutdown(wait=False, cancel_futures=True)
        return [answer for answers in by_task for answer in answers]

    def question(self, task: Task) -> Question:
        from model.tokenizer import encode_prompt

        prompt_ids = encode_prompt(self.tokenizer, task.prompt)
        room = min(self.stage.max_answer_tokens, self.engine.max_model_len - len(prompt_ids))
        return Question(task=task, prompt_ids=prompt_ids, max_tokens=room)

    async def _answer_all(
        self, questions: Sequence[Question], places: Sequence[Actor], graders: ThreadPoolExecutor
    ) -> list[list[GradedAnswer]]:
        free: asyncio.Queue[Actor] = asyncio.Queue()
        for generator in places:
            free.put_nowait(generator)
        return await all_of(self._answer_one(question, free, graders) for question in questions)

    async def _answer_one(
        self, question: Question, free: asyncio.Queue[Actor], graders: ThreadPoolExecutor
    ) -> list[GradedAnswer]:
        if question.max_tokens < 1:
            answers = [self._unasked(question, sample) for sample in range(self.stage.samples)]
        else:
            generator = await free.get()
            try:
                sampled = await generator.call_async("sample", self._request(question), timeout_s=SAMPLE_DEADLINE_S)
            finally:
                free.put_nowait(generator)  # before the grading: the engine need not wait for the sandbox
            loop = asyncio.get_running_loop()
            grades = [loop.run_in_executor(graders, self._graded, question.task, i, a) for i, a in enumerate(sampled)]
            answers = list(await asyncio.gather(*grades))
        self.pace.add(answers)
        return answers

    def _request(self, question: Question) -> SampleRequest:
        return SampleRequest(
            request_id=f"{self.stage.name}/{self.policy}/{question.task.task_id}",
            prompt_ids=question.prompt_ids,
            num_samples=self.stage.samples,
            max_tokens=question.max_tokens,
            temperature=self.stage.temperature,
            stop_token_ids=self.stop_token_ids,
            seed=request_seed(self.context.seed, question.task.task_id),
        )

    def _graded(self, task: Task, sample: int, answer: SampledAnswer) -> GradedAnswer:
        from model.tokenizer import decode_answer

        text = decode_answer(self.tokenizer, answer.token_ids)
        outcome = grade(task, text, self.sandbox)
        return self._row(task, sample, text, outcome, answer.finish_reason, len(answer.token_ids))

    def _unasked(self, question: Question, sample: int) -> GradedAnswer:
        outcome = Ungraded(f"prompt leaves no room for an answer in {self.engine.max_model_len} tokens")
        return self._row(question.task, sample, "", outcome, UNASKED, 0)

    def _row(
        self, task: Task, sample: int, text: str, outcome: Score | Ungraded, finish_reason: str, num_tokens: int
    ) -> GradedAnswer:
        return GradedAnswer(
            policy=self.policy, task_id=task.task_id, domain=task.domain, level=task.level, prompt=task.prompt,
            sample=sample, text=text, score=outcome.value if isinstance(outcome, Score) else None,
            reason=outcome.reason, finish_reason=finish_reason, num_tokens=num_tokens,
        )  # fmt: skip


async def all_of(works: Iterable[Any]) -> list[Any]:
    """The results in order. The first error cancels the rest and is raised as itself."""
    try:
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(work) for work in works]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in running]


def request_seed(seed: int, task_id: str) -> int:
    """The same for every checkpoint, and far apart between tasks: an engine may count on from it per sample."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{task_id}".encode()).digest()[:4]) >> 1


def checkpoint_digest(checkpoint: Path) -> str:
    """sha256 over the bytes of all safetensors files, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(checkpoint.glob("*.safetensors")):
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


class AnswerFile:
    """answers.parquet, one row group per checkpoint."""

    def __init__(self, path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        whole = pyarrow.int32()
        kinds = {"level": whole, "sample": whole, "score": pyarrow.float64(), "num_tokens": whole}
        names = [column.name for column in fields(GradedAnswer)]
        self.schema = pyarrow.schema([(name, kinds.get(name, pyarrow.string())) for name in names])
        self.writer = pyarrow.parquet.ParquetWriter(path, self.schema, compression="zstd")

    def write(self, answers: Sequence[GradedAnswer]) -> None:
        import pyarrow

        self.writer.write_table(pyarrow.Table.from_pylist([asdict(answer) for answer in answers], schema=self.schema))

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.writer.close()


# --- what it adds up to -------------------------------------------------------------------------------------------


def summarise(answers: Sequence[GradedAnswer], ks: Sequence[int], seed: int) -> dict[str, Any]:
    """pass@k over all tasks, by domain, by level and by both, and what was left out.

    `left_out`: k → tasks with fewer than k graded answers, on which pass@k is not defined.
    """
    scores: dict[tuple[str, int, str], list[float | None]] = defaultdict(list)
    for answer in answers:
        scores[answer.domain, answer.level, answer.task_id].append(answer.score)
    tallies = {key: tally(task_scores) for key, task_scores in scores.items()}

    def by(name_of: Callable[[str, int], str]) -> dict[str, dict[str, Estimate | None]]:
        parts: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for (domain, level, _), counts in sorted(tallies.items()):
            parts[name_of(domain, level)].append(counts)
        return {name: estimates(counts, ks, seed, PART_RESAMPLES) for name, counts in parts.items()}

    asked = [answer for answer in answers if answer.finish_reason != UNASKED]
    num_tokens = [answer.num_tokens for answer in asked]
    return {
        "pass_at_k": estimates(list(tallies.values()), ks, seed),
        "domains": by(lambda domain, _: domain),
        "levels": by(lambda _, level: str(level)),
        "cells": by(lambda domain, level: f"{domain}/{level}"),
        "left_out": {str(k): sum(graded < k for graded, _ in tallies.values()) for k in ks},
        "ungraded": dict(Counter(answer.reason for answer in answers if answer.score is None)),
        "mean_answer_tokens": fmean(num_tokens) if asked else 0.0,
        "truncated_share": fmean(answer.finish_reason == "length" for answer in asked) if asked else 0.0,
        "tokens_generated": sum(num_tokens),
    }


def tally(scores: Sequence[float | None]) -> tuple[int, int]:
    """(graded answers, right answers) of one task."""
    graded = [score for score in scores if score is not None]
    return len(graded), sum(score >= PASSED for score in graded)


def estimates(
    counts: Sequence[tuple[int, int]], ks: Sequence[int], seed: int, num_resamples: int = 2000
) -> dict[str, Estimate | None]:
    """k → mean of the tasks' unbiased pass@k with its 95% bootstrap interval over tasks; None where no task has k."""
    found: dict[str, Estimate | None] = {}
    for k in ks:
        per_task = [pass_at_k(graded, right, k) for graded, right in counts if graded >= k]
        found[str(k)] = None
        if per_task:
            mean = mean_with_interval(per_task, num_resamples=num_resamples, seed=seed)
            found[str(k)] = {"value": mean.mean, "low": mean.low, "high": mean.high, "tasks": mean.num_tasks}
    return found


def values(result: Mapping[str, Any]) -> dict[str, float | None]:
    """k → pass@k alone."""
    return {k: estimate and estimate["value"] for k, estimate in result["pass_at_k"].items()}
