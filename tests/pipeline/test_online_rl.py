"""What stage 2 finds in its folder when it goes on after a kill, and what it tells its learners. The stage itself runs
in tests/integration."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline.config import OnlineRlStage
from pipeline.online_rl import _remove_remains, learner_settings


def test_only_what_a_run_goes_on_from_is_kept(tmp_path: Path) -> None:
    for folder in (".resume", "checkpoint"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").touch()
    for file in ("steps.jsonl", "curriculum.jsonl", "observations.jsonl", "rollouts.parquet"):
        (tmp_path / file).touch()
    _remove_remains(tmp_path)
    kept = {".resume", "steps.jsonl", "curriculum.jsonl", "observations.jsonl"}
    assert {path.name for path in tmp_path.iterdir()} == kept


@pytest.mark.parametrize("on", [False, True])
def test_every_learner_is_told_whether_to_recompute_activations(tmp_path: Path, on: bool) -> None:
    stage = OnlineRlStage(name="climb", kind="online_rl", policy="x", tasks={}, activation_checkpointing=on)
    settings = learner_settings(stage, tmp_path, 0, tmp_path, world_size=2)
    assert [one.activation_checkpointing for one in settings] == [on, on]


def test_every_learner_is_told_its_rank_and_over_how_many_experts_are_spread(tmp_path: Path) -> None:
    stage = OnlineRlStage(name="climb", kind="online_rl", policy="base", tasks={})
    settings = learner_settings(stage, tmp_path, 0, tmp_path, world_size=4, expert_parallel=2)
    assert [(one.rank, one.world_size, one.expert_parallel) for one in settings] == [(n, 4, 2) for n in range(4)]
    assert learner_settings(stage, tmp_path, 0, tmp_path, world_size=1)[0].expert_parallel == 1


def test_every_learner_is_told_which_optimiser_and_at_which_rates(tmp_path: Path) -> None:
    asked = {"optimizer": "muon", "rate_scales": {"head": 8, "matrices": 0.5}}
    stage = OnlineRlStage(name="climb", kind="online_rl", policy="base", tasks={}, **asked)
    (settings,) = learner_settings(stage, tmp_path, 0, tmp_path, world_size=1)
    assert (settings.optimizer, settings.rate_scales) == ("muon", {"head": 8.0, "matrices": 0.5})
    with pytest.raises(ValidationError, match=r"rate_scales\.heads"):
        OnlineRlStage(name="climb", kind="online_rl", policy="base", tasks={}, rate_scales={"heads": 8})
