"""Every question is asked whole, and gets one reply, in its own place."""

from __future__ import annotations

import asyncio
import math

import pytest

from judges.client import Judge
from judges.prompts import RUBRIC, JudgePrompt, render
from judges.verdict import JudgeFailure, Verdict

QUESTION = 'A cup holds {n} = 3 "beans".\nHow many in {{two}} cups? %s'


def encode(prompt: JudgePrompt) -> list[int]:
    return list("".join(message["content"] for message in prompt.messages).encode())


def certain_of(label: int) -> list[float]:
    return [0.0 if label == one else -math.inf for one in (1, 2, 3, 4, 5)]


def test_question_is_in_the_prompt_unaltered() -> None:
    assert QUESTION in render(QUESTION).messages[-1]["content"]


def test_rubric_comes_first_and_is_the_same_for_every_question() -> None:
    first, second = render("one"), render("two")
    assert first.messages[0] == second.messages[0] == {"role": "system", "content": RUBRIC}
    assert first.messages[1] != second.messages[1]
    assert first.answer_prefix and not first.answer_prefix[-1].isalnum()  # the next token is the rating itself


def test_replies_stand_in_the_order_of_the_questions_across_batches() -> None:
    batches: list[int] = []
    heard: list[int] = []

    async def score_labels(prompts: list[list[int]]) -> list[list[float]]:
        batches.append(len(prompts))
        return [certain_of(bytes(prompt).decode().count("!")) for prompt in prompts]

    questions = ["do" + "!" * n for n in (3, 1, 5, 2, 4)]
    judge = Judge(score_labels=score_labels, encode=encode, max_prompt_tokens=5000, batch_prompts=2)
    replies = asyncio.run(judge.rate(questions, heard.append))
    assert [reply.score for reply in replies if isinstance(reply, Verdict)] == [3.0, 1.0, 5.0, 2.0, 4.0]
    assert batches == [2, 2, 1] and heard == [2, 4, 5]


def test_too_long_prompt_is_never_asked_and_moves_no_other_reply() -> None:
    async def score_labels(prompts: list[list[int]]) -> list[list[float]]:
        assert all(len(prompt) <= limit for prompt in prompts)
        return [certain_of(2) for _ in prompts]

    limit = len(encode(render("short")))
    judge = Judge(score_labels=score_labels, encode=encode, max_prompt_tokens=limit)
    replies = asyncio.run(judge.rate(["short", "a very long question", "short"]))
    assert [type(reply) for reply in replies] == [Verdict, JudgeFailure, Verdict]
    assert isinstance(replies[1], JudgeFailure) and replies[1].reason == "too long"
    assert f"{limit} allowed" in replies[1].detail


def test_a_dead_engine_is_not_taken_for_a_verdict() -> None:
    async def score_labels(prompts: list[list[int]]) -> list[list[float]]:
        raise ConnectionError("engine died")

    judge = Judge(score_labels=score_labels, encode=encode, max_prompt_tokens=5000)
    with pytest.raises(ConnectionError):
        asyncio.run(judge.rate(["one"]))


def test_an_engine_that_answers_for_too_few_prompts_is_found_out() -> None:
    async def score_labels(prompts: list[list[int]]) -> list[list[float]]:
        return [certain_of(1)]

    judge = Judge(score_labels=score_labels, encode=encode, max_prompt_tokens=5000)
    with pytest.raises(ValueError):
        asyncio.run(judge.rate(["one", "two"]))
