"""The asynchronous protocol of stage 2, as a pure state machine: events in, commands out. No clock, no I/O, no torch.

    Begin ───────────┐                        ┌─▶ Lease(slot, generator)   sample and grade one group, or a part of it
    GroupReady/Lost ─┤                        ├─▶ Accept(slot, attempt)    this answer to the lease counts
    PartReady ───────┤                        ├─▶ Train(step, slots)       one optimiser step
    StepDone ────────┤                        ├─▶ Save(version)            make everything up to here durable
    Saved ───────────┼─▶    Controller    ────┼─▶ Sync(generator, version) those weights onto that generator
    SyncDone/Failed ─┤                        ├─▶ Restart(generator)       a new engine in its place
    GeneratorDied ───┤                        ├─▶ Drop(version)            nobody needs its published file any more
    GeneratorUp ─────┤                        └─▶ Finish
    Resync ──────────┘

Slots are numbered 0, 1, 2, … and consumed in that order, B to a step: slot n is trained by step n // B, when the
learner is at version n // B. Every token of a group is at least as new as its generator was when the group was leased,
because a generator's version only grows and one that died takes its leases with it.

**Admission.** A slot is leased to a generator only once

    n // B - version(generator) <= max_staleness,

so no token is ever trained at a higher staleness. Nothing is discarded for age: that removes exactly the long and hard
groups. Three numbers of the user fix everything else (`Bounds`): B groups a step, max_staleness η, and k steps between
syncs. A slot of step s waits for version s - η at most, and the learner waits for the slots of step s at version s; so
at most B·(η + 1) groups are in flight or finished and waiting. The newest synced version is at least v - (k - 1) while
the learner is at v; progress therefore needs η >= k - 1. η = 0 is the synchronous loop.

**Groups in parts.** A lease may end with a part: some answers are there, and the slot needs another lease, for more
answers to its task or for another task where these carry no signal. Which of the two, and what task, is the loop's to
know; here a slot keeps its number, its step and with it its bound: what a part holds was admitted by the lease that
gave it. At most `max_parts` a slot; then it has to be ready, whatever it holds. Without staleness parts come in waves:
the next one begins when nothing is in flight any more, so that which sequences are sampled together depends on what was
sampled, not on which of it ended first.

**A generator's life.** Only `HEALTHY` ones are leased to. Whoever starts, or starts again, is `STALE`: it holds weights
that this run never gave it.

    STALE ──Sync──▶ SyncDone, digest equal ──▶ HEALTHY ──GeneratorDied──▶ RESTARTING ──GeneratorUp──▶ STALE
                                                                              └─ too often ──▶ RETIRED

A group with tokens of weights that are not proved yet waits for the proof.

**What ends each wait.** A lease: GroupReady, PartReady, GroupLost or the death of its generator; lost ones are leased
again, at most `max_attempts` times in a row. The next wave: the last lease in flight. A step: StepDone. A save: Saved.
A sync: SyncDone, SyncFailed (tried again, then a death) or a death. A restart: GeneratorUp or a death; after
`max_restarts` the generator is retired, and without any the run ends. The run: Finish, when the last step is done and
saved and no sync is under way. `rl/loop.py` puts a deadline on every command and turns a missed one into the event that
ends the wait. Each lease, sync and restart carries the group's attempt, the sync's number or the generator's
incarnation: an answer to an older one is counted in `late` and otherwise ignored.
"""

from __future__ import annotations

import enum
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

# --- events -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sync:
    """A command; its two answers quote it."""

    generator: int
    incarnation: int
    version: int
    number: int  # of this generator's syncs: a late answer to one is not taken for the answer to the next


@dataclass(frozen=True, slots=True)
class Begin:
    """The learner is up and has published its weights; every engine is up with weights of nobody's giving."""

    digest: str  # of the learner's version: 0, or the one of the state that is resumed


@dataclass(frozen=True, slots=True)
class GroupReady:
    slot: int
    attempt: int
    oldest: int  # version of its oldest token
    newest: int


@dataclass(frozen=True, slots=True)
class PartReady:
    """Some answers are there, and the slot needs another lease."""

    slot: int
    attempt: int
    oldest: int  # version of the oldest token of this part
    newest: int


@dataclass(frozen=True, slots=True)
class GroupLost:
    slot: int
    attempt: int
    reason: str


@dataclass(frozen=True, slots=True)
class StepDone:
    version: int
    digest: str  # of what the learner published


@dataclass(frozen=True, slots=True)
class Saved:
    version: int


@dataclass(frozen=True, slots=True)
class SyncDone:
    sync: Sync
    digest: str  # read back from the engine


@dataclass(frozen=True, slots=True)
class SyncFailed:
    """Refused as a whole: the generator still holds what it held."""

    sync: Sync
    reason: str


@dataclass(frozen=True, slots=True)
class GeneratorDied:
    """Gone, or silent beyond its deadline. Its leases go with it."""

    generator: int
    incarnation: int
    reason: str


@dataclass(frozen=True, slots=True)
class GeneratorUp:
    """A new engine in the place of a dead one."""

    generator: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class Resync:
    """Health asks for it: nothing is leased or trained until every generator was given the newest weights again."""

    reason: str


Answered = GroupReady | PartReady
Event = Begin | Answered | GroupLost | StepDone | Saved | SyncDone | SyncFailed | GeneratorDied | GeneratorUp | Resync

# --- commands -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Lease:
    slot: int
    attempt: int  # 1 for the first
    generator: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class Accept:
    """Keep the group or part that came with this attempt. One without it was given up meanwhile, and is not to be
    used."""

    slot: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Train:
    step: int  # 0-based; also the learner's version before it
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Save:
    """Make durable: the learner at `version`, this state, and the groups that are ready."""

    version: int
    state: State


@dataclass(frozen=True, slots=True)
class Restart:
    generator: int
    incarnation: int  # of the new engine


@dataclass(frozen=True, slots=True)
class Drop:
    version: int


@dataclass(frozen=True, slots=True)
class Finish:
    pass


Command = Lease | Accept | Train | Save | Sync | Restart | Drop | Finish

# --- how a run ends other than by Finish --------------------------------------------------------------------------


class ProtocolError(RuntimeError):
    """An event that cannot follow from what was commanded: a bug in the loop, or a lie from an actor."""


class LeaseExhausted(RuntimeError):
    """One group was lost too often."""


class NoGeneratorLeft(RuntimeError):
    """Every generator died too often."""


class WeightsDiffer(RuntimeError):
    """A generator read back other weights than the learner published. Its samples would be lies."""


class WrongVersion(RuntimeError):
    """A group claims tokens of a version that its generator cannot have had."""


# --- state --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bounds:
    """What follows from the user's three numbers; the derivation is at the top of this file."""

    groups_per_step: int
    max_staleness: int  # versions
    sync_every: int = 1  # steps

    def __post_init__(self) -> None:
        if self.max_staleness < self.sync_every - 1:
            raise ValueError(
                f"max_staleness {self.max_staleness} with a sync every {self.sync_every} steps would wait for ever; "
                f"set max_staleness to {self.sync_every - 1} or more, or sync_every_steps to {self.max_staleness + 1}"
            )

    @property
    def groups(self) -> int:
        """In flight or finished and waiting, at most."""
        return self.groups_per_step * (self.max_staleness + 1)

    def step_of(self, slot: int) -> int:
        return slot // self.groups_per_step

    def slots_of(self, step: int) -> range:
        return range(step * self.groups_per_step, (step + 1) * self.groups_per_step)

    def admits(self, slot: int, version: int) -> bool:
        """May a generator that serves `version` sample this slot?"""
        return self.step_of(slot) - version <= self.max_staleness


@dataclass(frozen=True, slots=True)
class State:
    """What a run that is resumed must know. Everything else begins anew: engines, leases, syncs."""

    version: int = 0  # the learner's
    next_slot: int = 0  # the lowest never leased
    ready: tuple[int, ...] = ()  # finished, not yet trained on
    lost: tuple[tuple[str, int], ...] = ()  # reason → groups leased again


class Health(enum.Enum):
    STALE = "stale"
    HEALTHY = "healthy"
    RESTARTING = "restarting"
    RETIRED = "retired"


@dataclass
class GeneratorState:
    health: Health = Health.STALE
    incarnation: int = 0
    version: int = -1  # of the weights that it was given and that were proved; -1: none yet
    syncing: Sync | None = None
    num_syncs: int = 0
    must_sync: bool = False  # the newest weights once more, whatever it holds
    failed_syncs: int = 0  # in a row
    leases: set[int] = field(default_factory=set)  # slots
    unproved: list[Answered] = field(default_factory=list)  # with tokens of the version it is just being given

    @property
    def alive(self) -> bool:
        return self.health in (Health.STALE, Health.HEALTHY)


@dataclass
class Controller:
    bounds: Bounds
    num_steps: int
    num_generators: int = 1
    save_every: int = 0  # steps; 0: only after the last
    max_parts: int = 0  # a slot's, before it is ready
    max_attempts: int = 5
    max_restarts: int = 3
    max_failed_syncs: int = 2
    resumed: State = State()

    def __post_init__(self) -> None:
        self.generators = [GeneratorState() for _ in range(self.num_generators)]
        self.learner_version = self.resumed.version
        self.next_slot = self.resumed.next_slot
        self.ready: set[int] = set(self.resumed.ready)
        first = self.bounds.slots_of(self.learner_version).start
        self.waiting = sorted(set(range(first, self.next_slot)) - self.ready)  # to be leased again, before any new one
        self.unfinished: list[int] = []  # slots with a part, that wait for the next wave
        self.attempts: dict[int, int] = {}  # slots not trained yet → leases so far
        self.losses: dict[int, int] = {}  # slots not trained yet → leases lost since its last part
        self.parts: Counter[int] = Counter()  # of slots not trained yet
        self._leased_at: dict[int, int] = {}  # slots not trained yet → version of the generator at the last lease
        self.lost: Counter[str] = Counter(dict(self.resumed.lost))
        self.late: Counter[str] = Counter()  # replies to what was given up meanwhile
        self.digests: dict[int, str] = {}  # version → what the learner published and nobody dropped
        self.begun = self.stepping = self.saving = self.finished = False
        self.saved_version = self.resumed.version
        self.resyncing = ""  # why nothing is leased or trained just now

    @property
    def in_flight(self) -> int:
        return sum(len(generator.leases) for generator in self.generators)

    def handle(self, event: Event) -> list[Command]:
        """Take one event; returns what is to be done now, in this order."""
        self._expect(not self.finished and (self.begun or isinstance(event, Begin)), event)
        match event:
            case Begin(digest):
                self._expect(not self.begun, event)
                self.begun = True
                self.digests[self.learner_version] = digest
                return self._advance()
            case GroupReady() | PartReady():
                return self._on_answered(event)
            case GroupLost(slot, attempt, reason):
                return self._on_lost(slot, attempt, reason)
            case StepDone(version, digest):
                self._expect(self.stepping and version == self.learner_version + 1, event)
                self.stepping = False
                self.learner_version = version
                self.digests[version] = digest
                return self._advance()
            case Saved(version):
                self._expect(self.saving and version == self.learner_version, event)
                self.saving, self.saved_version = False, version
                return self._advance()
            case SyncDone() | SyncFailed():
                return self._on_sync(event)
            case GeneratorDied(index, incarnation, reason):
                return self._on_death(index, incarnation, reason)
            case GeneratorUp(index, incarnation):
                return self._on_up(index, incarnation)
            case Resync(reason):
                self.resyncing = reason
                for generator in self.generators:
                    generator.must_sync = generator.alive
                return self._advance()

    # --- groups ------------------------------------------------------------------------------------------------------

    def _on_answered(self, event: Answered) -> list[Command]:
        holder = self._holder(event.slot, event.attempt)
        if holder is None:
            self.late["group"] += 1
            return []
        newest = holder.version if holder.syncing is None else holder.syncing.version
        if not self._leased_at[event.slot] <= event.oldest <= event.newest <= newest:
            raise WrongVersion(
                f"group {event.slot} has tokens of versions {event.oldest} to {event.newest}; its generator held "
                f"{self._leased_at[event.slot]} when it was leased and {newest} at most since"
            )
        if event.newest > holder.version:
            holder.unproved.append(event)
            return []
        holder.leases.discard(event.slot)
        self.losses.pop(event.slot, None)
        if isinstance(event, GroupReady):
            self.ready.add(event.slot)
        else:
            self.parts[event.slot] += 1
            self._expect(self.parts[event.slot] <= self.max_parts, event)
            self.unfinished.append(event.slot)
        return [Accept(event.slot, event.attempt), *self._advance()]

    def _on_lost(self, slot: int, attempt: int, reason: str) -> list[Command]:
        holder = self._holder(slot, attempt)
        if holder is None:
            self.late["group"] += 1
            return []
        holder.leases.discard(slot)
        self._lease_again(slot, reason)
        return self._advance()

    def _holder(self, slot: int, attempt: int) -> GeneratorState | None:
        """The generator that this attempt at this slot is leased to; None: it was given up."""
        holders = [generator for generator in self.generators if slot in generator.leases]
        return holders[0] if holders and self.attempts[slot] == attempt else None

    def _lease_again(self, slot: int, reason: str) -> None:
        self.lost[reason] += 1
        self.losses[slot] = self.losses.get(slot, 0) + 1
        if self.losses[slot] >= self.max_attempts:
            raise LeaseExhausted(f"group {slot} was lost {self.losses[slot]} times, last: {reason}")
        self.waiting = sorted([*self.waiting, slot])

    # --- generators --------------------------------------------------------------------------------------------------

    def _on_sync(self, event: SyncDone | SyncFailed) -> list[Command]:
        sync = event.sync
        generator = self.generators[sync.generator]
        if generator.syncing != sync:
            self.late["sync"] += 1
            return []
        if isinstance(event, SyncFailed):
            generator.syncing = None
            generator.failed_syncs += 1
            if generator.unproved:
                raise WrongVersion(f"generator {sync.generator} refused version {sync.version} and sampled from it")
            if generator.failed_syncs >= self.max_failed_syncs:
                return self._on_death(sync.generator, sync.incarnation, event.reason)
            return self._advance()
        self._prove(event)
        generator.syncing, generator.must_sync, generator.failed_syncs = None, False, 0
        generator.version, generator.health = sync.version, Health.HEALTHY
        proved, generator.unproved = generator.unproved, []
        return [command for answered in proved for command in self._on_answered(answered)] + self._advance()

    def _prove(self, event: SyncDone) -> None:
        published = self.digests[event.sync.version]
        if event.digest != published:
            raise WeightsDiffer(
                f"generator {event.sync.generator} holds digest {event.digest[:12]} after it was given version "
                f"{event.sync.version}; the learner published {published[:12]}"
            )

    def _on_death(self, index: int, incarnation: int, reason: str) -> list[Command]:
        generator = self.generators[index]
        if incarnation != generator.incarnation or generator.health is Health.RETIRED:
            self.late["death"] += 1
            return []
        orphans, generator.leases, generator.unproved = sorted(generator.leases), set(), []
        generator.syncing, generator.must_sync, generator.failed_syncs, generator.version = None, False, 0, -1
        generator.incarnation += 1
        commands: list[Command] = []
        if generator.incarnation > self.max_restarts:
            generator.health = Health.RETIRED
            if all(other.health is Health.RETIRED for other in self.generators):
                raise NoGeneratorLeft(f"generator {index} died {generator.incarnation} times, last: {reason}")
        else:
            generator.health = Health.RESTARTING
            commands.append(Restart(index, generator.incarnation))
        for slot in orphans:
            self._lease_again(slot, f"generator died: {reason}")
        return commands + self._advance()

    def _on_up(self, index: int, incarnation: int) -> list[Command]:
        generator = self.generators[index]
        if incarnation != generator.incarnation or generator.health is not Health.RESTARTING:
            self.late["restart"] += 1
            return []
        generator.health = Health.STALE
        return self._advance()

    # --- whatever may happen now -------------------------------------------------------------------------------------

    def _advance(self) -> list[Command]:
        if self.resyncing and not any(generator.must_sync for generator in self.generators):
            self.resyncing = ""
        return [*self._save(), *self._syncs(), *self._leases(), *self._train(), *self._drops(), *self._finish()]

    def _save(self) -> Iterable[Command]:
        version = self.learner_version
        due = version == self.num_steps or (self.save_every and version % self.save_every == 0)
        if due and version > self.saved_version and not (self.stepping or self.saving):
            self.saving = True
            yield Save(version, self._state())

    def _state(self) -> State:
        return State(self.learner_version, self.next_slot, tuple(sorted(self.ready)), tuple(sorted(self.lost.items())))

    def _syncs(self) -> Iterable[Command]:
        for index, generator in enumerate(self.generators):
            if generator.alive and generator.syncing is None and self._wants_sync(generator):
                generator.num_syncs += 1
                generator.syncing = Sync(index, generator.incarnation, self.learner_version, generator.num_syncs)
                yield generator.syncing

    def _wants_sync(self, generator: GeneratorState) -> bool:
        """At the last version nothing is left to sample. In between, every `sync_every` steps."""
        if self.learner_version == self.num_steps:
            return False
        if generator.health is Health.STALE or generator.must_sync:
            return True
        due = self.learner_version - self.learner_version % self.bounds.sync_every
        return generator.version < due

    def _leases(self) -> Iterable[Command]:
        if self._begins_wave():
            self.waiting, self.unfinished = sorted(self.waiting + self.unfinished), []
        while not self.resyncing:
            slot = self.waiting[0] if self.waiting else self.next_slot
            index = self._generator_for(slot)
            if index is None or self.bounds.step_of(slot) >= self.num_steps:
                return
            if self.waiting:
                self.waiting.pop(0)
            else:
                self.next_slot += 1
            generator = self.generators[index]
            generator.leases.add(slot)
            self.attempts[slot] = self.attempts.get(slot, 0) + 1
            self._leased_at[slot] = generator.version
            yield Lease(slot, self.attempts[slot], index, generator.incarnation)

    def _begins_wave(self) -> bool:
        return self.bounds.max_staleness > 0 or not self.in_flight

    def _generator_for(self, slot: int) -> int | None:
        """The least busy one that may have it. None takes more than its share: the first one to be synced would
        otherwise take a whole step, and the others would wait."""
        alive = sum(generator.alive for generator in self.generators)
        share = math.ceil(self.bounds.groups / max(1, alive))
        able = [
            (len(generator.leases), index)
            for index, generator in enumerate(self.generators)
            if self._may_serve(generator) and self.bounds.admits(slot, generator.version)
        ]
        busy, index = min(able, default=(share, -1))
        return index if busy < share else None

    def _may_serve(self, generator: GeneratorState) -> bool:
        return generator.health is Health.HEALTHY

    def _train(self) -> Iterable[Command]:
        step = self.learner_version
        slots = self.bounds.slots_of(step)
        busy = self.stepping or self.saving or self.resyncing
        if not busy and step < self.num_steps and self.ready.issuperset(slots):
            self.ready.difference_update(slots)
            for slot in slots:
                for of_slot in (self.attempts, self.losses, self.parts, self._leased_at):
                    of_slot.pop(slot, None)
            self.stepping = True
            yield Train(step, tuple(slots))

    def _drops(self) -> Iterable[Command]:
        """Only the newest is ever given; older ones stay while a generator is still reading them."""
        being_read = {generator.syncing.version for generator in self.generators if generator.syncing}
        for version in sorted(self.digests.keys() - being_read - {self.learner_version}):
            del self.digests[version]
            yield Drop(version)

    def _finish(self) -> Iterable[Command]:
        done = self.learner_version == self.num_steps == self.saved_version
        if done and all(generator.syncing is None for generator in self.generators):
            self.finished = True
            yield Finish()

    def _expect(self, holds: bool, event: Event) -> None:
        if not holds:
            raise ProtocolError(f"{event} does not follow from the state {vars(self)}")
