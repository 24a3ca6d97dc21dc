"""Sends a recipe to a Ray cluster as a Ray Job, follows its log and gives back the exit code of `drover run` there.

Called by `drover submit`. Beside `pipeline/cluster` the only file that imports ray, and only its job client.

What travels is a small explicit package: our sources, the resolved recipe, and the checkpoints and data files that it
names by a relative path. Absolute paths and hub ids stay as they are: they must mean the same on the cluster. `python`
on the cluster must have the packages of requirements/cpu.lock or gpu.txt. The run directory stays on the cluster, at
the absolute form of `run.dir` (set it to shared storage: `--set run.dir=/shared/runs/tiny`); submitting again resumes.

What each wait waits for, and what ends it: a request to the head (its reply, or REQUEST_DEADLINE_S); the job's start
(PENDING_DEADLINE_S); the log (its end, or the head not answering, asked every HEARTBEAT_S while the log is silent);
the job's end after its log's end or a request to stop (END_DEADLINE_S). The job itself keeps the deadlines of the run.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from model.deadline import call_within
from pipeline import own_class
from pipeline.config import OnlineRlStage, Recipe
from pipeline.errors import InfrastructureError, RecipeError
from pipeline.recipe import PATH_KEYS, load, resolved_yaml

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("cli.py", "pipeline", "judges", "rl", "rewards", "model", "requirements")
RECIPE_NAME = "recipe.yaml"
ENTRYPOINT = f"python -m cli run {RECIPE_NAME}"
MAX_PACKAGE_BYTES = 50_000_000  # before compression; more belongs on shared storage or a hub
SHOWN_PATHS = 5
REQUEST_DEADLINE_S = 60.0
PENDING_DEADLINE_S = 600.0  # the head unpacks the package and starts one process; Ray itself gives up after 900
HEARTBEAT_S = 15.0
STOP_WAIT_S = 30  # `drover run` needs ten to stop cleanly; then Ray kills it
END_DEADLINE_S = STOP_WAIT_S + 30.0
POLL_S = 0.5
INTERRUPTED = 130  # what a shell says after ctrl-C

T = TypeVar("T")


def submit(
    recipe_path: str | Path, overrides: Sequence[str] = (), address: str | None = None, *, follow: bool = True
) -> int:
    """Submit the recipe and give back the exit code of the run; with follow=False, 0 as soon as it is submitted.

    address: the head's dashboard (http://host:8265); None: RAY_ADDRESS, or a cluster on this machine. Raises
    RecipeError before anything is sent, and InfrastructureError when the cluster cannot be asked. Ctrl-C stops the job.
    """
    recipe = for_cluster(load(recipe_path, overrides))
    files = package_files(recipe)
    with tempfile.TemporaryDirectory(prefix="drover-submit-") as folder:
        package = write_package(files, resolved_yaml(recipe), Path(folder) / "package.zip")
        total = _size(sum(map(_bytes, files.values())))
        _say(f"package: {len(files) + 1} files, {total}, {_size(_bytes(package))} zipped")
        for name, size in largest(files)[:SHOWN_PATHS]:
            _say(f"  {_size(size):>9}  {name}")
        _say(f"run directory, on the cluster: {recipe.run.dir}")
        return run_job(job_client(address), ENTRYPOINT, package, follow=follow)


# --- what is sent -------------------------------------------------------------------------------------------------


def for_cluster(recipe: Recipe) -> Recipe:
    """The recipe as the job shall run it: an absolute run directory, and the job's Ray instead of a private one."""
    run = recipe.run.model_copy(update={"dir": Path(os.path.abspath(recipe.run.dir.expanduser()))})
    cluster = recipe.cluster.model_copy(update={"address": "auto"})
    return recipe.model_copy(update={"run": run, "cluster": cluster})


def package_files(recipe: Recipe) -> dict[str, Path]:
    """Name in the package → file here: our sources, and what the recipe names by a relative path that exists here.

    RecipeError where a path leads out of the current directory, or where all of it is more than MAX_PACKAGE_BYTES.
    """
    files = {str(file.relative_to(ROOT)): file for source in SOURCES for file in _files_below(ROOT / source)}
    for path in sorted(_named_paths(recipe)):
        name = os.path.normpath(path)
        if name.startswith(".."):
            raise RecipeError(
                f"{path}: lies outside the current directory, so it cannot travel with the job; submit from a "
                "directory that holds it, or give an absolute path that exists on the cluster"
            )
        files |= {os.path.normpath(file): file for file in _files_below(Path(path))}
    if (total := sum(map(_bytes, files.values()))) > MAX_PACKAGE_BYTES:
        name, size = largest(files)[0]
        raise RecipeError(
            f"the package would be {_size(total)}, more than {_size(MAX_PACKAGE_BYTES)}; the largest part is {name} "
            f"({_size(size)}). Put it on storage that the cluster shares and name it by its absolute path"
        )
    return files


def _named_paths(recipe: Recipe) -> set[str]:
    """Relative paths that the recipe's stages name and that exist here; stages' names are none."""
    stages = {stage.name for stage in recipe.stages}

    def walk(value: Any, key: str = "") -> Iterator[str]:
        if isinstance(value, dict):
            for name, inner in value.items():
                yield from walk(inner, name)
        elif isinstance(value, list):
            for inner in value:
                yield from walk(inner, key)
        elif key in PATH_KEYS and isinstance(value, str) and value not in stages:
            if not os.path.isabs(value) and os.path.exists(value):
                yield value

    return set(walk(recipe.model_dump(mode="json")["stages"])) | set(_own_sources(recipe))


def _own_sources(recipe: Recipe) -> Iterator[str]:
    """Sources of the user's own classes that lie below the current directory; others are installed on the cluster."""
    for stage in recipe.stages:
        curriculum = stage.curriculum if isinstance(stage, OnlineRlStage) else None
        for name in (curriculum.sampler, curriculum.gate) if curriculum else ():
            source = own_class.source_of(name)
            if source and source.is_relative_to(Path.cwd()):
                yield str(source.relative_to(Path.cwd()))


def _files_below(path: Path) -> list[Path]:
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return [file for file in files if "__pycache__" not in file.parts and not file.name.startswith(".")]


def largest(files: dict[str, Path]) -> list[tuple[str, int]]:
    """(folder or file, bytes) of the package's parts, the largest first."""
    sizes: dict[str, int] = {}
    for name, file in files.items():
        part = str(Path(name).parent) if "/" in name else name
        sizes[part] = sizes.get(part, 0) + _bytes(file)
    return sorted(sizes.items(), key=lambda item: -item[1])


def write_package(files: dict[str, Path], recipe: str, target: Path) -> Path:
    """A zip of the files and the recipe. Equal content gives equal bytes, so that Ray uploads it only once."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, file in sorted(files.items()):
            archive.writestr(_entry(name), file.read_bytes())
        archive.writestr(_entry(RECIPE_NAME), recipe)
    return target


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)  # dated 1980, whatever the file's date
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = 0o644 << 16
    return entry


# --- the job ------------------------------------------------------------------------------------------------------


def job_client(address: str | None) -> JobSubmissionClient:
    """A client of the cluster's job server; InfrastructureError when nothing answers there."""
    from ray.job_submission import JobSubmissionClient

    with _without_environment("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS") if address else nullcontext():
        return _ask(f"connect to {address or 'a Ray cluster on this machine'}", JobSubmissionClient, address)


def run_job(client: JobSubmissionClient, entrypoint: str, package: Path, *, follow: bool = True) -> int:
    """Submit a command with a zip as its working directory; its exit code, or 0 at once with follow=False."""
    environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), "PYTHONUNBUFFERED": "1"}
    job = _ask(
        "submit the job",
        client.submit_job,
        entrypoint=entrypoint,  # asks for no CPUs, and so runs on the head, where the next one finds the same disk
        runtime_env={"working_dir": str(package), "env_vars": environment},
    )
    _say(f"job {job} at {client.get_address()}")
    if not follow:
        return 0
    try:
        _await_start(client, job)
        asyncio.run(_follow_log(client, job))
        return _exit_code(job, _await_end(client, job))
    except KeyboardInterrupt:
        _say(f"interrupted: stopping {job}")
        _ask("stop the job", client.stop_job, job)
        _say(f"{job}: {_await_end(client, job).status.value.lower()}")
        return INTERRUPTED


async def _follow_log(client: JobSubmissionClient, job: str) -> None:
    """Print the log until it ends. A broken connection is opened again, and what was printed is not repeated."""
    printed = 0
    while True:
        seen = 0
        chunks = client.tail_job_logs(job)
        try:
            while True:
                chunk = await _next_chunk(client, job, chunks)
                if chunk is None:
                    return
                new = chunk[max(0, printed - seen) :]
                seen += len(chunk)
                printed = max(printed, seen)
                print(new, end="", flush=True)
        except (OSError, RuntimeError) as error:  # aiohttp's errors and Ray's "closed unexpectedly"
            if (await asyncio.to_thread(_details, client, job)).status.is_terminal():
                return
            _say(f"the log's connection broke ({error}); opening it again")
            await asyncio.sleep(POLL_S)


async def _next_chunk(client: JobSubmissionClient, job: str, chunks: Any) -> str | None:
    """The next piece of the log, or None at its end. While it is silent, make sure that the head still answers."""
    waiting = asyncio.ensure_future(anext(chunks, None))
    try:
        while not (await asyncio.wait({waiting}, timeout=HEARTBEAT_S))[0]:
            if (await asyncio.to_thread(_details, client, job)).status.is_terminal():
                await asyncio.wait({waiting}, timeout=HEARTBEAT_S)  # a last chance for the last lines
                return waiting.result() if waiting.done() else None
        return waiting.result()
    finally:
        waiting.cancel()


def _await_start(client: JobSubmissionClient, job: str) -> None:
    """Return once the job is no longer PENDING. After PENDING_DEADLINE_S, stop it and raise InfrastructureError."""
    deadline = time.monotonic() + PENDING_DEADLINE_S
    while (details := _details(client, job)).status.value == "PENDING":
        if time.monotonic() > deadline:
            _ask("stop the job", client.stop_job, job)
            raise InfrastructureError(
                f"{job} was still PENDING after {PENDING_DEADLINE_S:.0f} s, and is stopped ({details.message}). It "
                f"asks of the cluster a node whose job agent can fetch the package and start {ENTRYPOINT!r}; "
                "it reserves no CPU or GPU. See `ray status` and the head's dashboard, then submit again"
            )
        time.sleep(POLL_S)


def _await_end(client: JobSubmissionClient, job: str) -> JobDetails:
    """The job's details once it has ended; InfrastructureError when it goes on for END_DEADLINE_S."""
    deadline = time.monotonic() + END_DEADLINE_S
    while not (details := _details(client, job)).status.is_terminal():
        if time.monotonic() > deadline:
            raise InfrastructureError(f"{job} is still {details.status.value}, {END_DEADLINE_S:.0f} s after its log")
        time.sleep(POLL_S)
    return details


def _exit_code(job: str, details: JobDetails) -> int:
    """What the entrypoint returned. Ray itself says only FAILED, and nothing at all when it could not start it."""
    code = details.driver_exit_code
    if code is None or code < 0:  # below 0: killed by that signal
        raise InfrastructureError(f"{job} {details.status.value}: {details.message}")
    return code


def _details(client: JobSubmissionClient, job: str) -> JobDetails:
    return _ask(f"ask about {job}", client.get_job_info, job)


def _ask(what: str, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call Ray's client, which has no timeouts of its own; whatever goes wrong becomes an InfrastructureError."""
    try:
        return call_within(REQUEST_DEADLINE_S, function, *args, **kwargs)
    except TimeoutError:
        raise InfrastructureError(f"could not {what}: no answer within {REQUEST_DEADLINE_S:.0f} s") from None
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        advice = "; give both sides RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH" if "uthenticat" in reason else ""
        raise InfrastructureError(f"could not {what}: {reason}{advice}") from error


# --- helpers ------------------------------------------------------------------------------------------------------


@contextmanager
def _without_environment(*names: str) -> Iterator[None]:
    """Ray lets these variables override an address that was given explicitly; here the explicit one wins."""
    saved = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(saved)


def _bytes(file: Path) -> int:
    return file.stat().st_size


def _size(number: int) -> str:
    return f"{number / 1e6:.1f} MB" if number >= 1e6 else f"{number / 1e3:.0f} kB"


def _say(line: str) -> None:
    print(f"submit: {line}", flush=True)
