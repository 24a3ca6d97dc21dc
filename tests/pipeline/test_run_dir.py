"""The run directory: what is published is whole, whatever fails while it is written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from disk_faults import Disk, Operation, supervise

from pipeline.errors import InfrastructureError
from pipeline.run_dir import COMPLETE, MANIFEST, Manifest, RunDir
from pipeline.stage import SCRATCH

FILES = {"weights.bin": b"w" * 4096, "checkpoint/config.json": b"{}", "checkpoint/deep/tokens.txt": b"abc"}
OPERATIONS = [(os, "rename"), (os, "fsync"), (os, "write"), (os, "open"), (shutil, "rmtree")]


def publish(run_dir: RunDir, mark: str) -> Manifest:
    work = run_dir.open_partial("warm")
    for path, content in FILES.items():
        (work / path).parent.mkdir(parents=True, exist_ok=True)
        (work / path).write_bytes(content + mark.encode())
    return run_dir.publish("warm", {"stage": "warm", "identity": mark})


@contextmanager
def failing_at(nth: int, fail: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The nth file-system operation fails; gives the operations seen."""
    seen: list[str] = []
    with monkeypatch.context() as patch:
        for module, name in OPERATIONS:
            real = getattr(module, name)

            def operation(*args: Any, _real: Any = real, _name: str = name, **kwargs: Any) -> Any:
                seen.append(_name)
                return fail(_real, _name, *args, **kwargs) if len(seen) == nth else _real(*args, **kwargs)

            patch.setattr(module, name, operation)
        yield seen


def torn_write(real: Any, name: str, *args: Any, **_: Any) -> None:
    """Half of the bytes reach the file, then the disk is full. A removal stops half way."""
    if name == "write":
        real(args[0], args[1][: len(args[1]) // 2])
    if name == "rmtree":
        next(path for path in Path(args[0]).rglob("*") if path.is_file()).unlink()
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_published_stage_is_read_back_with_digests_of_every_output(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    publish(run_dir, "one")
    manifest = run_dir.read_complete("warm", verify=True)
    assert manifest is not None and manifest["identity"] == "one"
    assert set(manifest["outputs"]) == set(FILES)
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("*.old-*"))


@pytest.mark.parametrize("replacing", [False, True])
def test_no_failed_operation_leaves_something_half_written_that_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replacing: bool
) -> None:
    nth, seen_whole = 0, False
    while not seen_whole:
        nth += 1
        run_dir = RunDir(tmp_path / str(nth))
        run_dir.path.mkdir()
        if replacing:
            publish(run_dir, "old")
        with failing_at(nth, torn_write, monkeypatch) as seen:
            try:
                publish(run_dir, "new")
                seen_whole = len(seen) < nth
            except InfrastructureError as error:
                assert "full" in str(error)
        before = run_dir.read_complete("warm", verify=True)
        with run_dir.locked():  # the next start
            after = run_dir.read_complete("warm", verify=True)
        assert after is not None or not replacing, f"the earlier result is lost when operation {nth} ({seen[-1]}) fails"
        assert before is None or after is not None
        publish(run_dir, "again")
        assert (run_dir.read_complete("warm", verify=True) or {})["identity"] == "again"
        assert not list(run_dir.path.glob("*.partial"))
    assert nth > 10, "the failures were not where the work is"


def crashes_of(work: Callable[[], object], run_dir: RunDir, copies: Path) -> list[RunDir]:
    """What a kill, or a power cut, before any operation of `work` leaves; after its last one, too."""
    left: list[RunDir] = []

    def before(operation: Operation, disk: Disk) -> None:
        for power_cut in (False, True):
            left.append(RunDir(copies / f"{operation.number} {power_cut}"))
            disk.copy(left[-1].path, power_cut=power_cut)

    code, operations = supervise(lambda: 0 if work() else 1, run_dir.path, before=before)
    assert code == 0 and len(operations) > 10
    return [*left, run_dir]


@pytest.mark.parametrize("replacing", [False, True])
def test_a_kill_or_a_power_cut_at_any_operation_leaves_the_old_stage_or_the_new_one(
    tmp_path: Path, replacing: bool
) -> None:
    run_dir = RunDir(tmp_path / "run")
    run_dir.path.mkdir()
    if replacing:
        publish(run_dir, "old")
    found = []
    for left in crashes_of(lambda: publish(run_dir, "new"), run_dir, tmp_path / "copies"):
        with left.locked():  # the next start
            manifest = left.read_complete("warm", verify=True)
        assert manifest is not None or not replacing
        found.append(manifest["identity"] if manifest else None)
        assert not list(left.path.glob("*.old-*"))
    assert found[0] == ("old" if replacing else None) and found[-1] == "new"


def test_what_a_stage_goes_on_from_is_there_until_the_rest_is_sealed_and_then_gone(tmp_path: Path) -> None:
    def finish() -> object:
        work = run_dir.open_partial("climb", keep="me")
        (work / "weights.bin").write_bytes(b"w")
        return run_dir.publish("climb", {"stage": "climb", "identity": "me"})

    run_dir = RunDir(tmp_path / "run")
    (run_dir.open_partial("climb", keep="me") / SCRATCH / "state").write_text("half way")
    sealed = []
    for left in crashes_of(finish, run_dir, tmp_path / "copies"):
        with left.locked():
            sealed.append(left.read_complete("climb", verify=True) is not None)
            if sealed[-1]:
                names = {path.name for path in left.stage_folder("climb").iterdir()}
                assert names == {"weights.bin", MANIFEST, COMPLETE}
                assert [path.name for path in left.path.iterdir() if path.is_dir()] == ["climb"]
            else:
                work = left.open_partial("climb", keep="me")
                assert (work / SCRATCH / "state").read_text() == "half way" and not (work / MANIFEST).exists()
    assert not sealed[0] and sealed[-1]


def test_torn_manifest_or_missing_output_is_not_complete(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    for damage in (
        lambda place: (place / "COMPLETE").unlink(),
        lambda place: (place / "COMPLETE").write_text(""),
        lambda place: (place / "manifest.json").write_text((place / "manifest.json").read_text()[:-20]),
        lambda place: (place / "weights.bin").unlink(),
        lambda place: (place / "weights.bin").write_bytes(b"short"),
    ):
        publish(run_dir, "one")
        damage(tmp_path / "warm")
        assert run_dir.read_complete("warm") is None


def test_verify_sees_a_changed_byte_that_sizes_do_not_show(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    publish(run_dir, "one")
    (tmp_path / "warm/weights.bin").write_bytes(b"v" * 4096 + b"one")
    assert run_dir.read_complete("warm") is not None
    assert run_dir.read_complete("warm", verify=True) is None


def test_a_stage_may_not_leave_links_or_the_names_of_publication(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    work = run_dir.open_partial("warm")
    (work / "weights.bin").symlink_to("/etc/hostname")
    with pytest.raises(RuntimeError, match="link"):
        run_dir.publish("warm", {})
    (run_dir.open_partial("warm") / "COMPLETE").touch()
    with pytest.raises(RuntimeError, match="COMPLETE"):
        run_dir.publish("warm", {})


def test_second_process_is_refused_with_the_pid_of_the_first(tmp_path: Path) -> None:
    program = textwrap.dedent(f"""
        from pipeline.run_dir import RunDir
        from pipeline.errors import InfrastructureError
        try:
            with RunDir({str(tmp_path)!r}).locked():
                print("entered")
        except InfrastructureError as error:
            print(error)
    """)
    run_dir = RunDir(tmp_path)
    assert run_dir.holder() is None
    with run_dir.locked():
        assert run_dir.holder() == os.getpid()
        refused = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
        assert f"process {os.getpid()} is running here" in refused.stdout
    entered = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert entered.stdout.strip() == "entered"


def test_torn_last_event_is_passed_over_and_cut_away_by_the_next(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.append_event("note", text="whole")
    with run_dir.events_file.open("a") as file:
        file.write('{"time": 1, "event": "no')
    assert [event["text"] for event in run_dir.read_events()] == ["whole"]
    run_dir.append_event("note", "warm", text="next")
    assert [(event["stage"], event["text"]) for event in run_dir.read_events()] == [(None, "whole"), ("warm", "next")]
    assert len(run_dir.events_file.read_text().splitlines()) == 2


def test_full_disk_is_named_and_loses_no_earlier_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.append_event("note", text="whole")

    def half(handle: int, content: bytes, offset: int, _pwrite: Any = os.pwrite) -> int:
        _pwrite(handle, content[:5], offset)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", half)
        with pytest.raises(InfrastructureError, match="disk under .* is full"):
            run_dir.append_event("note", text="lost")
    run_dir.append_event("note", text="after")
    assert [event["text"] for event in run_dir.read_events()] == ["whole", "after"]


def test_digest_follows_content_and_is_remembered_by_size_and_time(tmp_path: Path) -> None:
    run_dir, checkpoint = RunDir(tmp_path / "run"), tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    (checkpoint / "model.safetensors").write_bytes(b"one")
    first = run_dir.digest_of(checkpoint)
    (checkpoint / ".cache").write_text("hidden files do not count")
    assert run_dir.digest_of(checkpoint) == first
    assert len(json.loads((run_dir.path / ".digests.json").read_text())) == 2
    os.utime(checkpoint / "model.safetensors", ns=(1, 1))
    assert run_dir.digest_of(checkpoint) == first, "a new time alone is no new content"
    (checkpoint / "model.safetensors").write_bytes(b"two")
    assert run_dir.digest_of(checkpoint) != first
    (checkpoint / "model.safetensors").rename(checkpoint / "other.safetensors")
    assert run_dir.digest_of(checkpoint, remember=False) != first
