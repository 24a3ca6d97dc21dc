"""What stage 2 finds in its folder when it goes on after a kill. The stage itself runs in tests/integration."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.online_rl import _remove_remains, _rows_up_to


def test_only_what_a_run_goes_on_from_is_kept(tmp_path: Path) -> None:
    for folder in (".resume", "checkpoint"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").touch()
    for file in ("steps.jsonl", "curriculum.jsonl", "rollouts.parquet"):
        (tmp_path / file).touch()
    _remove_remains(tmp_path)
    kept = {".resume", "steps.jsonl", "curriculum.jsonl"}
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_rows_after_the_last_state_are_undone_and_a_torn_line_with_them(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)) + '{"step": 4, "lo')
    assert _rows_up_to(path, 2) == [{"step": 1}, {"step": 2}]
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert _rows_up_to(tmp_path / "new.jsonl", 0) == [] and (tmp_path / "new.jsonl").read_text() == ""
