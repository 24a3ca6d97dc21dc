"""Asks a judge, and reads its replies.

Called by `pipeline/judge_filter.py`, which hands in the engine and the tokenizer as two functions: this room knows
neither. Every question gets exactly one verdict or one failure, in order; an engine's own error is neither, and rises.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from judges.prompts import JudgePrompt, render
from judges.verdict import JudgeFailure, Verdict, read_verdict

ScoreLabels = Callable[[list[list[int]]], Awaitable[list[list[float]]]]
Encode = Callable[[JudgePrompt], list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    score_labels: ScoreLabels  # prompts' token ids → for each, the log-probability of every label as next token
    encode: Encode  # chat messages and the begun answer → token ids
    max_prompt_tokens: int  # longer prompts are not cut: half a question is another question
    batch_prompts: int = 64  # prompts in flight at once

    async def rate(
        self, questions: Sequence[str], progress: Callable[[int], None] = lambda done: None
    ) -> list[Verdict | JudgeFailure]:
        """One reply per question, in order. `progress` hears after each batch how many questions are done."""
        prompts = [self.encode(render(question)) for question in questions]
        replies: list[Verdict | JudgeFailure] = [self._too_long(prompt) for prompt in prompts]
        asked = [i for i, prompt in enumerate(prompts) if len(prompt) <= self.max_prompt_tokens]
        for start in range(0, len(asked), self.batch_prompts):
            batch = asked[start : start + self.batch_prompts]
            rows = await self.score_labels([prompts[i] for i in batch])
            for i, label_logprobs in zip(batch, rows, strict=True):
                replies[i] = read_verdict(label_logprobs)
            progress(len(prompts) - len(asked) + start + len(batch))
        return replies

    def _too_long(self, prompt: list[int]) -> JudgeFailure:
        return JudgeFailure("too long", f"{len(prompt)} tokens with the rubric, {self.max_prompt_tokens} allowed")
