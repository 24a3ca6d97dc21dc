"""The protocol, played by hand and at random."""

import random

import pytest

from rl.controller import (
    Begin,
    Controller,
    Finish,
    GroupLost,
    GroupReady,
    Lease,
    LeaseExhausted,
    ProtocolError,
    StepDone,
    Sync,
    SyncDone,
    Train,
)  # fmt: skip


def test_synchronous_run_leases_a_step_only_after_the_sync_before_it():
    controller = Controller(groups_per_step=2, max_staleness=0, num_steps=2)
    assert controller.handle(Begin()) == [Lease(0, 1), Lease(1, 1)]
    assert controller.handle(GroupReady(1)) == []
    assert controller.handle(GroupReady(0)) == [Train(0, (0, 1))]
    assert controller.handle(StepDone(1)) == [Sync(1)]
    assert controller.handle(SyncDone(1)) == [Lease(2, 1), Lease(3, 1)]
    controller.handle(GroupReady(2))
    assert controller.handle(GroupReady(3)) == [Train(1, (2, 3))]
    assert controller.handle(StepDone(2)) == [Sync(2)]
    assert controller.handle(SyncDone(2)) == [Finish()]


def test_generation_goes_on_while_the_learner_steps():
    controller = Controller(groups_per_step=1, max_staleness=1, num_steps=3)
    assert controller.handle(Begin()) == [Lease(0, 1), Lease(1, 1)]
    assert controller.handle(GroupReady(0)) == [Train(0, (0,))]
    assert controller.handle(GroupReady(1)) == []  # waits for the learner, not for the sync
    assert controller.handle(StepDone(1)) == [Sync(1), Train(1, (1,))]
    assert controller.handle(SyncDone(1)) == [Lease(2, 1)]


def test_a_lost_group_is_leased_again_and_counted_then_given_up():
    controller = Controller(groups_per_step=1, max_staleness=0, num_steps=1, max_attempts=2)
    controller.handle(Begin())
    assert controller.handle(GroupLost(0, "engine died")) == [Lease(0, 2)]
    assert controller.lost == {"engine died": 1}
    with pytest.raises(LeaseExhausted, match="engine died"):
        controller.handle(GroupLost(0, "engine died"))


def test_an_event_that_cannot_follow_is_refused():
    controller = Controller(groups_per_step=1, max_staleness=0, num_steps=1)
    controller.handle(Begin())
    for event in (GroupReady(7), StepDone(1), SyncDone(1), Begin()):
        with pytest.raises(ProtocolError):
            controller.handle(event)


@pytest.mark.parametrize("max_staleness", [0, 1, 2, 5])
def test_any_order_of_events_keeps_the_bound_and_consumes_every_slot_once(max_staleness):
    for seed in range(50):
        rng = random.Random(seed)
        groups, steps = rng.randint(1, 4), rng.randint(1, 6)
        controller = Controller(groups_per_step=groups, max_staleness=max_staleness, num_steps=steps, max_attempts=99)
        pending: list = [Begin()]
        leased_at, consumed, finished = {}, [], False
        while pending:
            event = pending.pop(rng.randrange(len(pending)))
            for command in controller.handle(event):
                match command:
                    case Lease(slot, _):
                        leased_at[slot] = controller.generator_version
                        pending.append(GroupLost(slot, "bad luck") if rng.random() < 0.2 else GroupReady(slot))
                    case Train(step, slots):
                        assert all(step - leased_at[slot] <= max_staleness for slot in slots)
                        consumed += slots
                        pending.append(StepDone(step + 1))
                    case Sync(version):
                        pending.append(SyncDone(version))
                    case Finish():
                        finished = True
            assert len(controller.attempts) + len(controller.ready) <= controller.max_groups_in_flight
        assert finished and consumed == list(range(groups * steps))
