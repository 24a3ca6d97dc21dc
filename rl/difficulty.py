"""How hard every entry of the pool is for the current policy: decayed Beta posteriors, and the state each entry is in.

An *entry* is what the curriculum chooses: one prompt of a data set, or a (domain, level) of a generator that never runs
dry. All entries of a (domain, level) form a *cell*. At policy version v an entry's pass rate has the posterior

    Beta(prior + Σ λ^(v - v_i)·passes_i + borrowed, prior + Σ λ^(v - v_i)·fails_i + borrowed)    (MoPPS, with priors)

over its observations i, each with the version v_i that gave its answers: what an older policy could do counts less.
Borrowed are, as so many answers,

    judge_strength · (judged pass rate, its complement)              from the judge's score, where there is one
    min(1, strength / n) · (passes, fails) of the cell's other entries, n in all, decayed the same way

so a prompt never tried begins at what the judge and its neighbours say, and leaves it as its own answers come in. An
entry that is its whole cell has no neighbours to borrow from.

The prior is Beta(1, 1), or what the order of levels leaves of it: a level is no easier than those below it, and no
harder than those above (`Difficulty.level_prior`). So a few answers to hopeless prompts of one level speak for all that
are harder, where a cell alone would have to be tried to be ruled out.

How much neighbours tell is learnt, cell by cell: pass rates within a cell are taken for Beta-distributed with a mean
and a correlation ρ of two answers to one prompt, and strength = 1/ρ - 1 is that distribution's α + β. ρ begins at
1/(neighbour_strength + 1), which weighs as much as PRIOR_PROMPTS prompts, and is estimated by moments from those that
were tried (Kleinman 1973). Where none of a level's prompts was ever solved, a new one of it is hardly worth a try; in a
data set of one level and of all kinds, prompts say little of each other.

States, and what moves an entry between them (every change is a `StateChange` with its reason):

    new ──first group──▶ active ◀──re-test──▶ retired    its own answers say pass rate >= retire_above
                                ◀──re-test──▶ parked     pass rate <= park_below: too hard, for now

Retired and parked entries are not drawn. They are due for a re-test after `retest_every` versions, but for made-up ones
that gave their place to another (`rl/renewal.py`); parked ones as soon as the pass rate of their neighbours (the cell's
other entries and the next easier level) has risen by `retest_rise`.

Columns of numpy, a row per entry: a million entries cost about 70 MB and some milliseconds a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rewards.task import UNKNOWN_LEVEL

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

NEW, ACTIVE, RETIRED, PARKED = range(4)
STATES = ("new", "active", "retired", "parked")
PRIOR = 1.0  # Beta(1, 1): any pass rate is as likely as any other
PRIOR_PROMPTS = 2.0
MOST_STRENGTH = 64.0  # answers; neighbours never tell more
MOST_FROM_LEVELS = 32.0  # answers; nor does the order of levels
FORGOTTEN = 1e-6  # answers; less evidence than this is none
NEVER = np.iinfo(np.int32).max


class Entries:
    """The pool in columns, in the order in which it was given."""

    def __init__(
        self, cells: Mapping[str, tuple[str, int]], *, endless: bool = False, judged: Mapping[str, float] | None = None
    ) -> None:
        """`cells`: entry → (domain, level); levels of 1 and above are in order, others only tell entries apart.
        `endless`: an entry never runs dry, and may be drawn more than once a step.
        `judged`: entry → pass rate that its judged difficulty stands for."""
        if not cells:
            raise ValueError("a pool needs at least one entry")
        self.names = list(cells)
        self.id_of = {name: i for i, name in enumerate(self.names)}
        self.endless = endless
        self.domains = list(dict.fromkeys(domain for domain, _ in cells.values()))
        self.cells = list(dict.fromkeys(cells.values()))
        domain_ids = {domain: i for i, domain in enumerate(self.domains)}
        cell_ids = {cell: i for i, cell in enumerate(self.cells)}
        self.domain: Ids = np.array([domain_ids[domain] for domain, _ in cells.values()])
        self.cell: Ids = np.array([cell_ids[cell] for cell in cells.values()])
        self.easier = self._easier()
        self.ladders = self._ladders()
        judged = judged or {}
        self.judged: Floats = np.array([judged.get(name, np.nan) for name in self.names])

    def _easier(self) -> Ids:
        """Of each cell, the one a level below, or -1."""
        cell_ids = {cell: i for i, cell in enumerate(self.cells) if cell[1] > UNKNOWN_LEVEL}
        return np.array([cell_ids.get((domain, level - 1), -1) for domain, level in self.cells])

    def _ladders(self) -> list[Ids]:
        """Of each domain with several levels, its cells from the easiest level to the hardest; what has none is of
        any difficulty."""
        ladders = [
            sorted(
                (i for i, (of, level) in enumerate(self.cells) if of == domain and level > UNKNOWN_LEVEL),
                key=lambda i: self.cells[i][1],
            )
            for domain in self.domains
        ]
        return [np.array(ladder) for ladder in ladders if len(ladder) > 1]

    def add(self, cells: Mapping[str, tuple[str, int]]) -> None:
        """More entries, of domains that are here already."""
        for name, cell in cells.items():
            self.id_of[name] = len(self.names)
            self.names.append(name)
            if cell not in self.cells:
                self.cells.append(cell)
        self.domain = np.append(self.domain, [self.domains.index(domain) for domain, _ in cells.values()])
        self.cell = np.append(self.cell, [self.cells.index(cell) for cell in cells.values()])
        self.judged = np.append(self.judged, np.full(len(cells), np.nan))
        self.easier, self.ladders = self._easier(), self._ladders()

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True, kw_only=True)
class DifficultyRules:
    decay: float  # memory kept per policy version
    judge_strength: float  # answers
    neighbour_strength: float  # answers, before anything is known of a cell; 0: neighbours tell nothing
    retire_above: float | None  # pass rate; None: never
    park_below: float | None  # pass rate; None: never
    retest_every: int  # versions
    retest_rise: float  # of the neighbours' pass rate
    ordered_levels: bool = True  # no level of a domain is easier than those below it


@dataclass(frozen=True, slots=True)
class Observation:
    """What one group said about its entry."""

    entry: str
    passes: int
    total: int
    version: int  # of the weights that gave the answers


@dataclass(frozen=True, slots=True)
class StateChange:
    entry: str
    before: str
    after: str
    reason: str


class Difficulty:
    """Posteriors and states of all entries at `version`."""

    def __init__(self, entries: Entries, rules: DifficultyRules) -> None:
        self.entries, self.rules, self.version = entries, rules, 0
        count = len(entries)
        self.passes, self.fails = np.zeros(count), np.zeros(count)  # decayed to `version`
        self.tried = np.zeros(count, np.int32)  # groups
        self.answers = np.zeros(count, np.int32)  # graded, ever
        self.seen = np.full(count, -1, np.int32)  # version of the newest observation
        self.state = np.zeros(count, np.int8)
        self.due = np.full(count, NEVER, np.int32)  # version at which a retired or parked entry is tested again
        self.watched = np.zeros(count)  # its neighbours' pass rate when it was parked

    def grow(self) -> None:
        """Entries were added: they are new."""
        more = len(self.entries) - len(self.state)
        self.passes, self.fails, self.watched = (
            np.append(column, np.zeros(more)) for column in (self.passes, self.fails, self.watched)
        )
        self.tried, self.answers, self.state = (
            np.append(column, np.zeros(more, column.dtype)) for column in (self.tried, self.answers, self.state)
        )
        self.seen = np.append(self.seen, np.full(more, -1, np.int32))
        self.due = np.append(self.due, np.full(more, NEVER, np.int32))

    # --- posteriors --------------------------------------------------------------------------------------------------

    def posterior(self, ids: Ids) -> tuple[Floats, Floats]:
        """(α, β) of these entries."""
        entries, rules = self.entries, self.rules
        other_passes, other_fails = self._others(ids)
        known = other_passes + other_fails
        strength = self.strength()[entries.cell[ids]]
        share = np.minimum(1.0, strength / np.maximum(known, FORGOTTEN))
        judged = entries.judged[ids]
        trust = np.where(np.isnan(judged), 0.0, rules.judge_strength)
        judged = np.nan_to_num(judged)
        prior_alpha, prior_beta = (of_cell[entries.cell[ids]] for of_cell in self.level_prior())
        alpha = prior_alpha + self.passes[ids] + share * other_passes + trust * judged
        beta = prior_beta + self.fails[ids] + share * other_fails + trust * (1.0 - judged)
        return alpha, beta

    def level_prior(self) -> tuple[Floats, Floats]:
        """(α, β) of each cell, from the other levels of its domain.

        The rate of a level is at most that of any run of levels that ends below it, and at least that of any run that
        begins above it. A run's own rate is known up to √3 standard deviations, which is all of [0, 1] for Beta(1, 1).
        Between the tightest of these bounds any rate is as likely: the prior is the Beta distribution with the mean and
        the variance of that uniform one, worth `MOST_FROM_LEVELS` answers at most.
        """
        alpha, beta = (np.full(len(self.entries.cells), PRIOR) for _ in range(2))
        if not self.rules.ordered_levels:
            return alpha, beta
        passes, fails = self.cell_evidence()
        for ladder in self.entries.ladders:
            most = _tightest(passes[ladder], fails[ladder])
            # Turned round, with right and wrong exchanged, the same bound is the one from above.
            least = 1.0 - _tightest(fails[ladder][::-1], passes[ladder][::-1])[::-1]
            crossed = least > most  # the levels seem not to be ordered here: the two bounds contradict each other
            least, most = np.where(crossed, most, least), np.where(crossed, least, most)
            mean = np.clip((least + most) / 2.0, 1e-3, 1.0 - 1e-3)
            variance = np.maximum((most - least) ** 2 / 12.0, FORGOTTEN)
            strength = np.clip(mean * (1.0 - mean) / variance - 1.0, 2 * PRIOR, MOST_FROM_LEVELS)
            alpha[ladder], beta[ladder] = strength * mean, strength * (1.0 - mean)
        return alpha, beta

    def mean(self, ids: Ids) -> Floats:
        alpha, beta = self.posterior(ids)
        return alpha / (alpha + beta)

    def cell_evidence(self) -> tuple[Floats, Floats]:
        """(passes, fails) of all entries of each cell."""
        count = len(self.entries.cells)
        passes, fails = (np.bincount(self.entries.cell, of_entry, count) for of_entry in (self.passes, self.fails))
        return passes.astype(np.float64), fails.astype(np.float64)

    def strength(self) -> Floats:
        """Of each cell: how many answers to a prompt of it those to its other prompts are worth together."""
        cells = len(self.entries.cells)
        if not self.rules.neighbour_strength:
            return np.zeros(cells)
        known = self.passes + self.fails
        (tried,) = np.nonzero(known > FORGOTTEN)
        cell, weight, answers = self.entries.cell[tried], known[tried], self.answers[tried]
        passes, fails = self.cell_evidence()
        mean = passes / np.maximum(passes + fails, FORGOTTEN)
        scatter = np.bincount(cell, weight * (self.passes[tried] / weight - mean[cell]) ** 2, cells)
        # A prompt's rate of n answers has the variance mean·(1 - mean)·(1 + (n - 1)·ρ)/n. What the common mean takes of
        # the scatter is 1 - weight/total of each; old answers weigh less, but there were as many.
        free = weight * (1.0 - weight / (passes + fails)[cell]) / answers
        alike = np.bincount(cell, free, cells)  # of the scatter, where ρ = 0; the number of prompts but one
        correlated = np.bincount(cell, free * (answers - 1.0), cells)  # what ρ = 1 adds
        variance = np.maximum(mean * (1.0 - mean), FORGOTTEN)
        seen = np.clip((scatter / variance - alike) / np.maximum(correlated, FORGOTTEN), 0.0, 1.0)
        first = 1.0 / (self.rules.neighbour_strength + 1.0)
        correlation = (PRIOR_PROMPTS * first + alike * seen) / (PRIOR_PROMPTS + alike)
        return np.minimum(MOST_STRENGTH, 1.0 / np.maximum(correlation, FORGOTTEN) - 1.0)

    def _others(self, ids: Ids) -> tuple[Floats, Floats]:
        """(passes, fails) of the other entries of each one's cell."""
        passes, fails = self.cell_evidence()
        cell = self.entries.cell[ids]
        return (np.maximum(0.0, passes[cell] - self.passes[ids]), np.maximum(0.0, fails[cell] - self.fails[ids]))

    def neighbour_rate(self, ids: Ids) -> Floats:
        """Pass rate of the cell's other entries and of the next easier level; 0 where nothing is known of them."""
        passes, fails = self._others(ids)
        cell_passes, cell_fails = self.cell_evidence()
        easier = self.entries.easier[self.entries.cell[ids]]
        passes = passes + np.where(easier >= 0, cell_passes[easier], 0.0)
        known = passes + fails + np.where(easier >= 0, cell_fails[easier], 0.0)
        return np.where(known > FORGOTTEN, passes / np.maximum(known, FORGOTTEN), 0.0)

    # --- learning ----------------------------------------------------------------------------------------------------

    def learn(self, version: int, observations: Sequence[Observation]) -> list[StateChange]:
        """Time passes up to `version`; then what was seen, in this order. Returns the changes of state, likewise."""
        self._forget(version)
        for seen in observations:
            entry = self.entries.id_of[seen.entry]
            weight = self.rules.decay ** (version - seen.version)
            self.passes[entry] += weight * seen.passes
            self.fails[entry] += weight * (seen.total - seen.passes)
            self.tried[entry] += 1
            self.answers[entry] += seen.total
            self.seen[entry] = max(self.seen[entry], seen.version)
        changes = [self._judge(name, observations) for name in dict.fromkeys(seen.entry for seen in observations)]
        self._watch_neighbours()
        return [change for change in changes if change is not None]

    def _forget(self, version: int) -> None:
        for evidence in (self.passes, self.fails):
            evidence *= self.rules.decay ** (version - self.version)
            evidence[evidence < FORGOTTEN] = 0.0
        self.version = version

    def _judge(self, name: str, observations: Sequence[Observation]) -> StateChange | None:
        """The state of an entry that was just tried; None where it stays what it was."""
        entry, rules = self.entries.id_of[name], self.rules
        before = int(self.state[entry])
        if self.given_up(entry):  # it was on its way when its place was given away
            return None
        passes, fails = float(self.passes[entry]), float(self.fails[entry])
        rate = (PRIOR + passes) / (2 * PRIOR + passes + fails)  # its own answers alone: neighbours retire nobody
        after = ACTIVE
        if rules.retire_above is not None and rate >= rules.retire_above:
            after = RETIRED
        elif rules.park_below is not None and rate <= rules.park_below:
            after = PARKED
        self.state[entry] = after
        self.due[entry] = NEVER if after == ACTIVE else self.version + rules.retest_every
        if after == PARKED:
            self.watched[entry] = self.neighbour_rate(np.array([entry]))[0]
        if after == before:
            return None
        groups = [seen for seen in observations if seen.entry == name]
        right, total = sum(seen.passes for seen in groups), sum(seen.total for seen in groups)
        why = "first tried" if before == NEW else "tried again" if before == ACTIVE else "re-tested"
        reason = f"{why}: {right} of {total} right, pass rate {rate:.2f}"
        return StateChange(name, STATES[before], STATES[after], reason)

    def _watch_neighbours(self) -> None:
        (parked,) = np.nonzero((self.state == PARKED) & (self.due > self.version) & (self.due < NEVER))
        if len(parked):
            risen = self.neighbour_rate(parked) >= self.watched[parked] + self.rules.retest_rise
            self.due[parked[risen]] = self.version

    def due_now(self, ids: Ids) -> Ids:
        """Those of these entries that are due for a re-test, the longest overdue first."""
        due = ids[self.due[ids] <= self.version]
        return due[np.argsort(self.due[due], kind="stable")]

    def set_aside(self, ids: Ids) -> Ids:
        """Those of these entries that are retired, then those that are parked, the longest first; none that is given
        up."""
        ids = ids[(self.state[ids] > ACTIVE) & (self.due[ids] < NEVER)]
        return ids[np.lexsort((self.due[ids], self.state[ids] == PARKED))]

    def give_up(self, ids: Ids) -> None:
        """These entries, which are retired or parked, are never tested again."""
        self.due[ids] = NEVER

    def given_up(self, ids: Ids | int) -> npt.NDArray[np.bool_]:
        """Which of these entries are set aside for good."""
        return (self.state[ids] > ACTIVE) & (self.due[ids] == NEVER)

    def num_alive(self, ids: Ids) -> int:
        """How many of these entries are not given up."""
        return len(ids) - int(self.given_up(ids).sum())

    def num_due(self) -> int:
        """Retired or parked entries that wait for their re-test."""
        return int((self.due <= self.version).sum())

    def counts(self) -> dict[str, int]:
        """Entries in each state."""
        return dict(zip(STATES, np.bincount(self.state, minlength=len(STATES)).tolist(), strict=True))

    # --- to disk and back --------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Of the entries that were tried; the others are as they began."""
        (tried,) = np.nonzero(self.tried)
        rows = zip(*(column[tried].tolist() for column in self._columns()), strict=True)
        return {"version": self.version, "entries": {self.entries.names[i]: list(row) for i, row in zip(tried, rows)}}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.version = state["version"]
        for name, row in state["entries"].items():
            for column, value in zip(self._columns(), row, strict=True):
                column[self.entries.id_of[name]] = value

    def _columns(self) -> list[npt.NDArray[Any]]:
        return [self.passes, self.fails, self.tried, self.answers, self.seen, self.state, self.due, self.watched]


def _tightest(passes: Floats, fails: Floats) -> Floats:
    """Of each level, the least upper bound that a run of levels ending right below it puts on its rate; 1 for the
    easiest."""
    levels = len(passes)
    passes_up_to, fails_up_to = (np.concatenate([[0.0], np.cumsum(of_level)]) for of_level in (passes, fails))
    alpha = PRIOR + passes_up_to[:levels, None] - passes_up_to[None, :levels]  # [level, first level of the run]
    beta = PRIOR + fails_up_to[:levels, None] - fails_up_to[None, :levels]
    is_run = np.tri(levels, k=-1, dtype=bool)
    alpha, beta = np.where(is_run, alpha, PRIOR), np.where(is_run, beta, PRIOR)
    total = alpha + beta
    deviation = np.sqrt(alpha * beta / (total + 1.0)) / total
    return np.minimum(1.0, alpha / total + np.sqrt(3.0) * deviation).min(axis=1)
