from test_run_state import a_group

from rl.replay import Replayable, oldest_version, to_replay


def test_what_is_replayed_is_recent_and_within_the_staleness_budget() -> None:
    group = a_group(0)  # tokens of versions 0 and 1
    assert oldest_version(group) == 0
    known = [Replayable(step=step, group=group) for step in (0, 1)]

    def steps(at: int, for_steps: int, max_staleness: int) -> list[int]:
        return [one.step for one in to_replay(known, at, for_steps=for_steps, max_staleness=max_staleness)]

    assert steps(at=2, for_steps=2, max_staleness=2) == [0, 1]
    assert steps(at=2, for_steps=1, max_staleness=2) == [1]
    assert steps(at=3, for_steps=9, max_staleness=2) == []
    assert steps(at=3, for_steps=9, max_staleness=3) == [0, 1]
