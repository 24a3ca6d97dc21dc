"""What `drover submit` sends: the sources, the files the recipe names, and nothing else. Needs no cluster."""

from __future__ import annotations

import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.errors import InfrastructureError, RecipeError
from pipeline.recipe import load, resolved_yaml
from pipeline.submit import MAX_PACKAGE_BYTES, for_cluster, package_files, run_job, write_package


def test_package_holds_sources_and_named_files_and_nothing_else(tmp_path: Path) -> None:
    files = package_files(for_cluster(load("recipes/smoke.yaml")))
    folders = {name.split("/")[0] for name in files}
    assert folders == {"cli.py", "pipeline", "judges", "rl", "rewards", "model", "requirements", "recipes"}
    assert {name for name in files if name.startswith("recipes/")} == {
        str(file) for file in Path("recipes/tiny_base").rglob("*") if file.is_file()
    }
    assert not [name for name in files if name.endswith(".pyc")]
    first = write_package(files, "a: 1", tmp_path / "first.zip").read_bytes()
    assert first == write_package(files, "a: 1", tmp_path / "second.zip").read_bytes()  # uploaded only once


def test_job_recipe_has_an_absolute_run_directory_and_the_clusters_ray() -> None:
    recipe = for_cluster(load("recipes/smoke.yaml"))
    assert recipe.run.dir == Path.cwd() / "runs/smoke"
    assert recipe.cluster.address == "auto"


def test_recipe_in_the_package_reads_back_as_it_was_sent(tmp_path: Path) -> None:
    recipe = for_cluster(load("recipes/smoke.yaml", ["stages.climb.steps=7"]))
    package = write_package(package_files(recipe), resolved_yaml(recipe), tmp_path / "package.zip")
    with zipfile.ZipFile(package) as archive:
        archive.extractall(tmp_path / "there")
    assert load(tmp_path / "there" / "recipe.yaml") == recipe


def test_too_large_a_package_is_refused_with_the_largest_part_named(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("pipeline.submit.MAX_PACKAGE_BYTES", 1000)
    with pytest.raises(RecipeError, match=r"the largest part is \S+ \("):
        package_files(for_cluster(load("recipes/smoke.yaml")))
    assert MAX_PACKAGE_BYTES == 50_000_000


def test_a_job_that_never_starts_is_stopped_and_says_what_it_asks_for(monkeypatch, tmp_path: Path) -> None:
    stopped = []
    pending = SimpleNamespace(status=SimpleNamespace(value="PENDING"), message="waiting for the runtime environment")
    client = SimpleNamespace(
        submit_job=lambda **_: "job-1",
        get_address=lambda: "http://head:8265",
        get_job_info=lambda job: pending,
        stop_job=stopped.append,
    )
    monkeypatch.setattr("pipeline.submit.PENDING_DEADLINE_S", 0.0)
    with pytest.raises(InfrastructureError, match="PENDING.*waiting for the runtime.*asks of the cluster a node"):
        run_job(client, "python -m cli run", tmp_path / "package.zip")  # type: ignore[arg-type]
    assert stopped == ["job-1"]
