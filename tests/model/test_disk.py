"""Errors of the disk name their file, whoever raised them. /dev/full is a disk without space."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model.disk import naming

FULL = Path("/dev/full")


def text() -> None:
    with FULL.open("w") as file:
        file.write("x")


def torchs_own() -> None:
    with FULL.open("wb") as file:
        torch.save({"x": torch.zeros(1000)}, file)


def of_another_file() -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "/run/other")


def from_rust() -> None:
    save_file({"x": torch.zeros(1)}, "/nonexistent/x")


@pytest.mark.parametrize(
    "work, number, file",
    [
        (text, errno.ENOSPC, "/run/steps.jsonl"),
        (torchs_own, errno.ENOSPC, "/run/steps.jsonl"),
        (of_another_file, errno.ENOSPC, "/run/other"),
        (from_rust, errno.ENOENT, "/run/steps.jsonl"),
    ],
)
def test_an_error_without_a_name_gets_one_and_others_keep_theirs(work, number, file) -> None:
    with pytest.raises(OSError) as raised, naming("/run/steps.jsonl"):
        work()
    assert (raised.value.errno, raised.value.filename) == (number, file)


def test_what_is_no_error_of_the_disk_passes_through() -> None:
    with pytest.raises(ValueError, match="^not this$"), naming("/run/steps.jsonl"):
        raise ValueError("not this")
