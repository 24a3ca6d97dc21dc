"""What stage 2 finds in its folder when it goes on after a kill. The stage itself runs in tests/integration."""

from __future__ import annotations

from pathlib import Path

from pipeline.online_rl import _remove_remains


def test_only_what_a_run_goes_on_from_is_kept(tmp_path: Path) -> None:
    for folder in (".resume", "checkpoint"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").touch()
    for file in ("steps.jsonl", "curriculum.jsonl", "observations.jsonl", "rollouts.parquet"):
        (tmp_path / file).touch()
    _remove_remains(tmp_path)
    kept = {".resume", "steps.jsonl", "curriculum.jsonl", "observations.jsonl"}
    assert {path.name for path in tmp_path.iterdir()} == kept
