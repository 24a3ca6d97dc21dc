"""The dpo stage: a light preference pass on the corner cases that RL left, by TRL's DPOTrainer with a LoRA.

Called by the runner. Promises: the very token ids that the engine sampled are compared; before the first step the loss
is ln 2, since the reference is the policy with its adapter off; the merged checkpoint has the policy's keys and shapes.
"""

from __future__ import annotations

import math
import random
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from pipeline.config import DpoStage, LoraSettings, TrainSettings
from pipeline.data import as_dataset
from pipeline.errors import DataError, RecipeError
from pipeline.mine_pairs import MinedPairs, Pair, mine_pairs
from pipeline.stage import StageContext
from pipeline.trainer_actor import (
    Reporter,
    deadline_s,
    stored_dtype,
    train_in_actor,
    trainer_arguments,
    unchanged_config,
    use_our_logprobs,
)

ROLLOUT_COLUMNS = [
    "task_id", "domain", "level", "group_id", "step", "prompt_ids", "answer_ids", "text", "score", "reason",
    "finish_reason",
]  # fmt: skip
LN2 = math.log(2.0)  # -log sigmoid(0)
LN2_TOLERANCE = 1e-3
NUM_MEASURED_PAIRS = 32  # measured before and after training; measuring all would cost as much as an epoch
PASSES_PER_TOKEN = 2  # the policy with gradients, and the reference without
FROZEN = {"router", "lm_head", "experts"}  # a moved router sends tokens elsewhere; a routed expert sees few of them


@dataclass(frozen=True, slots=True, kw_only=True)
class DpoJob:
    """What the trainer actor needs; crosses a process border."""

    stage: str  # its name, for messages
    checkpoint: Path  # a Hugging Face directory: the policy to start from, and the reference
    pairs: Path  # pairs.parquet
    work: Path  # gets checkpoint/, losses.jsonl and the progress file
    beta: float
    lora: LoraSettings
    train: TrainSettings
    seed: int


def run(context: StageContext) -> dict[str, Any]:
    """Mine pairs from `rollouts` and train `policy` on them; leaves pairs.parquet, checkpoint/ and losses.jsonl."""
    stage = context.stage
    assert isinstance(stage, DpoStage)
    rollouts = context.inputs[stage.rollouts] / "rollouts.parquet"
    mined = mine_pairs(
        read_rollouts(rollouts),
        last_steps=stage.last_steps,
        max_length_ratio=stage.max_length_ratio,
        max_tokens=stage.train.max_tokens,
        max_pairs=stage.max_pairs,
    )
    counts = pair_counts(mined)
    if not mined.pairs and stage.when_no_pairs == "keep_policy":
        context.emit("note", text=f"no pair in {mined.num_groups} groups ({mined.dropped}): policy unchanged")
        shutil.copytree(context.checkpoint(stage.policy), context.work / "checkpoint")
        return counts | {"tokens_trained": 0}
    if not mined.pairs:
        raise DataError(
            f"{rollouts}: {mined.num_groups} groups in the last {stage.last_steps} steps and no pair among them "
            f"(groups by reason: {mined.dropped}; ungraded answers: {mined.num_ungraded}); raise stages.{stage.name}."
            f"last_steps, .max_length_ratio or .train.max_tokens, or stages.{stage.rollouts}.group_size, or "
            f"set stages.{stage.name}.when_no_pairs=keep_policy"
        )
    pairs_file = context.work / "pairs.parquet"
    write_pairs(pairs_file, mined.pairs)
    context.emit("note", text=f"{len(mined.pairs)} pairs from {mined.num_groups} groups: {counts['pairs_by_category']}")
    job = DpoJob(
        stage=stage.name,
        checkpoint=context.checkpoint(stage.policy),
        pairs=pairs_file,
        work=context.work,
        beta=stage.beta,
        lora=stage.lora,
        train=stage.train,
        seed=context.seed,
    )
    num_tokens = sum(2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) for pair in mined.pairs)
    deadline = deadline_s(PASSES_PER_TOKEN * num_tokens * (stage.train.epochs + 1))
    return counts | train_in_actor(context, DpoTrainerActor, job, deadline)


def read_rollouts(path: Path) -> list[dict[str, Any]]:
    """Rows of rollouts.parquet with the columns that mining needs. Raises DataError."""
    import pyarrow
    import pyarrow.parquet

    try:
        present = pyarrow.parquet.read_schema(path).names
        if missing := [column for column in ROLLOUT_COLUMNS if column not in present]:
            raise DataError(f"{path}: wanted column {missing[0]!r}, found {', '.join(present)}")
        return pyarrow.parquet.read_table(path, columns=ROLLOUT_COLUMNS).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: not a readable parquet file ({error})") from error


def write_pairs(path: Path, pairs: list[Pair]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([asdict(pair) for pair in pairs]), path)


def read_pairs(path: Path) -> list[Pair]:
    import pyarrow.parquet

    return [Pair(**row) for row in pyarrow.parquet.read_table(path).to_pylist()]


def pair_counts(mined: MinedPairs) -> dict[str, Any]:
    """What was mined and what was not, for the manifest."""
    return {
        "num_pairs": len(mined.pairs),
        "num_groups": mined.num_groups,
        "pairs_by_category": dict(Counter(pair.category for pair in mined.pairs)),
        "pairs_by_domain": dict(Counter(pair.domain for pair in mined.pairs)),
        "groups_dropped": mined.dropped,
        "ungraded_answers": mined.num_ungraded,
    }


class DpoTrainerActor:
    """Loads, trains, merges and saves; built by `pipeline/cluster` in an actor, or directly in a test."""

    def __init__(self, job: DpoJob) -> None:
        self.job = job

    def train(self) -> dict[str, Any]:
        """The whole stage behind the mining; returns its metrics. Raises RecipeError, RuntimeError."""
        started_at = time.monotonic()
        from model.checkpoint import load_policy, save_policy
        from model.tokenizer import load_tokenizer

        job = self.job
        pairs = read_pairs(job.pairs)
        reporter = Reporter(job.work)
        tokenizer = load_tokenizer(job.checkpoint)
        model = load_policy(job.checkpoint, "float32")
        loaded_at = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch, unchanged_config(model):
            trainer = dpo_trainer(model, tokenizer, pairs, job, reporter, scratch)
            measured = as_dataset(_columns(random.Random(job.seed).sample(pairs, min(len(pairs), NUM_MEASURED_PAIRS))))
            before = trainer.evaluate(measured)
            check_reference(before)
            trainer.train()
            after = trainer.evaluate(measured)
            merged = trainer.model.merge_and_unload(safe_merge=True)
        trained_at = time.monotonic()
        save_policy(merged.to(stored_dtype(job.checkpoint)), tokenizer, job.work / "checkpoint")
        return {
            "num_steps": len(reporter.losses),
            "first_loss": reporter.losses[0],
            "last_loss": reporter.losses[-1],
            **preference_metrics(before, after, job.beta),
            "length_delta": fmean(len(pair.chosen_ids) - len(pair.rejected_ids) for pair in pairs),
            "tokens_trained": int(sum(len(p.chosen_ids) + len(p.rejected_ids) for p in pairs) * job.train.epochs),
            "tokens_processed": reporter.tokens,
            "load_s": round(loaded_at - started_at, 2),
            "train_s": round(trained_at - loaded_at, 2),
            "seconds": round(time.monotonic() - started_at, 2),
        }


def check_reference(before: dict[str, float]) -> None:
    """Before the first step policy and reference are one model: the loss is ln 2. Anything else means that the
    adapter is on in the reference, or that the two see different tokens."""
    if abs(before["eval_loss"] - LN2) >= LN2_TOLERANCE:
        raise RuntimeError(
            f"DPO loss before the first step is {before['eval_loss']:.6f}, not ln 2 = {LN2:.6f}: "
            "policy and reference differ"
        )


def preference_metrics(before: dict[str, float], after: dict[str, float], beta: float) -> dict[str, float]:
    """What training did to the measured pairs. Drift is natural-log, summed over an answer's tokens; a falling chosen
    log-probability is DPO's usual failure, so it stands beside the rejected one."""
    return {
        "loss_before": before["eval_loss"],
        "loss_after": after["eval_loss"],
        "chosen_logprob_drift": after["eval_rewards/chosen"] / beta,
        "rejected_logprob_drift": after["eval_rewards/rejected"] / beta,
        "margin": after["eval_rewards/margins"],
        "accuracy": after["eval_rewards/accuracies"],
    }


def dpo_trainer(model: Any, tokenizer: Any, pairs: list[Pair], job: DpoJob, reporter: Reporter, scratch: str) -> Any:
    """TRL's trainer on the sampled token ids, with a LoRA on the layers that `lora.targets` names. Routers are frozen
    but read what the LoRA moves, so they are watched as in the sft stage."""
    import torch
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.utils import FusedCausalLMOutput

    from model.router import Route
    from model.router_watch import RoutedBatch, RouterWatch

    class TokenDpoTrainer(DPOTrainer):
        routers: RouterWatch

        def _prepare_dataset(self, dataset: Any, *unused: Any) -> Any:
            return dataset  # TRL would decode and encode; its collator takes the ids as they are

        def get_batch_samples(self, *args: Any) -> tuple[list[Any], Any]:
            """All micro-batches of an optimiser step."""
            batches, num_items = super().get_batch_samples(*args)
            if batches:
                self.routers.begin_step([RoutedBatch(b["input_ids"], b["attention_mask"]) for b in batches])
            return batches, num_items

        def count(self, routes: tuple[Route, ...]) -> None:
            """The reference and the measured pairs pass through the same model, but without gradients."""
            if torch.is_grad_enabled():
                self.routers.loss(routes)  # of routers that do not learn: it only counts

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            if "loss" in logs:
                logs |= self.routers.end_step()
            super().log(logs, start_time)
            reporter.step(self.state.global_step, self.state.max_steps, logs)

    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=job.lora.rank,
        lora_alpha=job.lora.alpha,
        lora_dropout=0.0,
        target_modules=lora_layers(model, job.lora.targets, f"stages.{job.stage}.lora.targets"),
    )
    trainer = TokenDpoTrainer(
        model=model,
        args=DPOConfig(**trainer_arguments(job.train, len(pairs), job.seed, scratch), beta=job.beta),
        train_dataset=as_dataset(_columns(pairs)),
        processing_class=tokenizer,
        peft_config=lora,
    )
    policy = trainer.model.get_base_model()  # with the LoRA in its layers, whose first state drift is measured from
    trainer.routers = RouterWatch(policy, balance_coef=0.0, z_coef=0.0, autocast=trainer.accelerator.autocast)
    use_our_logprobs(policy, FusedCausalLMOutput, trainer.count)
    return trainer


def lora_layers(model: Any, targets: list[str], key: str) -> list[str]:
    """Full names of the linear layers whose last name is a target: attention, dense MLP and shared expert. Router, head
    and routed experts stay as they are. Raises RecipeError, naming `key`, for a target that names no layer."""
    from torch import nn

    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    free = [name for name in linear if not FROZEN & set(name.split("."))]
    known = {name.rpartition(".")[2] for name in free}
    for target in targets:
        if target not in known:
            raise RecipeError(f"{key}: {target!r} names no layer that may be adapted; use some of {sorted(known)}")
    return [name for name in free if name.rpartition(".")[2] in targets]


def _columns(pairs: list[Pair]) -> list[dict[str, list[int]]]:
    """The columns that TRL's preference collator reads."""
    return [
        {"prompt_ids": pair.prompt_ids, "chosen_ids": pair.chosen_ids, "rejected_ids": pair.rejected_ids}
        for pair in pairs
    ]
