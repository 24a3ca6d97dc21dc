"""The protocol, played by hand. What no hand can play is in test_simulation.py."""

import pytest

from rl.controller import (
    Accept,
    Begin,
    Bounds,
    Controller,
    Drop,
    Finish,
    GeneratorDied,
    GeneratorUp,
    GroupLost,
    GroupReady,
    Lease,
    LeaseExhausted,
    NoGeneratorLeft,
    PartReady,
    ProtocolError,
    Restart,
    Resync,
    Save,
    Saved,
    State,
    StepDone,
    Sync,
    SyncDone,
    SyncFailed,
    Train,
    WeightsDiffer,
    WrongVersion,
)


def begun(groups=1, staleness=0, steps=2, **settings):
    """A controller whose generators all hold version 0, and the leases that it began with."""
    controller = Controller(Bounds(groups, staleness), steps, **settings)
    syncs = controller.handle(Begin("d0"))
    assert syncs == [Sync(index, 0, 0, 1) for index in range(controller.num_generators)]
    return controller, [command for sync in syncs for command in controller.handle(SyncDone(sync, "d0"))]


def ready(slot, version, attempt=1):
    return GroupReady(slot, attempt, version, version)


def test_synchronous_run_leases_a_step_only_after_the_sync_before_it():
    controller, leases = begun(groups=2)
    assert leases == [Lease(0, 1, 0, 0), Lease(1, 1, 0, 0)]
    assert controller.handle(ready(1, 0)) == [Accept(1, 1)]
    assert controller.handle(ready(0, 0)) == [Accept(0, 1), Train(0, (0, 1))]
    sync = Sync(0, 0, 1, 2)
    assert controller.handle(StepDone(1, "d1")) == [sync, Drop(0)]
    assert controller.handle(SyncDone(sync, "d1")) == [Lease(2, 1, 0, 0), Lease(3, 1, 0, 0)]
    controller.handle(ready(2, 1))
    assert controller.handle(ready(3, 1))[-1] == Train(1, (2, 3))
    end = State(version=2, next_slot=4)
    assert controller.handle(StepDone(2, "d2")) == [Save(2, end), Drop(1)]  # nobody needs the last version
    assert controller.handle(Saved(2)) == [Finish()]


def test_generation_goes_on_while_the_learner_steps():
    controller, leases = begun(staleness=1, steps=3)
    assert leases == [Lease(0, 1, 0, 0), Lease(1, 1, 0, 0)]
    assert controller.handle(ready(0, 0))[-1] == Train(0, (0,))
    assert controller.handle(ready(1, 0)) == [Accept(1, 1)]  # waits for the learner, not for the sync
    assert controller.handle(StepDone(1, "d1")) == [Sync(0, 0, 1, 2), Train(1, (1,)), Drop(0)]
    assert controller.handle(SyncDone(Sync(0, 0, 1, 2), "d1")) == [Lease(2, 1, 0, 0)]


@pytest.mark.parametrize("groups, staleness", [(1, 0), (4, 0), (3, 2), (16, 5)])
def test_buffer_and_staleness_are_exactly_what_the_bounds_say(groups, staleness):
    """Groups are leased until the bound stops them: as many as it allows, and with them the oldest there can be."""
    controller, leases = begun(groups, staleness, steps=99)
    assert len(leases) == controller.bounds.groups == groups * (staleness + 1)
    assert controller.bounds.step_of(leases[-1].slot) - 0 == staleness


def test_without_a_sync_every_step_generators_keep_their_version():
    with pytest.raises(ValueError, match="max_staleness 1 with a sync every 3 steps would wait for ever"):
        Bounds(1, 1, sync_every=3)
    controller = Controller(Bounds(1, 1, sync_every=2), num_steps=4)
    (sync,) = controller.handle(Begin("d0"))
    assert controller.handle(SyncDone(sync, "d0")) == [Lease(0, 1, 0, 0), Lease(1, 1, 0, 0)]
    controller.handle(ready(0, 0))
    controller.handle(ready(1, 0))
    assert controller.handle(StepDone(1, "d1")) == [Train(1, (1,)), Drop(0)]
    assert controller.handle(StepDone(2, "d2")) == [Sync(0, 0, 2, 2), Drop(1)]


def test_two_generators_share_and_each_has_its_own_version():
    controller, leases = begun(groups=2, staleness=1, steps=9, num_generators=2)
    assert [(lease.slot, lease.generator) for lease in leases] == [(0, 0), (1, 0), (2, 1), (3, 1)]
    controller.handle(ready(0, 0))
    assert controller.handle(ready(1, 0))[-1] == Train(0, (0, 1))
    assert controller.handle(StepDone(1, "d1")) == [Sync(0, 0, 1, 2), Sync(1, 0, 1, 2), Drop(0)]
    # The second one is still at version 0, too old for step 2; the first takes no more than its share.
    assert controller.handle(SyncDone(Sync(0, 0, 1, 2), "d1")) == [Lease(4, 1, 0, 0), Lease(5, 1, 0, 0)]


def test_a_lost_group_is_leased_again_and_counted_then_given_up():
    controller, _ = begun(max_attempts=2)
    assert controller.handle(GroupLost(0, 1, "ungraded")) == [Lease(0, 2, 0, 0)]
    assert controller.lost == {"ungraded": 1}
    assert controller.handle(ready(0, 0, attempt=1)) == [] and controller.late == {"group": 1}
    with pytest.raises(LeaseExhausted, match="ungraded"):
        controller.handle(GroupLost(0, 2, "ungraded"))


def part(slot, version, attempt=1):
    return PartReady(slot, attempt, version, version)


def test_a_slot_with_a_part_is_leased_again_before_any_new_one():
    controller, leases = begun(groups=2, staleness=1, max_parts=2)
    assert [lease.slot for lease in leases] == [0, 1, 2, 3]
    assert controller.handle(part(1, 0)) == [Accept(1, 1), Lease(1, 2, 0, 0)]
    assert controller.handle(part(1, 0, attempt=2)) == [Accept(1, 2), Lease(1, 3, 0, 0)]
    controller.handle(ready(0, 0))
    assert controller.handle(ready(1, 0, attempt=3)) == [Accept(1, 3), Train(0, (0, 1))]


def test_without_staleness_the_next_parts_begin_together_when_nothing_is_in_flight():
    controller, _ = begun(groups=3, max_parts=1)
    assert controller.handle(part(2, 0)) == [Accept(2, 1)]
    assert controller.handle(ready(1, 0)) == [Accept(1, 1)]
    assert controller.handle(part(0, 0)) == [Accept(0, 1), Lease(0, 2, 0, 0), Lease(2, 2, 0, 0)]
    assert controller.handle(ready(2, 0, attempt=2)) == [Accept(2, 2)]
    assert controller.handle(ready(0, 0, attempt=2)) == [Accept(0, 2), Train(0, (0, 1, 2))]


def test_a_lost_lease_does_not_wait_for_the_wave_and_a_part_begins_its_count_anew():
    controller, _ = begun(groups=2, max_parts=1, max_attempts=2)
    assert controller.handle(GroupLost(0, 1, "ungraded")) == [Lease(0, 2, 0, 0)]
    assert controller.handle(part(0, 0, attempt=2)) == [Accept(0, 2)]
    assert controller.handle(ready(1, 0)) == [Accept(1, 1), Lease(0, 3, 0, 0)]
    assert controller.handle(GroupLost(0, 3, "ungraded")) == [Lease(0, 4, 0, 0)]
    with pytest.raises(LeaseExhausted, match="group 0 was lost 2 times"):
        controller.handle(GroupLost(0, 4, "ungraded"))


def test_parts_have_an_end():
    controller, _ = begun(max_parts=1)
    controller.handle(part(0, 0))
    with pytest.raises(ProtocolError):
        controller.handle(part(0, 0, attempt=2))


def test_a_part_waits_for_the_proof_of_its_weights_too():
    controller, _ = begun(groups=1, staleness=1, steps=9, max_parts=1)
    controller.handle(ready(0, 0))
    (sync, *_) = controller.handle(StepDone(1, "d1"))
    assert controller.handle(PartReady(1, 1, 0, 1)) == []
    assert controller.handle(SyncDone(sync, "d1"))[:2] == [Accept(1, 1), Lease(1, 2, 0, 0)]


def test_parts_are_no_part_of_the_state_that_a_run_resumes_from():
    """What was accepted of them is the loop's to keep; here the slot is only leased again."""
    controller, _ = begun(groups=1, staleness=1, steps=9, save_every=1, max_parts=3)
    controller.handle(part(1, 0))
    controller.handle(ready(0, 0))
    assert controller.handle(StepDone(1, "d1"))[0] == Save(1, State(1, 2, ()))
    controller, leases = begun_at(State(1, 2, ()), groups=1, staleness=1, steps=9)
    assert [lease.slot for lease in leases] == [1, 2]


def test_a_dead_generator_loses_its_leases_and_comes_back_only_with_weights_that_it_was_given():
    controller, _ = begun(groups=2, steps=1, max_restarts=1)
    controller.handle(ready(0, 0))
    assert controller.handle(GeneratorDied(0, 0, "killed")) == [Restart(0, 1)]
    assert controller.lost == {"generator died: killed": 1}
    assert controller.handle(GeneratorDied(0, 0, "killed")) == []  # news of the same death
    assert controller.handle(ready(1, 0)) == []  # too late
    assert controller.handle(GeneratorUp(0, 1)) == [Sync(0, 1, 0, 2)]  # stale until then
    assert controller.handle(SyncDone(Sync(0, 1, 0, 2), "d0")) == [Lease(1, 2, 0, 1)]
    assert controller.handle(ready(1, 0, attempt=2)) == [Accept(1, 2), Train(0, (0, 1))]
    with pytest.raises(NoGeneratorLeft, match="died 2 times, last: again"):
        controller.handle(GeneratorDied(0, 1, "again"))


def test_a_retired_generator_leaves_its_share_to_the_others():
    controller, _ = begun(groups=2, num_generators=2, max_restarts=0)
    assert controller.handle(GeneratorDied(1, 0, "killed")) == [Lease(1, 2, 0, 0)]


def test_weights_are_proved_before_anything_made_of_them_counts():
    controller, _ = begun(groups=1, staleness=1, steps=9)
    controller.handle(ready(0, 0))
    (sync, *_) = controller.handle(StepDone(1, "d1"))
    assert controller.handle(GroupReady(1, 1, 0, 1)) == []  # its last tokens are of weights that nobody has proved
    assert controller.handle(SyncDone(sync, "d1"))[0] == Accept(1, 1)
    (sync, *_) = controller.handle(StepDone(2, "d2"))
    with pytest.raises(WeightsDiffer, match="holds digest other after it was given version 2"):
        controller.handle(SyncDone(sync, "other"))


def test_a_refused_sync_is_tried_again_and_then_the_generator_replaced():
    controller, _ = begun(groups=1, staleness=1, steps=9)
    controller.handle(ready(0, 0))
    (first, *_) = controller.handle(StepDone(1, "d1"))
    (second,) = controller.handle(SyncFailed(first, "no memory"))
    assert second == Sync(0, 0, 1, 3)
    assert controller.handle(SyncFailed(first, "no memory")) == []  # the same news twice
    assert controller.handle(SyncFailed(second, "no memory")) == [Restart(0, 1)]


@pytest.mark.parametrize("oldest, newest", [(-1, 0), (0, 1), (1, 1)])
def test_a_version_that_cannot_be_stops_the_run(oldest, newest):
    controller, _ = begun()
    with pytest.raises(WrongVersion, match="group 0 has tokens of versions"):
        controller.handle(GroupReady(0, 1, oldest, newest))


def test_a_resync_holds_leases_and_steps_until_every_generator_has_the_weights_again():
    controller, _ = begun(groups=1, staleness=1, steps=9)
    (sync,) = controller.handle(Resync("mismatch"))
    assert controller.handle(ready(0, 0)) == [Accept(0, 1)]  # would be a step
    assert controller.handle(SyncDone(sync, "d0")) == [Train(0, (0,))]


def test_a_resumed_run_keeps_what_was_finished_and_leases_the_rest_again():
    state = State(version=3, next_slot=9, ready=(7,), lost=(("ungraded", 2),))
    controller, leases = begun_at(state, groups=2, staleness=1, steps=9)
    assert [lease.slot for lease in leases] == [6, 8, 9]  # 7 is there, 9 was never leased
    assert controller.lost == {"ungraded": 2}
    assert controller.handle(ready(6, 3)) == [Accept(6, 1), Train(3, (6, 7))]


def begun_at(state, groups, staleness, steps):
    controller = Controller(Bounds(groups, staleness), steps, resumed=state)
    (sync,) = controller.handle(Begin("d"))
    assert sync == Sync(0, 0, state.version, 1)
    return controller, controller.handle(SyncDone(sync, "d"))


def test_a_save_is_taken_between_two_steps():
    controller, _ = begun(groups=1, staleness=1, steps=9, save_every=1)
    controller.handle(ready(0, 0))
    controller.handle(ready(1, 0))
    commands = controller.handle(StepDone(1, "d1"))
    assert commands == [Save(1, State(1, 2, (1,))), Sync(0, 0, 1, 2), Drop(0)]  # and no step
    assert controller.handle(Saved(1)) == [Train(1, (1,))]


def test_an_event_that_cannot_follow_is_refused():
    controller = Controller(Bounds(1, 0), 1)
    with pytest.raises(ProtocolError):
        controller.handle(ready(0, 0))
    controller.handle(Begin("d0"))
    for event in (StepDone(1, "d1"), Saved(0), Begin("d0")):
        with pytest.raises(ProtocolError):
            controller.handle(event)
