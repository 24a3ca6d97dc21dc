"""Which tasks a step samples, how many answers each gets, and what is learnt from them. No torch, ray or vllm.

    plan(slots) ──▶ for every slot its tasks in turn: the first, and, unless enough groups have signal by themselves,
                      those for where one has none
                      rl/domain_mix.py   whose turn it is: domains interleaved, none below its floor of trained tokens
                      rl/difficulty.py   posteriors and states of the pool
                      rl/samplers.py     which entries
                      rl/prefixes.py     which begin with a part of an earlier answer
                      rl/allocation.py   how many answers
    first, verdict ──▶ rl/gates.py       a few answers or all, and what becomes of a group
    learn(outcomes) ──▶ posteriors, states (their changes), floors, gate
                      rl/renewal.py      new prompts, where the pool shall grow with the policy

**What is planned for a step depends on the steps before it alone.** A step is planned once, as a whole, from what was
known when the learner was at the version for which it is planned, with random numbers keyed by (seed, its first slot,
domain). All tasks that a slot may come to are drawn with it, so a slot whose group carries no signal asks for its next
one whenever that turns out, and the choice is the same in whatever order groups end. What groups teach is learnt when
their step is taken, in the order of slots.

Exploration: a share of all choices is not the sampler's. Entries due for a re-test come first in it, then others at
random.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from rl.allocation import allocate
from rl.difficulty import (
    ACTIVE,
    PRIOR,
    STATES,
    Difficulty,
    DifficultyRules,
    Entries,
    Floats,
    Ids,
    Observation,
    StateChange,
)
from rl.domain_mix import DomainMix
from rl.gates import Choice, Dapo, Gate, Open, Outcome, Speed, Verdict
from rl.prefixes import Prefixes
from rl.renewal import NewTask, Renewal
from rl.samplers import Candidates, Pools, Sampler, Thompson, Uniform

SAMPLERS: dict[str, Callable[[CurriculumRules], Sampler]] = {
    "uniform": lambda rules: Uniform(),
    "pools": lambda rules: Pools(rules.band),
    "thompson": lambda rules: Thompson(rules.band),
}
GATES: dict[str, Callable[[CurriculumRules], Gate]] = {
    "none": lambda rules: Open(),
    "dapo": lambda rules: Dapo(),
    "speed": lambda rules: Speed(rules.screen, rules.rare_answers),
}
LENGTH_MEMORY = 0.9  # of the mean length of a domain's answers, per step
SIGNAL_MEMORY = 0.9  # of the share of groups that are kept, per step
KEPT_AT_FIRST, SAMPLED_AT_FIRST = 4.0, 8.0  # groups: before anything is known, every other one is kept


@dataclass(frozen=True, kw_only=True)
class CurriculumRules:
    band: tuple[float, float]  # pass rates aimed at, such as a group can have: `rl/band.py`
    group_size: int
    explore_share: float
    prefix_share: float = 0.0  # of the choices that go on from a part of an earlier right answer
    max_resamples: int  # tasks that may take the place of a slot's first, where the gate replaces
    min_groups: int | None = None  # they do so only where a step would keep fewer by itself; None: always
    allocator: Literal["fixed", "knapsack"]
    smallest_group: int = 2  # of the knapsack; fewer answers than two cannot differ
    largest_group: int  # of the knapsack
    screen: int  # answers; of gate speed
    rare_answers: float  # of gate speed
    domain_floor: float
    domain_turns: Literal["equal", "by_size"] = "equal"
    difficulty: DifficultyRules


class Curriculum:
    """Of one run. Steps are planned in order, and taken in order."""

    def __init__(
        self, entries: Entries, rules: CurriculumRules, sampler: Sampler, gate: Gate, seed: int,
        renewal: Renewal | None = None,
    ) -> None:  # fmt: skip
        self.entries, self.rules, self.sampler, self.gate, self.seed = entries, rules, sampler, gate, seed
        self.renewal = renewal
        self.renewed: list[NewTask] = []  # added by the last `learn`
        self.difficulty = Difficulty(entries, rules.difficulty)
        self.mix = DomainMix(entries.domains, rules.domain_floor)
        self.prefixes = Prefixes(rules.band[0])
        self.sampled: Counter[str] = Counter()  # entry → groups begun with it
        self.answer_tokens: dict[str, float] = {}  # domain → mean length of its answers of late
        self.kept_groups, self.sampled_groups = KEPT_AT_FIRST, SAMPLED_AT_FIRST  # of late
        self._open = np.zeros(len(entries), np.int32)  # choices that are planned and not yet learnt from
        self._look_at_entries()

    def _look_at_entries(self) -> None:
        """What depends on which entries there are."""
        domains = range(len(self.entries.domains))
        self._ids_of: list[Ids] = [np.nonzero(self.entries.domain == domain)[0] for domain in domains]
        if self.rules.domain_turns == "by_size":
            self.mix.sizes = {name: len(ids) for name, ids in zip(self.entries.domains, self._ids_of)}

    @property
    def turns(self) -> int:
        """Tasks that a slot may come to, one after the other, at most."""
        return 1 + (self.rules.max_resamples if self.gate.replaces else 0)

    def turns_now(self, slots: int) -> int:
        """The same for the slots of the next step. A slot that stays empty makes the batch smaller, one that is filled
        costs the answers that screen its tasks, and is worth them only where hardly a group would be left."""
        wanted = self.rules.min_groups
        enough = wanted is not None and slots * self.kept_groups / self.sampled_groups >= wanted
        return 1 if enough else self.turns

    @property
    def max_parts(self) -> int:
        """Leases after which a slot needs another one, at most: each task has its first few answers and the rest."""
        return 2 * self.turns - 1

    # --- before sampling ---------------------------------------------------------------------------------------------

    def plan(self, slots: range) -> list[list[Choice]]:
        """For each slot of one step, the choices of its turns."""
        domains, num_turns = self.mix.assign(len(slots)), self.turns_now(len(slots))
        chosen = np.zeros((num_turns, len(slots)), np.int64)
        prefixes: dict[tuple[int, int], tuple[int, ...]] = {}  # (turn, place)
        for number, domain in enumerate(self.entries.domains):
            places = [place for place, turn in enumerate(domains) if turn == domain]
            rng = np.random.default_rng([self.seed, slots.start, number])
            chosen[:, places] = self._choose(number, num_turns * len(places), rng).reshape(num_turns, len(places))
            prefixes |= self._begin(number, chosen, places, rng)
        np.add.at(self._open, chosen.reshape(-1), 1)
        turns = [self._sized(ids) for ids in chosen]
        for (turn, place), prefix in prefixes.items():
            turns[turn][place] = replace(turns[turn][place], prefix=prefix)
        return [[turn[place] for turn in turns] for place in range(len(slots))]

    def _choose(self, domain: int, count: int, rng: np.random.Generator) -> Ids:
        """Entries for `count` places of one domain, in their order."""
        explores = rng.random(count) < self.rules.explore_share
        others = self._candidates(domain, count)
        due = self.difficulty.due_now(self._ids_of[domain])
        due = due[self._open[due] == 0][: int(explores.sum())]
        found = [*due, *self._at_random(others, int(explores.sum()) - len(due), rng)]
        if not self.entries.endless:  # not twice in a step, as long as there are others
            rest = others[~np.isin(others, found)]
            others = rest if len(rest) else others
        chosen = np.zeros(count, np.int64)
        chosen[explores] = found
        chosen[~explores] = others[self.sampler.choose(self._known(others), int((~explores).sum()), rng)]
        return chosen

    def _begin(
        self, domain: int, chosen: Ids, places: Sequence[int], rng: np.random.Generator
    ) -> dict[tuple[int, int], tuple[int, ...]]:
        """Puts a share of the domain's places of the first turn to hard entries whose answers can be begun, as far as
        there are; returns with what."""
        if not self.rules.prefix_share or not places:
            return {}
        begun = [place for place in places if rng.random() < self.rules.prefix_share]
        able = self.prefixes.among(self._ids_of[domain], self.entries.names)
        able = rng.permutation(able[(self._open[able] == 0) & ~np.isin(able, chosen[:, places])])
        for place, entry in zip(begun, able):
            chosen[0, place] = entry
        names = (self.entries.names[entry] for entry in able)
        return {(0, place): self.prefixes.draw(name, rng) for place, name in zip(begun, names)}

    def _candidates(self, domain: int, count: int) -> Ids:
        """What the sampler may choose from: neither retired nor parked, nor, of prompts, on its way already. Where that
        is too little, what is on its way; where there is nothing, everything but what is given up for good."""
        ids = self._ids_of[domain]
        able = ids[self.difficulty.state[ids] <= ACTIVE]
        idle = able[self._open[able] == 0]
        if not self.entries.endless and len(idle) >= count:
            return idle
        return able if len(able) else ids[~self.difficulty.given_up(ids)]

    def _at_random(self, ids: Ids, count: int, rng: np.random.Generator) -> Ids:
        return rng.choice(ids, count, replace=self.entries.endless or count > len(ids))

    def _known(self, ids: Ids) -> Candidates:
        alpha, beta = self.difficulty.posterior(ids)
        tried = self.difficulty.tried[ids].astype(np.int64)
        return Candidates(ids=ids, alpha=alpha, beta=beta, tried=tried, endless=self.entries.endless)

    def _sized(self, ids: Ids) -> list[Choice]:
        """The choices of one turn, which share one budget."""
        alpha, beta = self.difficulty.posterior(ids)
        sizes = [self.rules.group_size] * len(ids)
        if self.rules.allocator == "knapsack":
            sizes = self._allocated(ids, alpha, beta)
        return [
            Choice(entry=self.entries.names[i], size=size, known=float(a + b - 2.0), expected=float(a / (a + b)))
            for i, size, a, b in zip(ids, sizes, alpha, beta)
        ]

    def _allocated(self, ids: Ids, alpha: Floats, beta: Floats) -> list[int]:
        """As many tokens as groups of equal size would cost, by what answers of each domain cost of late."""
        mean = sum(self.answer_tokens.values()) / len(self.answer_tokens) if self.answer_tokens else 1.0
        domains = [self.entries.domains[self.entries.domain[i]] for i in ids]
        costs = [self.answer_tokens.get(domain, mean) for domain in domains]
        return allocate(
            list(zip(alpha.tolist(), beta.tolist())), budget=self.rules.group_size * sum(costs),
            smallest=self.rules.smallest_group, largest=self.rules.largest_group, costs=costs,
        )  # fmt: skip

    # --- while sampling: nothing changes -----------------------------------------------------------------------------

    def wanted(self, choice: Choice, have: int) -> int:
        """How many answers to sample next: the gate's first few, then the rest of the group."""
        return (self.gate.first(choice) if have == 0 else choice.size) - have

    def verdict(self, choice: Choice, scores: Sequence[float | None]) -> Verdict:
        verdict = self.gate.verdict(choice, scores)
        if verdict == "more" and len(scores) >= choice.size:
            raise RuntimeError(f"{type(self.gate).__name__} asks for more than the {choice.size} answers of a group")
        return verdict

    # --- after the step ----------------------------------------------------------------------------------------------

    def learn(
        self, version: int, outcomes: Sequence[Outcome], planned: Iterable[Choice],
        replayed: Mapping[str, int] | None = None,
    ) -> list[StateChange]:  # fmt: skip
        """The learner is at `version`: what became of the groups of its last step, in the order of slots and turns.
        `planned`: all choices of that step's slots, those that nobody came to included. `replayed`: tokens of older
        groups that it was trained on again, by domain."""
        np.subtract.at(self._open, [self.entries.id_of[choice.entry] for choice in planned], 1)
        trained = Counter(replayed)
        lengths: dict[str, list[float]] = {}
        for outcome in outcomes:
            domain = self.domain_of(outcome.choice.entry)
            trained[domain] += outcome.trained_tokens
            lengths.setdefault(domain, []).append(outcome.tokens / outcome.answers)
            self.sampled[outcome.choice.entry] += 1
        for domain, seen in lengths.items():
            now = sum(seen) / len(seen)
            self.answer_tokens[domain] = now + LENGTH_MEMORY * (self.answer_tokens.get(domain, now) - now)
        self.mix.learn(trained)
        self.gate.learn(outcomes)
        self.kept_groups = SIGNAL_MEMORY * self.kept_groups + sum(one.kept for one in outcomes)
        self.sampled_groups = SIGNAL_MEMORY * self.sampled_groups + len(outcomes)
        alone = [one for one in outcomes if one.total and not one.choice.prefix]
        seen_now = [Observation(one.choice.entry, one.passes, one.total, one.version) for one in alone]
        changes = self.difficulty.learn(version, seen_now)
        if self.rules.prefix_share:
            shortest_last = sorted((one for one in outcomes if one.right), key=lambda one: -len(one.right))
            right = {one.choice.entry: one.right for one in shortest_last}
            self.prefixes.learn(version, right, self.difficulty)
        if self.renewal is not None:
            self.renewal.learn(alone)
            self.renewed = self.renewal.renew(version, self.difficulty)
            self._add(self.renewed)
        return changes

    def _add(self, new: Sequence[NewTask]) -> None:
        if new:
            self.entries.add({one.task.task_id: (one.task.domain, one.task.level) for one in new})
            self.difficulty.grow()
            self._open = np.append(self._open, np.zeros(len(new), np.int32))
            self._look_at_entries()

    def domain_of(self, entry: str) -> str:
        return self.entries.domains[self.entries.domain[self.entries.id_of[entry]]]

    def metrics(self) -> dict[str, Any]:
        """Of a step's row."""
        parts = {"sampler": self.sampler.metrics(), "gate": self.gate.metrics()}
        if self.renewal is not None:
            parts["renewal"] = self.renewal.metrics()
        shares = {domain: round(share, 4) for domain, share in self.mix.shares().items()}
        return {f"{part}/{name}": value for part, metrics in parts.items() for name, value in metrics.items()} | {
            "states": self.difficulty.counts(), "retests_due": self.difficulty.num_due(), "trained_shares": shares
        }  # fmt: skip

    def rows(self, asked: Iterable[str]) -> Iterator[dict[str, Any]]:
        """What is known of every cell that was tried, and, where entries are prompts, of those that were asked."""
        if self.entries.endless:
            (ids,) = np.nonzero(self.difficulty.tried)
        else:
            ids = np.array([self.entries.id_of[name] for name in asked], np.int64)
            passes, fails = self.difficulty.cell_evidence()
            sampled = np.bincount(self.entries.cell, self.difficulty.tried, len(self.entries.cells))
            for cell in np.nonzero(sampled)[0]:
                domain, level = self.entries.cells[cell]
                name = f"{domain}/{level}"
                yield self._row(name, cell, sampled[cell], PRIOR + passes[cell], PRIOR + fails[cell])
        for i, alpha, beta in zip(ids, *self.difficulty.posterior(ids)):
            row = self._row(self.entries.names[i], self.entries.cell[i], self.difficulty.tried[i], alpha, beta)
            yield row | {"state": STATES[self.difficulty.state[i]]}

    def _row(self, name: str, cell: int, sampled: float, alpha: float, beta: float) -> dict[str, Any]:
        domain, level = self.entries.cells[cell]
        return {"cell": name, "domain": domain, "level": level, "sampled": int(sampled),
                "alpha": round(float(alpha), 3), "beta": round(float(beta), 3)}  # fmt: skip

    # --- to disk and back --------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that `restore` needs to go on as if nothing had happened; JSON."""
        return {
            "difficulty": self.difficulty.to_json(), "mix": self.mix.state(), "sampler": self.sampler.state(),
            "gate": self.gate.state(), "sampled": dict(self.sampled), "answer_tokens": dict(self.answer_tokens),
            "kept": [self.kept_groups, self.sampled_groups],
            "open": {self.entries.names[i]: int(self._open[i]) for i in np.nonzero(self._open)[0]},
            "renewal": self.renewal.state() if self.renewal is not None else None, "prefixes": self.prefixes.state(),
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        if self.renewal is not None:
            self._add(self.renewal.restore(state["renewal"]))
        self.difficulty.restore(state["difficulty"])
        self.mix.restore(state["mix"])
        self.sampler.restore(state["sampler"])
        self.gate.restore(state["gate"])
        self.prefixes.restore(state["prefixes"])
        self.sampled, self.answer_tokens = Counter(state["sampled"]), dict(state["answer_tokens"])
        self.kept_groups, self.sampled_groups = state["kept"]
        for entry, count in state["open"].items():
            self._open[self.entries.id_of[entry]] = count
