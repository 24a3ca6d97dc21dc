"""The controller in thousands of worlds, and proof that these worlds would notice a fault in it.

`DROVER_SEEDS=100000 pytest tests/rl/test_simulation.py` (make soak) looks further; a failing seed is printed, and
`World(seed).run()` is that run again.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable

import pytest
from simulation import Faults, Violation, World

from rl import controller as protocol
from rl.controller import Controller, GeneratorState, Health

SEEDS = int(os.environ.get("DROVER_SEEDS", "2000"))
HUNT = 5000  # worlds for a planted bug; most are found in the first twenty


@pytest.mark.timeout(0 if "DROVER_SEEDS" in os.environ else 180)
def test_no_world_breaks_it() -> None:
    ends: Counter[str] = Counter()
    injected: Counter[str] = Counter()
    for seed in range(SEEDS):
        world = World(seed).run()
        ends[world.ended] += 1
        injected += world.injected
    print(f"{SEEDS} worlds: {dict(ends)}; injected {dict(injected)}")
    assert ends["finished"] > SEEDS / 2
    assert set(injected) == set(Faults.__dataclass_fields__), "a fault that never happened proves nothing"
    assert (
        set(ends) == {"finished", "WeightsDiffer", "WrongVersion", "LeaseExhausted", "NoGeneratorLeft"} or SEEDS < 2000
    )


def test_the_same_seed_is_the_same_run() -> None:
    for seed in range(20):
        assert World(seed).run().log == World(seed).run().log


# --- planted bugs: each one is a fault that someone could write -----------------------------------------------------


class AdmitsOneTooStale(Controller):
    def _generator_for(self, slot: int) -> int | None:
        return super()._generator_for(max(0, slot - self.bounds.groups_per_step))


class AdmitsByTheLearnersVersion(Controller):
    """Right as long as every engine is up to date."""

    def _generator_for(self, slot: int) -> int | None:
        index = min(range(self.num_generators), key=lambda index: len(self.generators[index].leases))
        serves = self.generators[index].health is Health.HEALTHY and self.in_flight < self.bounds.groups
        return index if serves and self.bounds.admits(slot, self.learner_version) else None


class LeasesToARestartedEngine(Controller):
    def _may_serve(self, generator: GeneratorState) -> bool:
        return generator.alive


class TrustsEverySync(Controller):
    def _prove(self, event: protocol.SyncDone) -> None:
        pass


class TakesLateGroups(Controller):
    def _holder(self, slot: int, attempt: int) -> GeneratorState | None:
        return super()._holder(slot, self.attempts.get(slot, attempt)) or self.generators[0]


class ForgetsTheLeasesOfTheDead(Controller):
    def _on_death(self, index: int, incarnation: int, reason: str) -> list[protocol.Command]:
        self.generators[index].leases.clear()
        return super()._on_death(index, incarnation, reason)


class ForgetsLostGroups(Controller):
    def _lease_again(self, slot: int, reason: str) -> None:
        self.lost[reason] += 1


class TrainsOnWhateverIsReady(Controller):
    def _train(self) -> Iterable[protocol.Command]:
        step, count = self.learner_version, self.bounds.groups_per_step
        if not (self.stepping or self.saving) and step < self.num_steps and len(self.ready) >= count:
            slots = tuple(sorted(self.ready))[:count]
            self.ready.difference_update(slots)
            self.stepping = True
            yield protocol.Train(step, slots)


class TrainsWhileItSaves(Controller):
    def _train(self) -> Iterable[protocol.Command]:
        saving, self.saving = self.saving, False
        yield from super()._train()
        self.saving = saving


class DropsWhatIsBeingRead(Controller):
    def _drops(self) -> Iterable[protocol.Command]:
        for version in sorted(self.digests.keys() - {self.learner_version}):
            del self.digests[version]
            yield protocol.Drop(version)


class BelievesEveryDeath(Controller):
    """A death that is reported twice kills the engine that came after."""

    def _on_death(self, index: int, incarnation: int, reason: str) -> list[protocol.Command]:
        return super()._on_death(index, self.generators[index].incarnation, reason)


class SavesWithoutWhatIsReady(Controller):
    def _state(self) -> protocol.State:
        state = super()._state()
        return protocol.State(state.version, state.next_slot, (), state.lost)


class ForgetsAnOrphanOnResume(Controller):
    def __post_init__(self) -> None:
        super().__post_init__()
        self.waiting = self.waiting[:-1]


class FinishesBeforeTheLastSave(Controller):
    def _finish(self) -> Iterable[protocol.Command]:
        if self.learner_version == self.num_steps:
            self.finished = True
            yield protocol.Finish()


class NeverGivesAnEngineUpAsBeingSynced(Controller):
    def _on_death(self, index: int, incarnation: int, reason: str) -> list[protocol.Command]:
        syncing = self.generators[index].syncing
        commands = super()._on_death(index, incarnation, reason)
        if self.generators[index].health is Health.RESTARTING:
            self.generators[index].syncing = syncing
        return commands


class BelievesEveryVersion(Controller):
    def _on_answered(self, event: protocol.Answered) -> list[protocol.Command]:
        low = self._leased_at.get(event.slot, 0)
        return super()._on_answered(dataclasses.replace(event, oldest=low, newest=low))


class TakesTheAnswerToAnotherSync(Controller):
    """Found by these worlds in the first draft: a refusal that is told twice counted as two."""

    def _on_sync(self, event: protocol.SyncDone | protocol.SyncFailed) -> list[protocol.Command]:
        current, sync = self.generators[event.sync.generator].syncing, event.sync
        same = current and (current.incarnation, current.version) == (sync.incarnation, sync.version)
        answered = protocol.SyncFailed(current, "") if same and isinstance(event, protocol.SyncFailed) else event
        return super()._on_sync(answered)


class AcceptsBeforeTheProof(Controller):
    def _on_answered(self, event: protocol.Answered) -> list[protocol.Command]:
        holder = self._holder(event.slot, event.attempt)
        if holder is None or holder.syncing is None:
            return super()._on_answered(event)
        proved, holder.version = holder.version, holder.syncing.version
        commands = super()._on_answered(event)
        holder.version = proved
        return commands


class TakesAPartForTheGroup(Controller):
    def _on_answered(self, event: protocol.Answered) -> list[protocol.Command]:
        whole = protocol.GroupReady(event.slot, event.attempt, event.oldest, event.newest)
        return super()._on_answered(whole)


class ForgetsWhatIsUnfinished(Controller):
    def _begins_wave(self) -> bool:
        return False


class BeginsAWaveAtOnce(Controller):
    def _begins_wave(self) -> bool:
        return True


BUGS = Controller.__subclasses__()


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_planted_bug_is_found(bug: type[Controller]) -> None:
    for seed in range(HUNT):
        try:
            World(seed, bug).run()
        except (Violation, protocol.ProtocolError, KeyError) as error:
            print(f"{bug.__name__}: seed {seed}, {str(error).splitlines()[0]}")
            return
    pytest.fail(f"{HUNT} worlds did not notice {bug.__name__}")
