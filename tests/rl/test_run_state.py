"""States on disk: read back exactly, and never half of one."""

from pathlib import Path

import pytest
from curricula import curriculum
from disk_faults import Disk, Operation, supervise

from rewards.task import Task
from rl.controller import State
from rl.gates import Choice
from rl.places import Place
from rl.replay import Replayable
from rl.run_state import LEARNER, RunState, RunStates
from rl.types import Rollout, RolloutGroup, SampledAnswer


def a_group(slot: int) -> RolloutGroup:
    task = Task(task_id=f"t{slot}", domain="maths", level=2, prompt="1+1", verifier="number", check={"answer": "2"})
    answer = SampledAnswer(token_ids=[4, 5], logprobs=[-0.1, -1 / 3], versions=[0, 1], finish_reason="stop")
    rollout = Rollout(task=task, group_id=str(slot), answer=answer, text="two", score=None, reason="sandbox died")
    return RolloutGroup(group_id=str(slot), task=task, prompt_ids=[1, 2], rollouts=[rollout], leased_at_version=1)


def a_state(version: int) -> RunState:
    """Slot 5 is ready, at its second task; slot 6 has a part."""
    first, second = (Choice(entry=name, size=4, known=1 / 3, expected=0.1) for name in ("a", "b"))
    ready = Place(choices=[first, second], turn=1, discarded=[a_group(5)], group=a_group(5))
    begun = Place(choices=[first, second], rollouts=a_group(6).rollouts, leased_at=1)
    return RunState(
        protocol=State(version=version, next_slot=7, ready=(5,), lost=(("ungraded", 2),)),
        curriculum=curriculum().state(), places={5: ready, 6: begun},
        replayable=[Replayable(step=11, group=a_group(3))], generated_tokens=10, trained_tokens=4,
    )  # fmt: skip


def publish(states: RunStates, version: int) -> None:
    partial = states.open(version)
    (partial / LEARNER).write_bytes(b"weights %d" % version)
    states.publish(partial, a_state(version))


def test_a_state_is_read_back_exactly_and_replaces_the_one_before(tmp_path):
    states = RunStates(tmp_path / "state")
    assert states.newest() is None
    for version in (2, 12):
        publish(states, version)
        state, folder = RunStates(tmp_path / "state").newest()
        assert state == a_state(version) and (folder / LEARNER).read_bytes() == b"weights %d" % version
    assert [path.name for path in states.folder.iterdir()] == ["000012"]


@pytest.mark.parametrize("replacing", [False, True])
def test_a_kill_or_a_power_cut_at_any_operation_leaves_the_old_state_or_the_new_one(
    tmp_path: Path, replacing: bool
) -> None:
    states = RunStates(tmp_path / "state")
    if replacing:
        publish(states, 1)
    left = []

    def before(operation: Operation, disk: Disk) -> None:
        for power_cut in (False, True):
            left.append(tmp_path / f"{operation.number} {power_cut}")
            disk.copy(left[-1], power_cut=power_cut)

    code, operations = supervise(lambda: publish(states, 2) or 0, states.folder, before=before)
    assert code == 0 and len(operations) > 10
    found = []
    for folder in left:
        there = RunStates(folder)
        newest = there.newest()
        if newest is not None:
            state, place = newest
            found.append(state.protocol.version)
            assert state == a_state(found[-1]) and (place / LEARNER).read_bytes() == b"weights %d" % found[-1]
        assert newest is not None or not replacing
        publish(there, 3)
        assert there.newest()[0] == a_state(3) and len(list(folder.iterdir())) == 1
    assert set(found) == ({1, 2} if replacing else {2})
