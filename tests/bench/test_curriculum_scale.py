"""The bench of large pools still builds the curriculum that a recipe builds: on a small one."""

import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "bench" / "curriculum_scale.py"


def test_it_runs_and_prints_a_row_for_each_size():
    command = [sys.executable, str(SOURCE), "--prompts", "3000", "--steps", "3"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [line.split("│")[1].strip() for line in printed.splitlines() if line.startswith("│")]
    assert rows == ["1,000", "3,000"]
