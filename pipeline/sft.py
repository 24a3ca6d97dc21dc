"""The sft stage: a light supervised pass over the kept examples, by TRL's SFTTrainer.

Called by the runner. Promises: the loss falls on the answer's tokens and the end of the turn, on nothing else; what is
too long is dropped and counted, never cut.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from model.precision import Fp8Settings
from pipeline.config import RouterSettings, SftStage, TrainSettings
from pipeline.data import Example, as_dataset, read_examples
from pipeline.errors import DataError
from pipeline.stage import StageContext
from pipeline.trainer_actor import (
    Reporter,
    deadline_s,
    fp8_settings,
    stored_dtype,
    train_in_actor,
    trainer_arguments,
    unchanged_config,
    use_our_logprobs,
)

NOT_TRAINED = -100  # torch's cross entropy skips this label
SHOWN_CHARACTERS = 600  # of the sample that is printed


@dataclass(frozen=True, slots=True, kw_only=True)
class SftJob:
    """What the trainer actor needs; crosses a process border."""

    stage: str  # its name, for messages
    checkpoint: Path  # a Hugging Face directory
    kept: Path  # kept.jsonl of judge_filter
    work: Path  # gets checkpoint/, losses.jsonl and the progress file
    train: TrainSettings
    router: RouterSettings
    seed: int
    fp8: Fp8Settings | None = None


def run(context: StageContext) -> dict[str, Any]:
    """Train `init` on the kept examples of `examples`; leaves checkpoint/ and losses.jsonl."""
    stage = context.stage
    assert isinstance(stage, SftStage)
    kept = context.inputs[stage.examples] / "kept.jsonl"
    num_examples = len(read_examples(kept))
    if num_examples == 0:
        raise DataError(f"{kept}: no example; raise stages.{stage.examples}.keep_at_most, or give it more examples")
    job = SftJob(
        stage=stage.name,
        checkpoint=context.checkpoint(stage.init),
        kept=kept,
        work=context.work,
        train=stage.train,
        router=stage.router,
        seed=context.seed,
        fp8=fp8_settings(stage.fp8),
    )
    deadline = deadline_s(num_examples * stage.train.max_tokens * stage.train.epochs)
    return train_in_actor(context, SftTrainerActor, job, deadline)


class SftTrainerActor:
    """Loads, trains and saves; built by `pipeline/cluster` in an actor, or directly in a test."""

    def __init__(self, job: SftJob) -> None:
        self.job = job

    def train(self) -> dict[str, Any]:
        """The whole stage; returns its metrics. Raises DataError."""
        started_at = time.monotonic()
        from model.checkpoint import load_policy, save_policy
        from model.tokenizer import load_tokenizer

        job = self.job
        tokenizer = load_tokenizer(job.checkpoint)
        rows, num_too_long = encode_examples(tokenizer, read_examples(job.kept), job.train.max_tokens)
        if not rows:
            raise DataError(
                f"{job.kept}: all {num_too_long} examples are longer than {job.train.max_tokens} tokens; "
                f"raise stages.{job.stage}.train.max_tokens"
            )
        reporter = Reporter(job.work)
        reporter.note(f"one masked sample, trained tokens in «»: {show_masked(tokenizer, rows[0])}")

        model = load_policy(job.checkpoint, "float32")
        loaded_at = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch, unchanged_config(model):
            sft_trainer(model, tokenizer, rows, job, reporter, scratch).train()
        trained_at = time.monotonic()
        save_policy(model.to(stored_dtype(job.checkpoint)), tokenizer, job.work / "checkpoint")

        num_answer_tokens = sum(label != NOT_TRAINED for row in rows for label in row["labels"])
        return {
            "num_examples": len(rows),
            "dropped": {"too_long": num_too_long},
            "num_steps": len(reporter.losses),
            "first_loss": reporter.losses[0],
            "last_loss": reporter.losses[-1],
            "tokens_trained": int(num_answer_tokens * job.train.epochs),
            "tokens_processed": reporter.tokens,
            "load_s": round(loaded_at - started_at, 2),
            "train_s": round(trained_at - loaded_at, 2),
            "seconds": round(time.monotonic() - started_at, 2),
        }


def encode_examples(
    tokenizer: Any, examples: Iterable[Example], max_tokens: int
) -> tuple[list[dict[str, list[int]]], int]:
    """(rows for TRL, number of examples longer than `max_tokens`).

    A row has `input_ids` and `labels` of the same length; a label is the token itself where it is trained on, else
    NOT_TRAINED. Raises DataError naming the task whose mask would be empty or full.
    """
    from model.tokenizer import encode_example

    rows = []
    num_too_long = 0
    for example in examples:
        try:
            ids, answer_mask = encode_example(tokenizer, example.task.prompt, example.answer)
        except ValueError as error:
            raise DataError(f"example {example.task.task_id}: {error}") from error
        if all(answer_mask) or not any(answer_mask):
            raise DataError(f"example {example.task.task_id}: the mask is {'full' if all(answer_mask) else 'empty'}")
        if len(ids) > max_tokens:
            num_too_long += 1
            continue
        labels = [token if trained else NOT_TRAINED for token, trained in zip(ids, answer_mask, strict=True)]
        rows.append({"input_ids": ids, "labels": labels})
    return rows, num_too_long


def show_masked(tokenizer: Any, row: dict[str, list[int]]) -> str:
    """The decoded row, special tokens and all, with what is trained on between « and »."""
    parts = []
    tokens = zip(row["input_ids"], row["labels"], strict=True)
    for trained, run_of_tokens in groupby(tokens, lambda token: token[1] != NOT_TRAINED):
        text = tokenizer.decode([token for token, _ in run_of_tokens])
        parts.append(f"«{text}»" if trained else text)
    return "".join(parts)[-SHOWN_CHARACTERS:]


def sft_trainer(
    model: Any, tokenizer: Any, rows: list[dict[str, list[int]]], job: SftJob, reporter: Reporter, scratch: str
) -> Any:
    """TRL's trainer on ready token ids: it adds nothing, cuts nothing and computes the loss over `labels`. The routers
    follow `job.router`, their losses taken over all micro-batches of a step; products `job.fp8`."""
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.utils import FusedCausalLMOutput

    from model.fp8_training import Fp8Training
    from model.router import Route, freeze_routers, slow_routers
    from model.router_watch import RoutedBatch, RouterWatch

    class RoutedSftTrainer(SFTTrainer):
        routers: RouterWatch
        routes: tuple[Route, ...] = ()  # of the newest forward pass

        def create_optimizer(self, model: Any = None) -> Any:
            optimizer = super().create_optimizer(model)
            if job.router.policy == "low_lr":
                slow_routers(optimizer, self.model, job.router.learning_rate_scale)
            return optimizer

        def get_batch_samples(self, *args: Any) -> tuple[list[Any], Any]:
            """All micro-batches of an optimiser step."""
            batches, num_items = super().get_batch_samples(*args)
            if batches:
                self.routers.begin_step([RoutedBatch(b["input_ids"], b["attention_mask"]) for b in batches])
            return batches, num_items

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs) + self.routers.loss(self.routes)

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            if "loss" in logs:
                logs |= self.routers.end_step() | (fp8.metrics() if fp8 else {})
            super().log(logs, start_time)
            reporter.step(self.state.global_step, self.state.max_steps, logs)

    if job.router.policy == "frozen":
        freeze_routers(model)
    fp8 = Fp8Training(model, job.fp8, reporter.note) if job.fp8 else None
    arguments = trainer_arguments(job.train, len(rows), job.seed, scratch)
    config = SFTConfig(**arguments, dataset_kwargs={"skip_prepare_dataset": True})
    trainer = RoutedSftTrainer(model=model, args=config, train_dataset=as_dataset(rows), processing_class=tokenizer)
    use_our_logprobs(model, FusedCausalLMOutput, lambda routes: setattr(trainer, "routes", routes))
    trainer.routers = RouterWatch(
        model, balance_coef=job.router.balance_coef, z_coef=job.router.z_coef, autocast=trainer.accelerator.autocast
    )
    return trainer
