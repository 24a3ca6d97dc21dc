"""The asynchronous protocol of stage 2, as a pure state machine: events in, commands out. No clock, no I/O, no torch.

    Begin ─┐                         ┌─▶ Lease(slot)          sample and grade one group
    GroupReady(slot) ─┤              ├─▶ Train(step, slots)   one optimiser step
    GroupLost(slot)  ─┼▶ Controller ─┼─▶ Sync(version)        that version onto every generator
    StepDone(version)─┤              └─▶ Finish
    SyncDone(version)─┘

Slots are numbered 0, 1, 2, … and consumed in that order, B to a step, so slot n is trained by step n // B, when the
learner is at version n // B. Every token of the group is at least as new as the generators were when it was leased.
A slot is therefore leased only once

    n // B - generator_version <= max_staleness,

and no token can be trained at a higher staleness. Nothing is ever discarded for age: discarding removes exactly the
long and hard ones. From B and max_staleness follow: at most B·(max_staleness + 1) groups are in flight or waiting, and
max_staleness = 0 is the synchronous loop.

What ends each wait: a lease by GroupReady or GroupLost (then it is leased again, counted, at most `max_attempts`
times); a step by StepDone; a sync by SyncDone; the run by Finish, after the last step's sync.
`rl/loop.py` carries the commands out and puts a deadline on each.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Begin:
    """Engines and learner are up, all at version 0."""


@dataclass(frozen=True, slots=True)
class GroupReady:
    slot: int


@dataclass(frozen=True, slots=True)
class GroupLost:
    slot: int
    reason: str


@dataclass(frozen=True, slots=True)
class StepDone:
    version: int


@dataclass(frozen=True, slots=True)
class SyncDone:
    version: int


Event = Begin | GroupReady | GroupLost | StepDone | SyncDone


@dataclass(frozen=True, slots=True)
class Lease:
    slot: int
    attempt: int  # 1 for the first


@dataclass(frozen=True, slots=True)
class Train:
    step: int  # 0-based; also the learner's version before it
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sync:
    version: int


@dataclass(frozen=True, slots=True)
class Finish:
    pass


Command = Lease | Train | Sync | Finish


class ProtocolError(RuntimeError):
    """An event that cannot follow from what was commanded: a bug in the loop, or a lie from an actor."""


class LeaseExhausted(RuntimeError):
    """One group was lost too often."""


@dataclass
class Controller:
    groups_per_step: int
    max_staleness: int
    num_steps: int
    max_attempts: int = 3

    learner_version: int = 0
    generator_version: int = 0
    next_slot: int = 0
    attempts: dict[int, int] = field(default_factory=dict)  # slots in flight → attempts so far
    ready: set[int] = field(default_factory=set)
    lost: Counter[str] = field(default_factory=Counter)  # reason → groups leased again
    stepping: bool = False
    syncing: bool = False
    begun: bool = False

    @property
    def max_groups_in_flight(self) -> int:
        return self.groups_per_step * (self.max_staleness + 1)

    def handle(self, event: Event) -> list[Command]:
        """Take one event; returns what is to be done now."""
        commands: list[Command] = []
        match event:
            case Begin():
                self._expect(not self.begun, event)
                self.begun = True
            case GroupReady(slot):
                self._expect(slot in self.attempts, event)
                del self.attempts[slot]
                self.ready.add(slot)
            case GroupLost(slot, reason):
                self._expect(slot in self.attempts, event)
                self.lost[reason] += 1
                if self.attempts[slot] >= self.max_attempts:
                    raise LeaseExhausted(f"group {slot} was lost {self.max_attempts} times, last: {reason}")
                self.attempts[slot] += 1
                commands.append(Lease(slot, self.attempts[slot]))
            case StepDone(version):
                self._expect(self.stepping and version == self.learner_version + 1, event)
                self.stepping = False
                self.learner_version = version
            case SyncDone(version):
                self._expect(self.syncing and version > self.generator_version, event)
                self.syncing = False
                self.generator_version = version
        return commands + self._advance()

    def _advance(self) -> list[Command]:
        """Whatever may start now."""
        commands: list[Command] = []
        if not self.syncing and self.generator_version < self.learner_version:
            self.syncing = True
            commands.append(Sync(self.learner_version))
        while self._may_lease(self.next_slot):
            self.attempts[self.next_slot] = 1
            commands.append(Lease(self.next_slot, 1))
            self.next_slot += 1
        step = self.learner_version
        slots = range(step * self.groups_per_step, (step + 1) * self.groups_per_step)
        if not self.stepping and step < self.num_steps and self.ready.issuperset(slots):
            self.ready.difference_update(slots)
            self.stepping = True
            commands.append(Train(step, tuple(slots)))
        if self.generator_version == self.num_steps:
            commands.append(Finish())
        return commands

    def _may_lease(self, slot: int) -> bool:
        step = slot // self.groups_per_step
        return step < self.num_steps and step - self.generator_version <= self.max_staleness

    def _expect(self, holds: bool, event: Event) -> None:
        if not holds:
            raise ProtocolError(f"{event} does not follow from the state {self}")
