"""What a run will do and need, as plain arithmetic, before anything starts.

Called by `drover plan`. `make_plan` turns a recipe into numbers; `render` turns the numbers into tables. Shapes come
from config.json, so that nothing heavy is imported and no GPU is touched.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from model.config import read_config
from model.tensor_map import count_lora_parameters, count_parameters, kv_bytes_per_token
from pipeline.config import (
    AnyStage,
    BootstrapStage,
    DpoStage,
    EvaluateStage,
    GeneratedTasks,
    JudgeFilterStage,
    OnlineRlStage,
    Recipe,
    SftStage,
    TaskSource,
    UpcycleStage,
)
from pipeline.engines import LONGEST_TOKENS
from pipeline.errors import RecipeError
from pipeline.recipe_checks import max_positions, nearest, origin
from rl.band import band_in_words, set_aside_in_words
from rl.controller import Bounds
from rl.types import EngineSettings

BYTES = {"float32": 4, "bfloat16": 2}
GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes one actor holds beside its libraries and activations."""

    weights: int
    gradients: int = 0
    adam: int = 0  # two moments of every trained parameter
    kv_cache: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.adam + self.kv_cache


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorPlan:
    """`count` like processes of one stage."""

    name: str
    count: int
    cpus: float  # each
    gpus: float  # each
    memory: Memory | None  # each; None where the model's shape is not known before it is fetched or built


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    name: str
    kind: str
    state: str  # cached | runs | stale (complete, but of another recipe, input or code) | left out
    actors: list[ActorPlan] = field(default_factory=list)
    arithmetic: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    run_dir: str
    stages: list[StagePlan]
    cpus_here: int

    @property
    def cpus_needed(self) -> float:
        """CPUs of the stage that asks for the most; stages run one after the other."""
        return max(sum(actor.count * actor.cpus for actor in stage.actors) for stage in self.stages)


def make_plan(
    recipe: Recipe,
    states: Mapping[str, str],
    *,
    until: str | None = None,
    only: str | None = None,
    fresh: bool = False,
) -> Plan:
    """The plan of a run whose stages are in `states` ("cached", "runs" or "stale", by name).

    RecipeError: `until` or `only` names no stage, or both are given.
    """
    names = [stage.name for stage in recipe.stages]
    if until and only:
        raise RecipeError("--until and --only: give one of them")
    for option, name in (("--until", until), ("--only", only)):
        if name and name not in names:
            raise RecipeError(f"{option} {name!r}: no such stage.{nearest(name, names)}")
    wanted = [only] if only else names[: names.index(until) + 1] if until else names
    stages = []
    for stage in recipe.stages:
        state = states[stage.name] if stage.name in wanted else "left out"
        state = "runs" if fresh and state in ("cached", "stale") else state
        stages.append(
            StagePlan(
                name=stage.name,
                kind=stage.kind,
                state=state,
                actors=_actors(recipe, stage),
                arithmetic=_arithmetic(recipe, stage),
            )
        )
    return Plan(run_dir=str(recipe.run.dir), stages=stages, cpus_here=os.cpu_count() or 1)


# --- actors and their memory --------------------------------------------------------------------------------------


def _actors(recipe: Recipe, stage: AnyStage) -> list[ActorPlan]:
    if isinstance(stage, BootstrapStage | UpcycleStage):
        return [_actor(recipe, "trainer")]
    if isinstance(stage, JudgeFilterStage):
        actors = [_generator(recipe, "judge", stage.judge.model, stage.judge.dtype)]
        if stage.calibrate_policy:
            actors.append(
                _generator(
                    recipe, "generator", stage.calibrate_policy, stage.calibrate_dtype, recipe.cluster.generators
                )
            )
        return actors
    if isinstance(stage, SftStage):
        return [_actor(recipe, "trainer", memory=_training_memory(recipe, stage.init))]
    if isinstance(stage, DpoStage):
        return [_actor(recipe, "trainer", memory=_lora_memory(recipe, stage))]
    if isinstance(stage, OnlineRlStage):
        learners = recipe.cluster.learners
        return [
            _generator(recipe, "generator", stage.policy, stage.dtype, recipe.cluster.generators),
            _actor(recipe, "learner", count=learners, memory=_training_memory(recipe, stage.policy, learners)),
        ]
    count = stage.engines or recipe.cluster.generators
    return [_generator(recipe, "generator", stage.policies[0], stage.dtype, count)]


def _actor(
    recipe: Recipe, name: str, *, count: int = 1, cpus: float | None = None, memory: Memory | None = None
) -> ActorPlan:
    cluster = recipe.cluster
    return ActorPlan(
        name=name, count=count, cpus=cpus or cluster.cpus_per_actor, gpus=cluster.gpus_per_actor, memory=memory
    )


def _generator(recipe: Recipe, name: str, reference: str, dtype: str, count: int = 1) -> ActorPlan:
    config = known_config(recipe, reference)
    engine = EngineSettings(checkpoint=reference, dtype=dtype)
    memory = config and Memory(
        weights=count_parameters(config) * BYTES[dtype], kv_cache=round(engine.kv_cache_gib * GIB)
    )
    return _actor(recipe, name, count=count, memory=memory or None)


def _training_memory(recipe: Recipe, reference: str, processes: int = 1) -> Memory | None:
    """All parameters trained: each with a gradient and two moments, float32 whatever the forward pass computes in, and
    divided among the processes. Not counted: the layer that each holds whole while it is computed."""
    config = known_config(recipe, reference)
    if config is None:
        return None
    weights = -(-count_parameters(config) // processes) * BYTES["float32"]
    return Memory(weights=weights, gradients=weights, adam=2 * weights)


def _lora_memory(recipe: Recipe, stage: DpoStage) -> Memory | None:
    """The whole model once (the reference is the same weights without the LoRA); only the LoRA is trained."""
    config = known_config(recipe, stage.policy)
    if config is None:
        return None
    size = BYTES["float32"]
    lora = count_lora_parameters(config, stage.lora.rank, stage.lora.targets) * size
    return Memory(weights=count_parameters(config) * size + lora, gradients=lora, adam=2 * lora)


def known_config(recipe: Recipe, reference: str) -> dict[str, Any] | None:
    """config.json of the model behind a reference; None where it is not here yet or not counted."""
    base = origin(recipe, reference)
    if isinstance(base, BootstrapStage | UpcycleStage):
        return None  # a bootstrap's vocabulary is made with the tokenizer; an upcycled model is counted when it is made
    try:
        config = read_config(base)
        return config if config and count_parameters(config) else None
    except ValueError:
        return None


# --- what follows from the settings -------------------------------------------------------------------------------


def _arithmetic(recipe: Recipe, stage: AnyStage) -> dict[str, str]:
    if isinstance(stage, BootstrapStage):
        return {"corpus": f"at most {_count(stage.max_steps * stage.batch_tokens)} tokens in {stage.minutes:g} minutes"}
    if isinstance(stage, UpcycleStage):
        return {"experts": f"{stage.experts} in every {stage.every} layers"}
    if isinstance(stage, JudgeFilterStage):
        return _judging(stage)
    if isinstance(stage, SftStage):
        step = f"{stage.train.batch_examples} examples, {_count(_batch_tokens(stage))} tokens at most"
        return {"optimiser step": step}
    if isinstance(stage, DpoStage):
        step = f"{stage.train.batch_examples} pairs, {_count(2 * _batch_tokens(stage))} tokens at most"
        return {"pairs": f"at most {_count(stage.max_pairs)}", "optimiser step": step}
    if isinstance(stage, EvaluateStage):
        return _evaluating(stage)
    return online_arithmetic(stage) | _cache_needed(recipe, stage)


def _batch_tokens(stage: SftStage | DpoStage) -> int:
    return stage.train.batch_examples * stage.train.max_tokens


def _judging(stage: JudgeFilterStage) -> dict[str, str]:
    prompts = num_tasks(stage.examples)
    kept = f"at most {_count(int(prompts * stage.keep_at_most))}" if prompts else f"at most {stage.keep_at_most:.0%}"
    return {"prompts judged": _count(prompts) if prompts else "as many as the data set holds", "prompts kept": kept}


def _evaluating(stage: EvaluateStage) -> dict[str, str]:
    tasks = num_tasks(stage.tasks)
    if tasks is None:
        return {"answers": f"{len(stage.policies)} policies × every held-out task × {stage.samples}"}
    answers = len(stage.policies) * tasks * stage.samples
    return {
        "answers": f"{len(stage.policies)} policies × {tasks} tasks × {stage.samples} = {_count(answers)}",
        "tokens": f"at most {_count(answers * stage.max_answer_tokens)}",
    }


def num_tasks(source: TaskSource) -> int | None:
    """Most tasks a source gives; None where only the data set itself knows."""
    if isinstance(source, GeneratedTasks):
        return len(source.domains) * (source.levels[1] - source.levels[0] + 1) * source.tasks_per_level
    return source.limit


def online_arithmetic(stage: OnlineRlStage) -> dict[str, str]:
    """Rollouts, tokens, and what follows from groups_per_step, max_staleness and sync_every_steps: `rl.controller`."""
    bounds = Bounds(stage.groups_per_step, stage.max_staleness, stage.sync_every_steps)
    curriculum = stage.curriculum
    rollouts = stage.groups_per_step * stage.group_size  # the knapsack spends no more
    turns = curriculum.turns
    more = f", and up to {turns - 1} more tasks in the place of a group without signal" if turns > 1 else ""
    if more and curriculum.min_groups is not None:
        more += f" while a step keeps fewer than {curriculum.min_groups}"
    largest = curriculum.largest_group if curriculum.allocator == "knapsack" else stage.group_size
    bound = f"no trained token is more than {stage.max_staleness} version(s) older than the learner"
    synchronous = "0: every token comes from the policy that is stepped (synchronous)"
    return {
        "rollouts per step": f"{stage.groups_per_step} groups × {stage.group_size} answers = {_count(rollouts)}{more}",
        "curriculum": f"{curriculum.sampler}, gate {curriculum.gate}, groups {curriculum.allocator}",
        "band": band_in_words(stage.group_size, curriculum.band),
        "set aside": set_aside_in_words(curriculum.retire_above, curriculum.park_below)
        if curriculum.sampler != "uniform"
        else "nothing is: the sampler is uniform",
        "tokens per step": f"at most {_count(turns * rollouts * stage.max_answer_tokens)} generated",
        "whole stage": f"{stage.steps} steps, at most {_count(stage.steps * turns * rollouts)} rollouts, "
        f"{_count(stage.steps * turns * rollouts * stage.max_answer_tokens)} tokens",
        "staleness bound": bound if stage.max_staleness else synchronous,
        "in flight": f"at most {bounds.groups} groups, {_count(bounds.groups * largest)} rollouts",
    }


def _cache_needed(recipe: Recipe, stage: OnlineRlStage) -> dict[str, str]:
    config = known_config(recipe, stage.policy)
    if config is None:
        return {}
    engine = EngineSettings(checkpoint=stage.policy)
    token = kv_bytes_per_token(config, BYTES[stage.dtype])
    fits = round(engine.kv_cache_gib * GIB) // token
    sequences = fits // min(LONGEST_TOKENS, max_positions(recipe, stage.policy) or LONGEST_TOKENS)
    return {"KV cache": f"{_bytes(token)} a token: room for {_count(fits)} tokens, {_count(sequences)} full sequences"}


# --- tables -------------------------------------------------------------------------------------------------------

STATE_STYLES = {"cached": "green", "runs": "cyan", "stale": "yellow", "left out": "dim"}
STATE_WORDS = {"cached": "cached", "runs": "will run", "stale": "stale, will run", "left out": "left out"}


def render(plan: Plan) -> RenderableType:
    """The plan as tables for a terminal."""
    to_run = sum(stage.state in ("runs", "stale") for stage in plan.stages)
    cached = sum(stage.state == "cached" for stage in plan.stages)
    parts: list[RenderableType] = [
        Text(f"{plan.run_dir}: {to_run} to run, {cached} cached, of {len(plan.stages)} stages"),
        _actor_table(plan),
        _memory_table(plan),
        _arithmetic_table(plan),
    ]
    if plan.cpus_needed > plan.cpus_here:
        note = f"The actors ask for {plan.cpus_needed:g} CPUs and this machine has {plan.cpus_here}: they will share."
        parts.append(Text(note, style="yellow"))
    return Group(*parts)


def _actor_table(plan: Plan) -> Table:
    table = _table("stages and actors", "kind", "state", "actors", numbers=("CPUs each", "GPUs each"))
    for stage in plan.stages:
        cells: list[str | Text] = [
            stage.name,
            stage.kind,
            Text(STATE_WORDS[stage.state], style=STATE_STYLES[stage.state]),
        ]
        for actor in stage.actors:
            table.add_row(*cells, f"{actor.count} × {actor.name}", f"{actor.cpus:g}", f"{actor.gpus:g}")
            cells = ["", "", ""]
    return table


def _memory_table(plan: Plan) -> Table:
    numbers = ("weights", "gradients", "Adam", "KV cache", "total")
    table = _table("memory of one actor, beside libraries and activations", "actor", numbers=numbers)
    for stage in plan.stages:
        name = stage.name
        for actor in stage.actors:
            table.add_row(name, actor.name, *_memory(actor))
            name = ""
    return table


def _table(title: str, *words: str, numbers: tuple[str, ...] = ()) -> Table:
    """A table whose first column names stages. Only that one gives way where the terminal is narrow, and only folds."""
    table = Table(title=f"\n{title}", title_justify="left", box=None, pad_edge=False)
    table.add_column("stage", overflow="fold")
    for heading in words:
        table.add_column(heading, no_wrap=True)
    for heading in numbers:
        table.add_column(heading, no_wrap=True, justify="right")
    return table


def _memory(actor: ActorPlan) -> list[str]:
    memory = actor.memory
    if memory is None:
        return ["?", "", "", "", "?"]
    return [_bytes(size) for size in (memory.weights, memory.gradients, memory.adam, memory.kv_cache, memory.total)]


def _arithmetic_table(plan: Plan) -> Table:
    table = _table("arithmetic", "quantity")
    table.add_column("value", overflow="fold")
    for stage in plan.stages:
        name = stage.name
        for quantity, value in stage.arithmetic.items():
            table.add_row(name, quantity, value)
            name = ""
    return table


def _count(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def _bytes(size: float) -> str:
    """Binary units: 1 KiB is 1024 bytes."""
    if size == 0:
        return "–"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")
