"""What tasks stage 2 is drawn from, and the curriculum over them, as a recipe names both.

Called by `pipeline/online_rl.py`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline import own_class
from pipeline.config import DatasetTasks, EvaluateStage, GeneratedTasks, OnlineRlStage, TaskSource
from pipeline.data import load_tasks
from pipeline.errors import DataError
from pipeline.stage import StageContext
from rewards.task import UNKNOWN_LEVEL, Task
from rl.band import reachable_band
from rl.curriculum import GATES, SAMPLERS, Curriculum, CurriculumRules
from rl.difficulty import DifficultyRules, Entries
from rl.renewal import Renewal, RenewalRules

HARDEST, EASIEST = 5.0, 1.0  # a judge's scores: `judges/verdict.py`
CLASS_PROMPTS = 20  # at least, of a class by length
TURN_SEEDS = 2**64  # generated tasks of a slot's turns are that far apart: further than slots of any run
REDRAW_SEEDS = 2**96  # and those drawn in the place of one that does not fit, further than turns
PROBES, REDRAWS = 8, 256  # a level is left out where fewer than half of so many tasks fit; then one of so many does


@dataclass(frozen=True, kw_only=True)
class Pool:
    """What tasks are drawn from."""

    cells: dict[str, tuple[str, int]]  # the curriculum's entry → (domain, level)
    task_of: Callable[[str, int, int], Task]  # (entry, slot, turn) → task
    tasks: dict[str, Task] = field(default_factory=dict)  # entry → its task, where it has but one
    num_too_long: int = 0  # tasks left out; of generated ones, levels

    @property
    def endless(self) -> bool:
        return not self.tasks


def task_pool(source: TaskSource, seed: int, fits: Callable[[Task], bool]) -> Pool:
    """Generated tasks: an entry is a (domain, level) and never runs dry. A data set: an entry is one prompt that fits;
    DataError where a task_id stands for two."""
    if isinstance(source, DatasetTasks):
        tasks: dict[str, Task] = {}
        for task in load_tasks(source, seed):
            if tasks.setdefault(task.task_id, task).prompt != task.prompt:
                raise DataError(f"{source.dataset}: task_id {task.task_id!r} stands for two prompts; give each its own")
        kept = {name: task for name, task in tasks.items() if fits(task)}
        return Pool(
            cells={name: (task.domain, task.level) for name, task in kept.items()},
            task_of=lambda entry, slot, turn: kept[entry],
            tasks=kept,
            num_too_long=len(tasks) - len(kept),
        )
    assert isinstance(source, GeneratedTasks)
    from rewards.domains import generate

    levels = range(source.levels[0], source.levels[1] + 1)
    cells = {f"{domain}/{level}": (str(domain), level) for domain in source.domains for level in levels}

    def draws(entry: str, first: int, count: int) -> Iterator[Task]:
        domain, level = cells[entry]
        return (generate(domain, level, first + redraw * REDRAW_SEEDS, "train") for redraw in range(count))

    def task_of(entry: str, slot: int, turn: int) -> Task:
        first = seed * 1_000_003 + slot + turn * TURN_SEEDS
        task = next(filter(fits, draws(entry, first, REDRAWS)), None)
        if task is None:
            raise DataError(f"{entry}: none of {REDRAWS} tasks leaves room for an answer; lower max_answer_tokens")
        return task

    fitting = {
        name: cell for name, cell in cells.items()
        if 2 * sum(map(fits, draws(name, seed * 1_000_003, PROBES))) >= PROBES
    }  # fmt: skip
    return Pool(cells=fitting, task_of=task_of, num_too_long=len(cells) - len(fitting))


def curriculum_of(
    stage: OnlineRlStage, pool: Pool, context: StageContext, fits: Callable[[Task], bool]
) -> Curriculum:  # fmt: skip
    rules, settings = curriculum_rules(stage), stage.curriculum
    domains = len({domain for domain, _ in pool.cells.values()})
    if settings.domain_floor * domains > 1.0:  # of generated tasks `validate` knows it
        raise DataError(
            f"stages.{stage.name}.curriculum.domain_floor: {settings.domain_floor} for each of the data set's "
            f"{domains} domains is more than there is; write at most {math.floor(1000 / domains) / 1000:g}"
        )
    judged = judged_rates(pool, context.inputs[settings.judge] / "verdicts.parquet") if settings.judge else None
    entries = Entries(cells_of(pool, settings.length_classes), endless=pool.endless, judged=judged)
    sampler = SAMPLERS.get(settings.sampler) or own_class.load(settings.sampler)
    gate = GATES.get(settings.gate) or own_class.load(settings.gate)
    renewal = None
    if settings.renew is not None:
        how = settings.renew
        renewal_rules = RenewalRules(
            every=how.every_steps, prompts=how.prompts, share=how.synthetic_share, sources=tuple(how.sources),
            band=rules.band,
        )  # fmt: skip
        renewal = Renewal(renewal_rules, pool.tasks, held_out_prompts(context), fits, context.seed)
    return Curriculum(entries, rules, sampler(rules), gate(rules), context.seed, renewal)


def cells_of(pool: Pool, length_classes: int) -> dict[str, tuple[str, int]]:
    """The pool's cells, those of prompts of unknown level divided by length: what can be learnt from is often found
    among prompts of a length. Each domain's classes are as large as each other, level -1 the shortest."""
    cells, unknown = dict(pool.cells), defaultdict(list)
    for name, (domain, level) in pool.cells.items():
        if name in pool.tasks and level == UNKNOWN_LEVEL:
            unknown[domain].append(name)
    for domain, names in unknown.items():
        count = min(length_classes, len(names) // CLASS_PROMPTS)
        if count > 1:
            lengths = [len(pool.tasks[name].prompt) for name in names]
            edges = np.quantile(lengths, np.arange(1, count) / count)
            classes = np.searchsorted(edges, lengths, side="right").tolist()
            cells |= {name: (domain, -1 - found) for name, found in zip(names, classes)}
    return cells


def held_out_prompts(context: StageContext) -> Iterator[str]:
    """Of every set that this recipe evaluates on; of a data set all, however few of its tasks an evaluation takes."""
    for stage in context.recipe.stages:
        if isinstance(stage, EvaluateStage):
            whole = stage.tasks
            if isinstance(whole, DatasetTasks):
                whole = whole.model_copy(update={"limit": None})
            yield from (task.prompt for task in load_tasks(whole, context.seed))


def curriculum_rules(stage: OnlineRlStage) -> CurriculumRules:
    settings = stage.curriculum
    sets_aside = settings.sampler != "uniform"  # the control arm knows no difficulty
    difficulty = DifficultyRules(
        decay=settings.decay,
        judge_strength=settings.judge_strength,
        neighbour_strength=settings.neighbour_strength,
        retire_above=settings.retire_above if sets_aside else None,
        park_below=settings.park_below if sets_aside else None,
        retest_every=settings.retest_every_steps,
        retest_rise=settings.retest_rise,
        ordered_levels=settings.ordered_levels,
    )
    return CurriculumRules(
        band=reachable_band(stage.group_size, settings.band),
        group_size=stage.group_size,
        smallest_group=stage.objective.pass_at_k + 1,
        explore_share=settings.explore_share,
        prefix_share=settings.prefix_share,
        max_resamples=settings.max_resamples,
        min_groups=settings.min_groups,
        allocator=settings.allocator,
        largest_group=settings.largest_group,
        screen=settings.screen,
        rare_answers=settings.rare_answers,
        domain_floor=settings.domain_floor,
        domain_turns=settings.domain_turns,
        difficulty=difficulty,
    )


def judged_rates(pool: Pool, verdicts: Path) -> dict[str, float]:
    """Entry → pass rate that its judged difficulty stands for: 1 at the easiest score, 0 at the hardest. A prompt has
    its own score, else, like a level of generated tasks, the mean of what was judged of its domain and level. Only the
    order is to be trusted; what is measured corrects the rest."""
    import pyarrow.parquet as pq

    rows = pq.read_table(verdicts, columns=["domain", "level", "prompt", "score"]).to_pylist()
    rates = {row["prompt"]: (HARDEST - row["score"]) / (HARDEST - EASIEST) for row in rows if row["score"] is not None}
    by_cell: dict[tuple[str, int], list[float]] = defaultdict(list)
    for row in rows:
        if row["prompt"] in rates:
            by_cell[row["domain"], row["level"]].append(rates[row["prompt"]])
    means = {cell: sum(some) / len(some) for cell, some in by_cell.items()}
    own = {name: rates[task.prompt] for name, task in pool.tasks.items() if task.prompt in rates}
    found = {name: own.get(name, means.get(cell)) for name, cell in pool.cells.items()}
    return {name: rate for name, rate in found.items() if rate is not None}
