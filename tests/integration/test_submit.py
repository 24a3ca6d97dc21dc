"""`drover submit` against a real Ray head on loopback: exit codes, logs, and that Ctrl-C stops the job."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.cluster.ray_process import AUTH_TOKEN
from pipeline.errors import InfrastructureError
from pipeline.submit import job_client, run_job, submit, write_package

HEAD_UP_S = 90.0


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """Address of a head of our own: its folder, ports and token are nobody else's."""
    folder = Path(tempfile.mkdtemp(prefix="drs", dir="/tmp"))  # short: Ray's socket paths may have 107 characters
    token = folder / "token"
    token.write_text(AUTH_TOKEN)  # Ray reads a process's token once, and other tests here start Rays too
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token))  # for the head and for our client
    ports = free_ports(4)
    command = [
        *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--disable-usage-stats"),
        *("--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--temp-dir={folder}/ray", "--num-cpus=8"),
        *(f"--port={ports[0]}", f"--dashboard-port={ports[1]}", f"--dashboard-agent-listen-port={ports[2]}"),
        *(f"--ray-client-server-port={ports[3]}", f"--object-store-memory={400_000_000}"),
    ]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # the job's `python` is this one
    log = folder / "head.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, env={**os.environ, "PATH": path}, stdout=out, stderr=out)
    address = f"http://127.0.0.1:{ports[1]}"
    try:
        wait_until_up(address, process, log)
        yield address
    finally:
        process.terminate()  # with --block this ends every process of this head, and of no other
        process.wait(timeout=30)
        del os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN_PATH"]
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return ports


def wait_until_up(address: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + HEAD_UP_S
    while True:
        try:
            job_client(address).list_jobs()
            return
        except Exception as error:  # whatever it is while the head comes up, it is the same to us
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the Ray head did not come up: {error}\n{log.read_text()}") from error
            time.sleep(0.5)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    hello = tmp_path / "hello.py"
    hello.write_text("import sys\nprint('hello from', sys.argv[1])\nsys.exit(int(sys.argv[2]))\n")
    return write_package({"hello.py": hello}, "{}", tmp_path / "package.zip")


def test_exit_code_and_log_of_the_entrypoint_come_back(head: str, package: Path, capsys) -> None:
    client = job_client(head)
    assert run_job(client, "python hello.py cluster 0", package) == 0
    assert capsys.readouterr().out.count("hello from cluster\n") == 1
    assert run_job(client, "python hello.py cluster 5", package) == 5  # Ray itself says no more than FAILED


def test_entrypoint_killed_by_a_signal_is_an_infrastructure_error(head: str, package: Path) -> None:
    with pytest.raises(InfrastructureError, match="FAILED"):
        run_job(job_client(head), "kill -9 $$", package)


def test_ctrl_c_stops_the_job(head: str, package: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pipeline.submit import job_client, run_job;"
        "sys.exit(run_job(job_client(sys.argv[1]), 'echo started; exec sleep 600', Path(sys.argv[2])))"
    )
    command = [sys.executable, "-c", code, head, str(package)]
    submitter = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert submitter.stdout is not None
    seen = [next(submitter.stdout)]
    while "started\n" != seen[-1]:
        seen.append(next(submitter.stdout))
    submitter.send_signal(signal.SIGINT)
    rest, _ = submitter.communicate(timeout=90)
    assert submitter.returncode == 130, rest
    job = next(line for line in seen if line.startswith("submit: job ")).split()[2]
    assert job_client(head).get_job_status(job).value == "STOPPED"


def test_smoke_recipe_runs_as_a_job_and_returns_0(head: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert submit("recipes/smoke.yaml", [f"run.dir={run_dir}"], head) == 0
    assert (run_dir / "score" / "COMPLETE").exists()


def test_broken_recipe_is_refused_with_2_before_anything_is_sent(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text(Path("recipes/smoke.yaml").read_text().replace("kind: sft", "kind: sftt"))
    command = [sys.executable, "-m", "cli", "submit", str(broken), "--address", "http://127.0.0.1:1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "stages.warm.kind" in result.stderr


def test_no_cluster_is_an_infrastructure_error_that_names_the_address() -> None:
    with pytest.raises(InfrastructureError, match="127.0.0.1:1"):
        job_client("http://127.0.0.1:1")
