"""Stage `judge_filter`: a Llama model rates every prompt's difficulty; the easy ones, at least half, are pruned.

Called by the runner. Leaves `verdicts.parquet` (every prompt with verdict, decision and both reasons), `kept.jsonl` and
`pruned.jsonl`. With `calibrate_policy`, says how far the judge agrees with that policy's measured pass rate, whatever
comes out.

What each wait waits for, and what ends it: a batch of ratings (the engine, its death, or JUDGE_DEADLINE_S), a prompt's
answers (the same, or SAMPLE_DEADLINE_S), a grade (the sandbox's own limits).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from judges.calibrate import Agreement, agreement
from judges.client import Judge
from judges.prompts import JudgePrompt
from judges.prune import Decision, prune
from judges.verdict import LABELS, JudgeFailure, Verdict
from pipeline.config import JudgeFilterStage
from pipeline.data import Example, load_examples, task_to_json, write_examples
from pipeline.errors import DataError, InfrastructureError
from pipeline.stage import StageContext
from rl.types import EngineSettings, SampledAnswer, SampleRequest

JUDGE_DEADLINE_S = 300.0  # longest wait for one batch of ratings; a busy core rates some 5 prompts a second
SAMPLE_DEADLINE_S = 600.0  # longest wait for all answers to one prompt, queueing included
MOST_POLICY_TOKENS = 1024  # prompt and answer together, as the RL stage's engine, which can then be this one
PASSED = 1.0  # an answer is right at full score

Reply = Verdict | JudgeFailure


def run(context: StageContext) -> dict[str, Any]:
    """Rate, prune, and (if asked) compare; returns the counts, shares and agreement."""
    stage = context.stage
    assert isinstance(stage, JudgeFilterStage)
    dropped: Counter[str] = Counter()
    examples = load_examples(stage.examples, stage.mix, context.seed, dropped=dropped)
    if dropped:
        counts = ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in sorted(dropped.items()))
        context.emit("note", text=f"{len(examples)} examples; not among them: {counts}")
    rating_at = time.monotonic()
    replies = rate(context, [example.task.prompt for example in examples])
    rating_s = time.monotonic() - rating_at
    decisions = prune(
        replies,
        [example.task.domain for example in examples],
        keep_at_most=stage.keep_at_most,
        keep_easy_share=stage.keep_easy_share,
        seed=context.seed,
    )
    kept = [example for example, decision in zip(examples, decisions) if decision.kept]
    if not kept:
        raise DataError(
            f"stages.{stage.name}: keep_at_most {stage.keep_at_most} of {len(examples)} prompts keeps none; "
            "raise examples.tasks_per_level or limit"
        )
    measured = Measurement({}, 0) if stage.calibrate_policy is None else measure(context, examples, replies)
    agreed = agreement_with(replies, measured.pass_rates, context.seed) if stage.calibrate_policy else None
    if agreed is not None:
        context.emit("note", text=str(agreed))
    write_examples(context.work / "kept.jsonl", kept)
    write_examples(context.work / "pruned.jsonl", (e for e, decision in zip(examples, decisions) if not decision.kept))
    write_verdicts(context.work / "verdicts.parquet", examples, replies, decisions, measured.pass_rates)
    return {
        **summary(examples, replies, decisions),
        "dropped": dict(dropped),
        "rating_s": round(rating_s, 2),  # the engine's start included
        "agreement": agreed and agreed.to_json(),
        "ungraded": measured.num_ungraded,
        "tokens_generated": measured.tokens_generated,
    }


# --- rating -------------------------------------------------------------------------------------------------------


def rate(context: StageContext, questions: Sequence[str]) -> list[Reply]:
    """The judge's reply to every question, in order. Its engine caches the rubric, which all prompts begin with."""
    from model.checkpoint import architecture_digest
    from model.tokenizer import load_tokenizer

    stage = context.stage
    assert isinstance(stage, JudgeFilterStage)
    checkpoint = context.checkpoint(stage.judge.model)
    settings = EngineSettings(
        checkpoint=str(checkpoint),
        dtype=stage.judge.dtype,
        max_model_len=stage.judge.max_prompt_tokens + 1,  # the rating is one token
        max_num_seqs=stage.judge.batch_prompts,
        seed=context.seed,
        prefix_caching=True,
    )
    tokenizer = load_tokenizer(checkpoint)
    labels = label_ids(tokenizer, checkpoint)
    actor = context.cluster.generators(settings, architecture_digest(checkpoint), count=1)[0]
    started_at = time.monotonic()

    async def score_labels(prompts: list[list[int]]) -> list[list[float]]:
        return await actor.call_async("score_labels", prompts, labels, timeout_s=JUDGE_DEADLINE_S)

    def tell(done: int) -> None:
        rate = round(done / max(1e-9, time.monotonic() - started_at), 1)
        context.progress(done, len(questions), "prompts", prompts_per_s=rate)

    judge = Judge(
        score_labels=score_labels,
        encode=lambda prompt: encode_judge_prompt(tokenizer, prompt),
        max_prompt_tokens=stage.judge.max_prompt_tokens,
        batch_prompts=stage.judge.batch_prompts,
    )
    return asyncio.run(judge.rate(questions, tell))


def encode_judge_prompt(tokenizer: Any, prompt: JudgePrompt) -> list[int]:
    """Ids of the conversation and of the answer's first words; the rating is the next token."""
    from model.tokenizer import encode_messages

    begun = tokenizer.encode(prompt.answer_prefix, add_special_tokens=False)
    return encode_messages(tokenizer, list(prompt.messages)) + list(begun)


def label_ids(tokenizer: Any, checkpoint: Path) -> list[int]:
    """The token of each of LABELS; DataError for a judge that has not one token for each."""
    encoded = [tokenizer.encode(label, add_special_tokens=False) for label in LABELS]
    if any(len(ids) != 1 for ids in encoded):
        raise DataError(f"{checkpoint}: the judge's tokenizer cuts a rating into several tokens: {encoded}")
    return [ids[0] for ids in encoded]


# --- comparing with a policy --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a policy makes of some of the prompts."""

    pass_rates: Mapping[int, float]  # place among the examples → share of its graded answers that are right
    tokens_generated: int
    num_ungraded: int = 0  # answers that could not be checked; in no pass rate


def measure(context: StageContext, examples: Sequence[Example], replies: Sequence[Reply]) -> Measurement:
    """Sample `calibrate_policy` on prompts spread over the judge's scores, and grade what it says."""
    from model.tokenizer import decode_answer, load_tokenizer
    from rewards.grade import grade
    from rewards.sandbox import Sandbox, SandboxUnavailable
    from rewards.task import Score

    stage = context.stage
    assert isinstance(stage, JudgeFilterStage) and stage.calibrate_policy is not None
    checkpoint = context.checkpoint(stage.calibrate_policy)
    tokenizer = load_tokenizer(checkpoint)
    places = spread_over_scores(replies, stage.calibrate_tasks)
    answers = sample_policy(context, checkpoint, tokenizer, {i: examples[i].task.prompt for i in places})
    pass_rates, num_ungraded = {}, 0
    try:
        with Sandbox() as sandbox:
            for place, sampled in answers.items():
                texts = (decode_answer(tokenizer, answer.token_ids) for answer in sampled)
                outcomes = [grade(examples[place].task, text, sandbox) for text in texts]
                passes = [outcome.value >= PASSED for outcome in outcomes if isinstance(outcome, Score)]
                num_ungraded += len(outcomes) - len(passes)
                if passes:
                    pass_rates[place] = fmean(passes)
    except SandboxUnavailable as error:
        raise InfrastructureError(str(error)) from error
    return Measurement(pass_rates, sum(len(a.token_ids) for a in chain(*answers.values())), num_ungraded)


def sample_policy(
    context: StageContext, checkpoint: Path, tokenizer: Any, prompts: Mapping[int, str]
) -> dict[int, list[SampledAnswer]]:
    """`calibrate_samples` answers to every prompt that leaves room for one, by the prompt's place."""
    from model.checkpoint import architecture_digest
    from model.tokenizer import encode_prompt, stop_token_ids

    stage = context.stage
    assert isinstance(stage, JudgeFilterStage)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    positions = (config.get("text_config") or config).get("max_position_embeddings") or MOST_POLICY_TOKENS
    max_model_len = min(MOST_POLICY_TOKENS, positions)
    encoded = {place: encode_prompt(tokenizer, prompt) for place, prompt in prompts.items()}
    asked = {place: ids for place, ids in encoded.items() if len(ids) + stage.calibrate_max_tokens <= max_model_len}
    if len(asked) < len(encoded):
        too_long = f"{len(encoded) - len(asked)} prompts leave no room for {stage.calibrate_max_tokens} tokens"
        context.emit("note", text=f"{too_long}: not measured")
    settings = EngineSettings(
        checkpoint=str(checkpoint), dtype=stage.calibrate_dtype, max_model_len=max_model_len, seed=context.seed
    )
    actors = context.cluster.generators(settings, architecture_digest(checkpoint))
    stops = tuple(stop_token_ids(tokenizer, checkpoint))
    done = 0

    async def sample(order: int, place: int) -> list[SampledAnswer]:
        nonlocal done
        request = SampleRequest(
            request_id=f"{stage.name}/{place}", prompt_ids=asked[place], num_samples=stage.calibrate_samples,
            max_tokens=stage.calibrate_max_tokens, stop_token_ids=stops,
        )  # fmt: skip
        actor = actors[order % len(actors)]
        answers = await actor.call_async("sample", request, timeout_s=SAMPLE_DEADLINE_S)
        done += 1
        context.progress(done, len(asked), "prompts measured")
        return answers

    async def sample_all() -> list[list[SampledAnswer]]:
        return await asyncio.gather(*(sample(order, place) for order, place in enumerate(asked)))

    return dict(zip(asked, asyncio.run(sample_all())))


def spread_over_scores(replies: Sequence[Reply], count: int) -> list[int]:
    """Places of at most `count` rated prompts, evenly spaced from the lowest score to the highest."""
    by_score = sorted((reply.score, i) for i, reply in enumerate(replies) if isinstance(reply, Verdict))
    count = min(count, len(by_score))
    steps = [round(k * (len(by_score) - 1) / max(1, count - 1)) for k in range(count)]
    return [by_score[step][1] for step in steps]


def agreement_with(replies: Sequence[Reply], pass_rates: Mapping[int, float], seed: int) -> Agreement:
    """The judge's scores against the measured pass rates, over the prompts that have both."""
    both = [(reply.score, rate) for i, rate in pass_rates.items() if isinstance(reply := replies[i], Verdict)]
    return agreement([score for score, _ in both], [rate for _, rate in both], seed)


# --- what is written ----------------------------------------------------------------------------------------------


def write_verdicts(
    path: Path,
    examples: Sequence[Example],
    replies: Sequence[Reply],
    decisions: Sequence[Decision],
    pass_rates: Mapping[int, float],
) -> None:
    """One row a prompt, in order. A failure has no score and no probabilities: null, and its reason."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([
        ("task_id", pa.string()), ("domain", pa.string()), ("level", pa.int32()), ("prompt", pa.string()),
        ("task_json", pa.string()), ("score", pa.float64()), ("probabilities", pa.list_(pa.float64())),
        ("reason", pa.string()), ("detail", pa.string()), ("kept", pa.bool_()), ("group", pa.string()),
        ("decision_reason", pa.string()), ("measured_pass_rate", pa.float64()),
    ])  # fmt: skip
    rows = []
    for place, (example, reply, decision) in enumerate(zip(examples, replies, decisions)):
        task, verdict = example.task, reply if isinstance(reply, Verdict) else None
        rows.append({
            "task_id": task.task_id, "domain": task.domain, "level": task.level, "prompt": task.prompt,
            "task_json": json.dumps(task_to_json(task)), "score": verdict and verdict.score,
            "probabilities": verdict and list(verdict.probabilities), "reason": reply.reason,
            "detail": reply.detail if isinstance(reply, JudgeFailure) else None, "kept": decision.kept,
            "group": decision.group, "decision_reason": decision.reason, "measured_pass_rate": pass_rates.get(place),
        })  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def summary(examples: Sequence[Example], replies: Sequence[Reply], decisions: Sequence[Decision]) -> dict[str, Any]:
    """What was judged and what was kept, in counts and shares."""
    rated = [(e.task, reply.score) for e, reply in zip(examples, replies) if isinstance(reply, Verdict)]
    by_level: dict[int, list[float]] = defaultdict(list)
    for task, score in rated:
        by_level[task.level].append(score)
    kept = [example.task for example, decision in zip(examples, decisions) if decision.kept]
    return {
        "num_examples": len(examples),
        "num_kept": len(kept),
        "kept_share": round(len(kept) / len(examples), 4),
        "num_by_group": dict(Counter(decision.group for decision in decisions)),
        "num_failures": dict(Counter(reply.reason for reply in replies if isinstance(reply, JudgeFailure))),
        "kept_by_domain": dict(Counter(task.domain for task in kept)),
        "num_by_domain": dict(Counter(example.task.domain for example in examples)),
        "score_histogram": dict(sorted(Counter(f"{int(2 * score) / 2:.1f}" for _, score in rated).items())),
        "mean_score_by_level": {str(level): round(fmean(scores), 3) for level, scores in sorted(by_level.items())},
    }
