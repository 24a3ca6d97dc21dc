"""A world for the controller: virtual time, a seeded scheduler, and engines, a learner and a network that misbehave.

The world knows the truth — which weights every engine really holds, which tokens really came from them — and checks
every command against it. It hears of nothing but commands and speaks only in events, which it delays, reorders, loses
(a deadline then speaks), repeats and falsifies. `World(seed).run()` is the same run for the same seed, always.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rl import controller as protocol
from rl.controller import Bounds, Controller, State

CORRUPT, UNKNOWN = -2, -1  # weights of a half-applied sync; weights that this run never gave
MAX_EVENTS = 20_000  # of one run: more is a livelock


class Violation(AssertionError):
    """The controller commanded something that must never happen, or did not command what had to."""


@dataclass(frozen=True)
class Faults:
    """Probability of each, per occasion."""

    lost_reply: float = 0.0
    duplicate: float = 0.0
    crash: float = 0.0  # of an engine, while it works on something
    hang: float = 0.0
    half_sync: float = 0.0
    refused_sync: float = 0.0
    wrong_version: float = 0.0
    lost_group: float = 0.0
    failed_restart: float = 0.0
    resync: float = 0.0
    killed: float = 0.0  # the whole run, per step: resumed from what is durable


def random_faults(rng: random.Random) -> Faults:
    """A third of the seeds see almost none, so that the plain path is searched too; the rest a random mixture."""
    if rng.random() < 0.33:
        return Faults(duplicate=0.05, lost_group=0.02)
    chance = {name: rng.choice([0.0, 0.0, 0.02, 0.1]) for name in Faults.__dataclass_fields__}
    chance["half_sync"], chance["wrong_version"] = rng.choice([0.0, 0.0, 0.05]), rng.choice([0.0, 0.0, 0.02])
    chance["killed"] = rng.choice([0.0, 0.1, 0.3])
    return Faults(**chance)


@dataclass
class Engine:
    """What is really there."""

    incarnation: int = 0
    alive: bool = True
    weights: int = UNKNOWN
    label: int = UNKNOWN  # what it believes to hold
    proved: int = UNKNOWN  # newest weights whose digest the controller was told
    syncing: int | None = None  # the version it is reading
    refused: int = 0  # syncs, in a row
    silent: bool = False  # wedged: takes work, never answers


@dataclass
class Group:
    """The answer to one lease: a whole group, or a part of one."""

    slot: int
    tokens: list[int]  # the weights that really produced them, oldest first
    engine: Engine
    newest: int  # what the engine believes to have held at the end
    whole: bool = True
    lied: bool = False  # the engine claims versions that cannot be


@dataclass
class World:
    seed: int
    controller_class: type[Controller] = Controller
    faults: Faults | None = None
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.faults = self.faults or random_faults(self.rng)
        sync_every = self.rng.choice([1, 1, 1, 2, 3])
        self.bounds = Bounds(
            groups_per_step=self.rng.randint(1, 4),
            max_staleness=self.rng.randint(sync_every - 1, sync_every + 2),
            sync_every=sync_every,
        )
        self.settings: dict[str, Any] = {
            "num_steps": self.rng.randint(1, 7),
            "num_generators": self.rng.randint(1, 3),
            "save_every": self.rng.choice([0, 1, 2, 3]),
            "max_parts": self.rng.choice([0, 0, 1, 3]),
            "max_attempts": 8,
            "max_restarts": 6,
        }
        self.now, self.queue, self.order = 0.0, [], 0
        self.injected: Counter[str] = Counter()
        self.trained: list[int] = []
        # State, ready groups, parts of others, len(trained).
        self.durable: tuple[State, dict[int, Group], dict[int, list[Group]], int] = (State(), {}, {}, 0)
        self.life = 0  # of the process: counts the kills
        self.ended = ""
        self._begin()

    # --- a life of the process ---------------------------------------------------------------------------------------

    def _begin(self) -> None:
        state, groups, parts, num_trained = self.durable
        del self.trained[num_trained:]
        self.queue.clear()
        self.controller = self.controller_class(bounds=self.bounds, resumed=state, **self.settings)
        self.engines = [Engine() for _ in range(self.settings["num_generators"])]
        self.groups = dict(groups)  # accepted, not trained on yet
        self.parts = {slot: list(some) for slot, some in parts.items()}  # accepted, of slots not trained on yet
        self.next_wave: set[int] = set()  # slots whose last lease ended with a part, in this wave
        self.this_wave: set[int] = set()  # slots that may be leased again: all was still when the wave began
        self.outstanding: dict[tuple[int, int], tuple[int, int]] = {}  # slot, attempt → engine it was leased to
        self.answers: dict[tuple[int, int], Group] = {}  # slot, attempt → what an engine made
        self.version = state.version  # the learner's
        self.published: set[int] = {self.version}
        self.stepping = self.saving = False
        self._post(protocol.Begin(self._digest(self.version)))

    def _digest(self, weights: int) -> str:
        return f"life {self.life} version {weights}" if weights >= 0 else f"garbage {weights}"

    def _parts_of(self, slot: int) -> int:
        """How many parts it takes before the slot is ready: of the slot alone, as what is planned for it is."""
        return random.Random(f"{self.seed}/{slot}").randint(0, self.settings["max_parts"])

    def run(self) -> World:
        """To its end; raises Violation. `ended` says how: "finished", or the name of the error."""
        for _ in range(MAX_EVENTS):
            if self.ended:
                return self
            if not self.queue:
                raise Violation(f"nobody waits for anything, and the run is not over: {self._told()}")
            self.now, _, happens = heapq.heappop(self.queue)
            happens()
        raise Violation(f"no end after {MAX_EVENTS} events: {self._told()}")

    def _told(self) -> str:
        return "\n".join([f"seed {self.seed}, {self.bounds}, {self.settings}, {self.faults}", *self.log[-40:]])

    def _check(self, holds: bool, what: str) -> None:
        if not holds:
            raise Violation(f"{what}: {self._told()}")

    def _later(self, seconds: float, happens: Callable[[], None]) -> None:
        self.order += 1
        heapq.heappush(self.queue, (self.now + seconds, self.order, happens))

    def _post(self, event: protocol.Event, may_repeat: bool = True) -> None:
        """On its way to the controller, for a while; some arrive twice."""
        self._later(self.rng.expovariate(1.0), lambda: self._deliver(event))
        repeatable = (protocol.GroupReady, protocol.PartReady, protocol.GroupLost, protocol.SyncDone,
                      protocol.SyncFailed, protocol.GeneratorDied, protocol.GeneratorUp)  # fmt: skip
        if may_repeat and isinstance(event, repeatable) and self._strikes("duplicate"):
            self._later(self.rng.expovariate(0.2), lambda: self._deliver(event))

    def _deliver(self, event: protocol.Event) -> None:
        self.log.append(f"{self.now:8.1f} ─▶ {event}")
        self._settle(event)
        self.idle = not self.outstanding
        if isinstance(event, protocol.SyncDone) and event.digest == self._digest(event.sync.version):
            engine = self.engines[event.sync.generator]
            if engine.incarnation == event.sync.incarnation:
                engine.proved = max(engine.proved, event.sync.version)
        try:
            commands = self.controller.handle(event)
            for command in commands:
                self.log.append(f"{self.now:8.1f}      {command}")
                self._carry_out(command)
        except protocol.WeightsDiffer:
            self._end("WeightsDiffer", self.injected["half_sync"])
        except protocol.WrongVersion:
            self._end("WrongVersion", self.injected["wrong_version"])
        except protocol.LeaseExhausted:
            self._end("LeaseExhausted", sum(self.injected.values()) - self.injected["duplicate"])
        except protocol.NoGeneratorLeft:
            self._end("NoGeneratorLeft", sum(self.injected.values()) - self.injected["duplicate"])
        held = self.controller.in_flight + len(self.controller.ready)
        self._check(held <= self.bounds.groups, f"{held} groups in flight or waiting, {self.bounds.groups} allowed")

    def _settle(self, event: protocol.Event) -> None:
        """What the controller is about to hear is in flight no more."""
        if isinstance(event, protocol.GroupReady | protocol.PartReady | protocol.GroupLost):
            self.outstanding.pop((event.slot, event.attempt), None)
        gone = None
        if isinstance(event, protocol.GeneratorDied):
            gone = (event.generator, event.incarnation)
        elif isinstance(event, protocol.SyncFailed):
            if self.engines[event.sync.generator].refused >= self.controller.max_failed_syncs:
                gone = (event.sync.generator, event.sync.incarnation)  # given up, as one that died
        self.outstanding = {lease: holder for lease, holder in self.outstanding.items() if holder != gone}

    def _end(self, how: str, cause: int) -> None:
        self._check(cause > 0, f"the run ended with {how}, though nothing happened to cause it")
        self.ended = how

    def _strikes(self, fault: str) -> bool:
        if self.rng.random() < getattr(self.faults, fault):
            self.injected[fault] += 1
            return True
        return False

    # --- commands, checked against the truth -------------------------------------------------------------------------

    def _carry_out(self, command: protocol.Command) -> None:
        match command:
            case protocol.Lease():
                self._sample(command)
            case protocol.Accept(slot, attempt):
                self._check(slot not in self.groups and slot not in self.trained, f"slot {slot} was accepted twice")
                self._check((slot, attempt) in self.answers, f"slot {slot} was accepted without an answer")
                answer = self.answers.pop((slot, attempt))
                self._check(not answer.lied, f"slot {slot} was accepted with versions that cannot be")
                proved = answer.newest <= answer.engine.proved
                self._check(proved, f"slot {slot} was accepted with tokens of weights that nobody had read back")
                if answer.whole:
                    self.groups[slot] = answer
                else:
                    self.parts.setdefault(slot, []).append(answer)
                    self.next_wave.add(slot)
            case protocol.Train():
                self._train(command)
            case protocol.Save():
                self._save(command)
            case protocol.Sync():
                self._sync(command)
            case protocol.Restart():
                self._restart(command)
            case protocol.Drop(version):
                self._check(version in self.published and version != self.version, f"dropped version {version}")
                reading = any(engine.syncing == version for engine in self.engines)
                self._check(not reading, f"version {version} was dropped while it was being read")
                self.published.discard(version)
            case protocol.Finish():
                total = self.bounds.groups_per_step * self.settings["num_steps"]
                self._check(self.trained == list(range(total)), f"trained on {self.trained}, not on 0 to {total - 1}")
                self._check(self.durable[3] == total, "the last step is not durable")
                self._check(all(engine.syncing is None for engine in self.engines), "a sync is under way")
                self.ended = "finished"

    def _sample(self, lease: protocol.Lease) -> None:
        slot, engine = lease.slot, self.engines[lease.generator]
        self._check(slot not in self.trained and slot not in self.groups, f"slot {slot} was leased after it was done")
        self._check(all(slot != other for other, _ in self.outstanding), f"slot {slot} was leased twice")
        self._check(lease.incarnation == engine.incarnation, f"slot {slot} was leased to an engine that is gone")
        if self.idle or self.bounds.max_staleness:
            self.this_wave, self.next_wave = self.this_wave | self.next_wave, set()
        self._check(slot not in self.next_wave, f"slot {slot} is leased while others of its last wave are in flight")
        self.this_wave.discard(slot)
        self.outstanding[slot, lease.attempt] = (lease.generator, lease.incarnation)
        tokens: list[int] = []
        self._later(self.rng.expovariate(2.0), lambda: self._first_token(lease, engine, tokens))

    def _first_token(self, lease: protocol.Lease, engine: Engine, tokens: list[int]) -> None:
        oldest = engine.label
        if engine.alive and engine.incarnation == lease.incarnation:
            self._check(engine.weights != UNKNOWN, f"slot {lease.slot} is sampled from weights that nobody gave")
            tokens.append(engine.weights)
            self._work(lease.generator, lambda: self._group_done(lease, engine, tokens, oldest), mean=5.0)

    def _group_done(self, lease: protocol.Lease, engine: Engine, tokens: list[int], oldest: int) -> None:
        tokens.append(engine.weights)
        if self._strikes("lost_group"):
            self._post(protocol.GroupLost(lease.slot, lease.attempt, "ungraded"))
            return
        whole = len(self.parts.get(lease.slot, ())) == self._parts_of(lease.slot)
        newest = engine.label
        self.answers[lease.slot, lease.attempt] = Group(lease.slot, tokens, engine, newest, whole)
        if self._strikes("wrong_version"):
            oldest, newest = self.rng.choice([(oldest - 100, newest), (oldest, newest + 100)])
            self.answers[lease.slot, lease.attempt].lied = True
        event = protocol.GroupReady if whole else protocol.PartReady
        self._post(event(lease.slot, lease.attempt, oldest, newest))

    def _work(self, index: int, done: Callable[[], None], mean: float) -> None:
        """An engine at work: it ends, or dies, or falls silent, or its answer is lost on the way."""
        engine = self.engines[index]
        incarnation = engine.incarnation
        if engine.silent or self._strikes("lost_reply"):
            return self._dies(index, after=40.0, reason="no answer within its deadline")
        if self._strikes("hang"):
            engine.silent = True
            return self._dies(index, after=40.0, reason="no answer within its deadline")
        if self._strikes("crash"):
            return self._dies(index, after=self.rng.expovariate(1 / mean), reason="process ended")

        def ends() -> None:
            if engine.alive and engine.incarnation == incarnation and not engine.silent:
                done()

        self._later(self.rng.expovariate(1 / mean), ends)
        return None

    def _dies(self, index: int, after: float, reason: str) -> None:
        engine = self.engines[index]
        incarnation = engine.incarnation

        def gone() -> None:
            if engine.incarnation == incarnation and engine.alive:
                engine.alive, engine.syncing = False, None
                self._post(protocol.GeneratorDied(index, incarnation, reason))

        self._later(after, gone)

    def _sync(self, sync: protocol.Sync) -> None:
        engine, version = self.engines[sync.generator], sync.version
        self._check(sync.incarnation == engine.incarnation, "a sync for an engine that is gone")
        self._check(version in self.published, f"version {version} is not there to be given")
        self._check(engine.syncing is None, "two syncs of one engine at a time")
        if not engine.alive:  # it died, and the news is on its way
            return
        engine.syncing = version

        def applied() -> None:
            engine.syncing = None
            if self._strikes("refused_sync"):
                engine.refused += 1
                return self._post(protocol.SyncFailed(sync, "refused"))
            engine.refused = 0
            engine.label = version
            engine.weights = CORRUPT if self._strikes("half_sync") else version
            digest = self._digest(engine.weights)
            return self._post(protocol.SyncDone(sync, digest))

        self._work(sync.generator, applied, mean=1.0)

    def _restart(self, restart: protocol.Restart) -> None:
        engine = self.engines[restart.generator]
        engine.alive = engine.alive and engine.refused < self.controller.max_failed_syncs
        self._check(not engine.alive, f"engine {restart.generator} was restarted while nothing was wrong with it")
        self.engines[restart.generator] = Engine(incarnation=restart.incarnation)
        if self._strikes("failed_restart"):
            self._dies(restart.generator, after=20.0, reason="did not start")
        else:
            self._later(self.rng.expovariate(0.1), lambda: self._up(restart))

    def _up(self, restart: protocol.Restart) -> None:
        if self.engines[restart.generator].incarnation == restart.incarnation:
            self._post(protocol.GeneratorUp(restart.generator, restart.incarnation))

    def _train(self, train: protocol.Train) -> None:
        self._check(not self.stepping and not self.saving, "two things at a time for the learner")
        self._check(train.step == self.version, f"step {train.step} at version {self.version}")
        wanted = tuple(self.bounds.slots_of(train.step))
        self._check(train.slots == wanted, f"step {train.step} trains on {train.slots}, not on {wanted}")
        for slot in train.slots:
            self._check(slot in self.groups, f"step {train.step} trains on slot {slot}, which is not there")
            parts = self.parts.pop(slot, [])
            self._check(len(parts) == self._parts_of(slot), f"slot {slot} is trained on with {len(parts)} parts")
            for group in (*parts, self.groups.pop(slot)):
                self._check_tokens(group, train.step)
        self.trained += train.slots
        self.stepping = True
        self._later(self.rng.expovariate(0.3), self._stepped)

    def _check_tokens(self, group: Group, step: int) -> None:
        for token in group.tokens:
            self._check(token >= 0, f"slot {group.slot} was sampled from {self._digest(token)}")
            staleness = step - token
            self._check(0 <= staleness <= self.bounds.max_staleness, f"slot {group.slot} has staleness {staleness}")

    def _stepped(self) -> None:
        self.stepping = False
        self.version += 1
        self.published.add(self.version)
        self._post(protocol.StepDone(self.version, self._digest(self.version)))
        if self._strikes("resync"):
            self._post(protocol.Resync("mismatch"))
        if self._strikes("killed"):
            self._later(self.rng.expovariate(0.2), self._killed)

    def _save(self, save: protocol.Save) -> None:
        self._check(not self.stepping and not self.saving, "the learner is busy")
        self._check(save.version == save.state.version == self.version, f"saved {save.version} at {self.version}")
        ready, there = set(save.state.ready), set(self.groups)
        self._check(ready == there, f"groups {ready} are saved as ready, {there} are")
        kept = {slot: self.groups[slot] for slot in save.state.ready}
        parts = {slot: list(some) for slot, some in self.parts.items()}
        self.saving = True

        def durable() -> None:
            self.saving = False
            self.durable = (save.state, kept, parts, len(self.trained))
            self._post(protocol.Saved(save.version))

        self._later(self.rng.expovariate(1.0), durable)

    def _killed(self) -> None:
        self.log.append(f"{self.now:8.1f} ─── killed; resumed at version {self.durable[0].version}")
        self.life += 1
        self._begin()
