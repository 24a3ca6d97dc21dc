"""What lies where in a run directory, and the only code that writes its bookkeeping.

    recipe.yaml  events.jsonl  report.html  logs/  .lock
    keep/  warm/  climb/  …      a published stage: its artifacts, manifest.json, COMPLETE
    climb.partial/               a stage that is being written, or whose process was killed
    climb.partial/.resume/       what it goes on from after a kill; never published
    climb.old-1/                 a replaced stage, or a .resume/ of no more use, on its way out

A stage is written beside its place, synced, sealed by COMPLETE (which holds the digest of manifest.json, which holds
the digests of the artifacts), and renamed. So a folder is complete or it is not, whatever killed the process; and what
a killed one goes on from is there until the rest is sealed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from model.disk import naming, remove, sync
from pipeline.errors import InfrastructureError
from pipeline.stage import SCRATCH

Manifest = dict[str, Any]  # the content of manifest.json
Event = dict[str, Any]  # one line of events.jsonl: "time", "event", "stage" and the event's own fields

MANIFEST, COMPLETE = "manifest.json", "COMPLETE"
IDENTITY = "identity"  # in SCRATCH: of the stage that can go on from there
LOCK_TRIES, LOCK_RETRY_S = 10, 0.05  # `holder` takes the lock for an instant; a start must outwait that
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
DISK_FULL_ADVICE = "free some space and run the same command again; complete stages are kept"


class RunDir:
    """One run's directory. Creates nothing until something is written."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.recipe_file = self.path / "recipe.yaml"
        self.events_file = self.path / "events.jsonl"
        self.report_file = self.path / "report.html"
        self.logs = self.path / "logs"
        self._lock_file = self.path / ".lock"
        self._digests_file = self.path / ".digests.json"
        self._append_lock = threading.Lock()

    # --- one process at a time ------------------------------------------------------------------------------------

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory, finish or sweep away what a killed process left, and let go at the end.

        Raises InfrastructureError naming the process that holds it already.
        """
        with _disk_trouble(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self._lock_file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _try_lock(handle):
                raise InfrastructureError(
                    f"{self.path}: process {_read_pid(handle)} is running here; wait for it, stop it, "
                    "or state another run.dir"
                )
            with _disk_trouble(self.path):
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
                self.sweep()
            yield
        finally:
            os.close(handle)  # lets go of the lock, as the death of the process would

    def holder(self) -> int | None:
        """The pid of the process that runs here now; None when there is none."""
        try:
            handle = os.open(self._lock_file, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        except BlockingIOError:
            return _read_pid(handle)
        finally:
            os.close(handle)

    def sweep(self) -> None:
        """Put in place what was sealed but not yet renamed; remove replaced stages. Call with the lock held."""
        for partial in sorted(self.path.glob("*.partial")):
            if _read_sealed(partial) is not None:  # killed after sealing: newer than what stands in its place
                self._put_in_place(partial)
        for old in self.path.glob("*.old-*"):
            remove(old)
        sync(self.path)

    # --- stages ---------------------------------------------------------------------------------------------------

    def stage_folder(self, name: str) -> Path:
        return self.path / name

    def open_partial(self, name: str, keep: str | None = None) -> Path:
        """A folder for a stage to write into. What a killed run left there is removed, unless it was opened with the
        same `keep`, the identity of a stage that can go on from it."""
        partial = self.path / f"{name}.partial"
        mark = partial / SCRATCH / IDENTITY
        with _disk_trouble(partial):
            if keep is not None and mark.exists() and mark.read_text() == keep:
                for seal in (COMPLETE, MANIFEST):  # of a publication that came to nothing
                    (partial / seal).unlink(missing_ok=True)
                return partial
            if partial.exists():
                remove(self._move_aside(partial, partial.name))
            partial.mkdir(parents=True)
            if keep is not None:
                mark.parent.mkdir()
                _write_synced(mark, keep.encode())
        return partial

    def publish(self, name: str, manifest: Mapping[str, Any]) -> Manifest:
        """Make `<name>.partial/` the published `<name>/`, all at once, and give back the manifest as written.

        Adds "outputs" (relative path → sha256) and "output_bytes" (relative path → size) to the manifest. Raises
        InfrastructureError on a full disk; then, as after a kill at any point, the earlier `<name>/` is still there
        or the new one is found sealed at the next start.
        """
        partial = self.path / f"{name}.partial"
        with _disk_trouble(partial):
            outputs = _sync_outputs(partial)
            complete = dict(manifest) | {
                "outputs": {path: digest for path, (digest, _) in outputs.items()},
                "output_bytes": {path: size for path, (_, size) in outputs.items()},
            }
            text = json.dumps(complete, indent=2, ensure_ascii=False, default=_plain_number).encode()
            _write_synced(partial / MANIFEST, text)
            sync(partial)
            # COMPLETE comes last: were it written before the rest is on disk, a power cut could leave it alone there.
            _write_synced(partial / COMPLETE, hashlib.sha256(text).hexdigest().encode())
            sync(partial)
            of_no_use = self._put_in_place(partial)
            sync(self.path)
            for folder in of_no_use:
                remove(folder)
        return complete

    def _put_in_place(self, sealed: Path) -> list[Path]:
        """Rename a sealed folder to the stage's own name; what it replaces and its SCRATCH are moved aside before."""
        place = sealed.with_suffix("")
        aside = [self._move_aside(one, place.name) for one in (sealed / SCRATCH, place) if one.exists()]
        os.rename(sealed, place)
        return aside

    def read_complete(self, name: str, verify: bool = False) -> Manifest | None:
        """The manifest of a complete stage, else None. Every output must be there with its size; with `verify`, with
        its sha256 too (reads every byte)."""
        return _read_sealed(self.stage_folder(name), verify)

    def _move_aside(self, folder: Path, name: str) -> Path:
        """Rename a folder so that it counts for nothing before its files are removed one by one."""
        number = 1
        while (aside := self.path / f"{name}.old-{number}").exists():
            number += 1
        os.rename(folder, aside)
        return aside

    # --- files and digests ----------------------------------------------------------------------------------------

    def write_text(self, file: Path, text: str) -> None:
        """Replace a small file of the run directory, atomically."""
        with _disk_trouble(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            beside = file.with_name(f".{file.name}.new")
            _write_synced(beside, text.encode())
            os.rename(beside, file)

    def digest_of(self, path: Path, remember: bool = True) -> str:
        """sha256 of a file, or of every file beneath a folder (hidden ones apart) with its name.

        Known by path, size and modification time, so that a large checkpoint is read once. Only the process that
        holds the lock may `remember` what it read.
        """
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file() and not _is_hidden(file, path))
        else:
            files = [path]
        known, num_read = self._known_digests(), 0
        lines = []
        for file in files:
            status = file.stat()
            seal = [status.st_size, status.st_mtime_ns]
            key = str(file.resolve())
            if known.get(key, [])[:2] != seal:
                known[key] = [*seal, _sha256(file)]
                num_read += 1
            name = file.relative_to(path).as_posix() if path.is_dir() else ""
            lines.append(f"{name}\0{known[key][2]}\n")
        if remember and num_read:
            self.write_text(self._digests_file, json.dumps(known))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def _known_digests(self) -> dict[str, list[Any]]:
        try:
            return json.loads(self._digests_file.read_text())
        except (FileNotFoundError, ValueError):
            return {}

    # --- events ---------------------------------------------------------------------------------------------------

    def append_event(self, event: str, stage: str | None = None, **fields: Any) -> Event:
        """Add one line to events.jsonl and give it back. A line that a killed process left torn is cut away first.

        Safe to call from several threads of the process that holds the lock.
        """
        record: Event = {"time": round(time.time(), 3), "event": event, "stage": stage, **fields}
        line = (json.dumps(record, ensure_ascii=False, default=_plain_number) + "\n").encode()
        with self._append_lock, _disk_trouble(self.events_file):
            handle = os.open(self.events_file, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                end = _end_of_last_line(handle)
                os.ftruncate(handle, end)
                while line:
                    num_written = os.pwrite(handle, line, end)
                    line, end = line[num_written:], end + num_written
            finally:
                os.close(handle)
        return record

    def read_events(self) -> list[Event]:
        """Every whole event, oldest first; a line that is torn or no JSON (a power cut) is left out."""
        try:
            lines = self.events_file.read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return []
        return [event for line in lines if (event := _parse_event(line)) is not None]


def is_disk_full(error: BaseException | None) -> bool:
    """Whether a full disk is behind an error: libraries wrap it, some keep only its text."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            return True
        if any(os.strerror(number) in str(error) for number in DISK_FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def disk_full_message(path: Path | str) -> str:
    return f"the disk under {path} is full: {DISK_FULL_ADVICE}"


def explain_disk_full(error: BaseException, otherwise: Path) -> str:
    """The message for an error of which `is_disk_full` holds. Text that came from an actor still names the file as
    Python prints it; `otherwise` is said where none is named. A message that tells all this already stays as it is."""
    if DISK_FULL_ADVICE in str(error):
        return str(error)
    named = re.search(rf"(?:{'|'.join(map(os.strerror, DISK_FULL))}): '(/[^']+)'", str(error))
    return f"{disk_full_message(named[1] if named else otherwise)} ({error})"


@contextmanager
def _disk_trouble(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        file = error.filename if os.path.isabs(str(error.filename)) else path
        message = disk_full_message(file) if is_disk_full(error) else f"{file}: the file system refused: {error}"
        raise InfrastructureError(message) from error


def _try_lock(handle: int) -> bool:
    for _ in range(LOCK_TRIES):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(LOCK_RETRY_S)
    return False


def _read_pid(handle: int) -> int:
    text = os.pread(handle, 32, 0).strip()
    return int(text) if text.isdigit() else 0


def _read_sealed(folder: Path, verify: bool = False) -> Manifest | None:
    try:
        text = (folder / MANIFEST).read_bytes()
        if (folder / COMPLETE).read_bytes() != hashlib.sha256(text).hexdigest().encode():
            return None
        manifest = json.loads(text)
        for path, size in manifest["output_bytes"].items():
            if (folder / path).stat().st_size != size:
                return None
            if verify and _sha256(folder / path) != manifest["outputs"][path]:
                return None
    except (FileNotFoundError, NotADirectoryError):
        return None
    return manifest


def _sync_outputs(folder: Path) -> dict[str, tuple[str, int]]:
    """Sync everything beneath a folder but its SCRATCH; give back relative path → (sha256, bytes)."""
    outputs: dict[str, tuple[str, int]] = {}
    for reserved in (MANIFEST, COMPLETE):
        if (folder / reserved).exists():
            raise RuntimeError(f"{folder / reserved}: a stage must not write this file, publication does")
    for path in sorted(folder.rglob("*")):
        if path.is_relative_to(folder / SCRATCH):
            continue
        if path.is_symlink():
            raise RuntimeError(f"{path} is a link: a stage must leave plain files, so that a digest means something")
        if path.is_dir():
            sync(path)
        else:
            outputs[path.relative_to(folder).as_posix()] = (_sha256(path, durable=True), path.stat().st_size)
    return outputs


def _sha256(file: Path, durable: bool = False) -> str:
    with file.open("rb") as handle, naming(file):
        if durable:
            os.fsync(handle.fileno())
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _write_synced(file: Path, content: bytes) -> None:
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        with naming(file):
            while content:
                content = content[os.write(handle, content) :]
            os.fsync(handle)
    finally:
        os.close(handle)


def _end_of_last_line(handle: int, block: int = 65536) -> int:
    end = os.fstat(handle).st_size
    while end > 0:
        start = max(0, end - block)
        newline = os.pread(handle, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def _parse_event(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None


def _is_hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _plain_number(value: Any) -> Any:
    """JSON for what a stage's metrics may hold beside plain numbers: numpy and torch scalars, paths."""
    if hasattr(value, "item"):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{value!r} in an event or in metrics is not JSON")
