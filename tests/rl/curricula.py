"""Curricula for tests: the rules of a recipe with its defaults, some of them changed."""

from rl.curriculum import GATES, SAMPLERS, Curriculum, CurriculumRules
from rl.difficulty import DifficultyRules, Entries

DIFFICULTY = dict(
    decay=0.9, judge_strength=4.0, neighbour_strength=8.0, retire_above=None, park_below=None, retest_every=20,
    retest_rise=0.1, ordered_levels=False,
)  # fmt: skip
RULES = dict(
    band=(0.25, 0.75), group_size=16, explore_share=0.0, max_resamples=3, allocator="fixed", largest_group=64, screen=4,
    rare_answers=4.0, domain_floor=0.0,
)  # fmt: skip


def rules(**changes) -> CurriculumRules:
    difficulty = DIFFICULTY | {name: changes.pop(name) for name in list(changes) if name in DIFFICULTY}
    return CurriculumRules(**RULES | changes, difficulty=DifficultyRules(**difficulty))


def levels(domains=("maths", "code"), count=5) -> dict[str, tuple[str, int]]:
    return {f"{domain}/{level}": (domain, level) for domain in domains for level in range(1, count + 1)}


def prompts(count, domains=("maths", "code"), num_levels=3) -> dict[str, tuple[str, int]]:
    return {f"p{i}": (domains[i % len(domains)], 1 + i // len(domains) % num_levels) for i in range(count)}


def curriculum(
    cells=None, *, sampler="thompson", gate="none", endless=None, judged=None, seed=1, renewal=None, **changes
) -> Curriculum:
    endless = cells is None if endless is None else endless
    entries = Entries(cells or levels(), endless=endless, judged=judged)
    some = rules(**changes)
    return Curriculum(entries, some, SAMPLERS[sampler](some), GATES[gate](some), seed, renewal)
