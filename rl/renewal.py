"""New prompts for a pool that the policy outgrows: made at the frontier, kept apart from what is held out, judged by
what they teach. No torch, ray or vllm.

    every few steps   a *source* is drawn for each new prompt, those whose prompts carried signal more often (Thompson);
                      where it can make none, the next best is asked, and where none can, that is all for now
      generators      of the domains whose own tasks the pool holds, at the level nearest the middle of the band
      mutations       `rewards/mutations.py` of prompts that the policy mostly solves: a verifier knows the new answer
    a prompt is refused that is in the pool, or near one that is held out (by words that none of the pool's own prompts
    has: those are a data set's wording), that does not fit, or for which the pool has no room: synthetic prompts are at
    most a given share of it. Where there is no room, one that is retired gives its place to a new one, then one that
    is parked, and is never tested again
    admitted, it is new to the curriculum like any other, which finds out how hard it is, retires it or parks it

Deterministic: what is made at a version depends on the seed and on what was learnt until then.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rewards.domains import LEVELS, generate, is_generated
from rewards.mutations import MUTATIONS, PARENTS
from rewards.task import Task, split_of
from rl.difficulty import Difficulty
from rl.gates import Outcome

GENERATORS = "generators"
SOURCES = (GENERATORS, *MUTATIONS)
NGRAM = 13  # words; a prompt that shares so many in a row with a held-out one is refused (GPT-3, and most since)
DRAWS = 8  # of a source for one prompt, before the next one is asked


@dataclass(frozen=True, kw_only=True)
class RenewalRules:
    every: int  # steps
    prompts: int  # at a time
    share: float  # of the pool that may be synthetic, and be tried again
    sources: tuple[str, ...]
    band: tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class NewTask:
    """Where a prompt came from."""

    task: Task
    source: str
    parents: tuple[str, ...]  # entries
    version: int  # of the policy whose frontier it was made for


class Overlap:
    """Whether a prompt is one that is known, or near one that is held out."""

    def __init__(self, known: Iterable[str], held_out: Iterable[str]) -> None:
        self.held_out: set[tuple[str, ...]] = set()
        for prompt in held_out:
            self.held_out |= ngrams(prompt)
        self.known: set[str] = set()
        for prompt in known:
            self.known.add(folded(prompt))
            self.held_out -= ngrams(prompt)

    def reason(self, prompt: str) -> str:
        """To refuse it; empty where there is none."""
        if folded(prompt) in self.known:
            return "known"
        if split_of(prompt) == "held_out" or not self.held_out.isdisjoint(ngrams(prompt)):
            return "held out"
        return ""


def folded(prompt: str) -> str:
    return " ".join(prompt.casefold().split()).strip(" .!?")


def ngrams(prompt: str) -> set[tuple[str, ...]]:
    """All runs of NGRAM words and signs; of a shorter prompt, the whole."""
    words = re.findall(r"\w+|[^\w\s]", prompt.casefold())
    return {tuple(words[i : i + NGRAM]) for i in range(max(1, len(words) - NGRAM + 1))}


class Renewal:
    def __init__(
        self, rules: RenewalRules, tasks: dict[str, Task], held_out: Iterable[str], fits: Callable[[Task], bool],
        seed: int,
    ) -> None:  # fmt: skip
        """`tasks`: the pool, entry → task; new ones are put into it. `fits`: whether a prompt leaves room to answer."""
        self.rules, self.tasks, self.fits, self.seed = rules, tasks, fits, seed
        self.room = int(rules.share / (1.0 - rules.share) * len(tasks))  # for synthetic prompts
        self.overlap = Overlap((task.prompt for task in tasks.values()), held_out)
        self.made: dict[str, NewTask] = {}
        self.groups: Counter[str] = Counter()  # source → sampled of its prompts
        self.with_signal: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()  # reason → prompts

    def renew(self, version: int, difficulty: Difficulty) -> list[NewTask]:
        """What is added to the pool at this version."""
        if version % self.rules.every:
            return []
        rng = random.Random(f"{self.seed}/renewal/{version}")
        frontier = Frontier(difficulty, self.rules.band, self.tasks)
        ids = np.array([difficulty.entries.id_of[name] for name in self.made], np.int64)
        room, set_aside = self.room - difficulty.num_alive(ids), difficulty.set_aside(ids)
        found: list[NewTask] = []
        for _ in range(min(self.rules.prompts, room + len(set_aside))):
            promise = {source: self._promise(source, rng) for source in self.rules.sources}
            # One that cannot make any of what the pool holds learns nothing of itself: the next one is asked.
            best_first = sorted(promise, key=lambda source: -promise[source])
            made = (self._make(source, frontier, version, rng) for source in best_first)
            new = next((one for one in made if one is not None), None)
            if new is None:
                break
            self._admit(new)
            found.append(new)
        difficulty.give_up(set_aside[: max(0, len(found) - room)])
        return found

    def _promise(self, source: str, rng: random.Random) -> float:
        """A draw of the share of its groups that carry signal."""
        signal, without = self.with_signal[source], self.groups[source] - self.with_signal[source]
        return rng.betavariate(1 + signal, 1 + without)

    def _make(self, source: str, frontier: Frontier, version: int, rng: random.Random) -> NewTask | None:
        for _ in range(DRAWS):
            task, parents = frontier.generated(rng) if source == GENERATORS else frontier.mutated(source, rng)
            if task is None:
                self.refused["does not apply"] += 1
                continue
            reason = self.overlap.reason(task.prompt) or ("" if self.fits(task) else "too long")
            if not reason:
                return NewTask(task=task, source=source, parents=parents, version=version)
            self.refused[reason] += 1
        return None

    def _admit(self, new: NewTask) -> None:
        self.made[new.task.task_id] = new
        self.tasks[new.task.task_id] = new.task
        self.overlap.known.add(folded(new.task.prompt))

    def learn(self, outcomes: Sequence[Outcome]) -> None:
        """A source is judged by its prompts' groups."""
        for outcome in outcomes:
            new = self.made.get(outcome.choice.entry)
            if new is not None:
                self.groups[new.source] += 1
                self.with_signal[new.source] += 0 < outcome.passes < outcome.total

    def metrics(self) -> dict[str, float]:
        """Named in a step's row as `renewal/…`."""
        shares = {f"{name}_signal": self.with_signal[name] / count for name, count in self.groups.items()}
        return {"prompts": len(self.made), "refused": self.refused.total(), **shares}

    # --- to disk and back --------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {"made": [asdict(new) for new in self.made.values()], "groups": dict(self.groups),
                "with_signal": dict(self.with_signal), "refused": dict(self.refused)}  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> list[NewTask]:
        """What was made until then: the pool is to be given it again."""
        made = [
            NewTask(**row | {"task": Task(**row["task"]), "parents": tuple(row["parents"])}) for row in state["made"]
        ]
        for new in made:
            self._admit(new)
        self.groups, self.with_signal = Counter(state["groups"]), Counter(state["with_signal"])
        self.refused = Counter(state["refused"])
        return made


class Frontier:
    """What the policy can and cannot do, as known at one version, and tasks made for it."""

    def __init__(self, difficulty: Difficulty, band: tuple[float, float], tasks: Mapping[str, Task]) -> None:
        self.tasks, self.middle = tasks, sum(band) / 2
        self.generated_domains = sorted({task.domain for task in tasks.values() if is_generated(task)})
        self.entries = difficulty.entries
        (tried,) = np.nonzero(difficulty.tried)
        mean = difficulty.mean(tried)
        # A harder prompt than one in the lower half of the band would be too hard.
        self.solved = [self.entries.names[i] for i, rate in zip(tried, mean) if rate >= self.middle]
        passes, fails = difficulty.cell_evidence()
        self.rate = {
            cell: float(right / (right + wrong))
            for cell, right, wrong in zip(self.entries.cells, passes, fails)
            if right + wrong > 0
        }

    def level(self, domain: str) -> int:
        """The level whose pass rate is nearest the middle of the band; one more than the hardest that was tried where
        even that is solved. The easiest where nothing is known."""
        known = {level: rate for (of, level), rate in self.rate.items() if of == domain and level in LEVELS}
        if not known:
            return LEVELS[0]
        hardest = max(known)
        if known[hardest] > self.middle:
            return min(hardest + 1, LEVELS[-1])
        return min(known, key=lambda level: (abs(known[level] - self.middle), level))

    def generated(self, rng: random.Random) -> tuple[Task | None, tuple[str, ...]]:
        if not self.generated_domains:
            return None, ()
        domain = rng.choice(self.generated_domains)
        return generate(domain, self.level(domain), rng.randrange(2**40), "train"), ()

    def mutated(self, mutation: str, rng: random.Random) -> tuple[Task | None, tuple[str, ...]]:
        count = PARENTS.get(mutation, 1)
        if len(self.solved) < count:
            return None, ()
        parents = tuple(rng.sample(self.solved, count))
        return MUTATIONS[mutation]([self.tasks[name] for name in parents], rng), parents
