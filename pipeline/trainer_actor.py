"""What the two TRL stages share: a training job in an actor of its own, and a driver that follows it.

    driver (never imports torch)                      actor
    train_in_actor ── start ────────────────────────▶ SftTrainerActor(job) / DpoTrainerActor(job)
        │ awaits train(), until the deadline            │ train(): load, TRL, save
        │ reads `progress.jsonl` every half second  ◀── Reporter appends a line per event
        └─▶ context.emit

Called by `pipeline/sft.py` and `pipeline/dpo.py`, by `pipeline/bootstrap.py` for the actor alone. An actor that was
given a GPU trains on it (not measured on a GPU). Promises: the progress file is gone when the stage returns, and no
wait outlasts `deadline_s`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import math
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from model.precision import Fp8Settings
from pipeline.config import Fp8Section, TrainSettings
from pipeline.stage import StageContext

PROGRESS_FILE = "progress.jsonl"
POLL_S = 0.5
START_S = 300.0  # imports, loading, saving: seconds on an idle laptop, minutes on a cold network disk
SLOWEST_TOKENS_PER_S = 20.0  # a 135M model on one contended core makes 140; below this something hangs
NUM_THREADS = 2
FUSED_INPUTS = {"input_ids", "labels", "attention_mask", "num_items_in_batch", "use_cache", "return_dict"}


def deadline_s(num_tokens: float) -> float:
    """Longest wait for a job that passes `num_tokens` tokens forward and backward."""
    return START_S + num_tokens / SLOWEST_TOKENS_PER_S


def train_in_actor(context: StageContext, actor_class: type, job: Any, deadline: float) -> dict[str, Any]:
    """Run `actor_class(job).train()` in an actor and hand on its events; returns what `train` returned."""
    actor = context.cluster.start(f"{context.stage.name}-trainer", actor_class, job, num_threads=NUM_THREADS)
    progress_file = job.work / PROGRESS_FILE
    try:
        return asyncio.run(_follow(context, actor, progress_file, deadline))
    finally:
        context.cluster.stop(actor)
        progress_file.unlink(missing_ok=True)


async def _follow(context: StageContext, actor: Any, progress_file: Path, deadline: float) -> dict[str, Any]:
    """Ends with the actor's answer, its error, or the deadline that `call_async` keeps."""
    training = asyncio.create_task(actor.call_async("train", timeout_s=deadline), name="train")
    offset = 0
    while not training.done():
        await asyncio.wait([training], timeout=POLL_S)
        offset = _forward_events(context, progress_file, offset)
    return training.result()


def _forward_events(context: StageContext, progress_file: Path, offset: int) -> int:
    """Emit the whole lines behind `offset`; returns where the next unread line begins."""
    if not progress_file.exists():
        return offset
    with progress_file.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                break  # still being written
            offset += len(line)
            context.emit(**json.loads(line))
    return offset


class Reporter:
    """The actor's side: appends events for the driver, and one line of `losses.jsonl` per optimiser step."""

    def __init__(self, work: Path) -> None:
        self.progress_file = work / PROGRESS_FILE
        self.losses_file = work / "losses.jsonl"
        self.losses: list[float] = []
        self.tokens = 0  # prompt and answer tokens that went through the model, as TRL counts them

    def note(self, text: str) -> None:
        self._append(self.progress_file, {"event": "note", "text": text})

    def step(self, step: int, num_steps: int, logs: dict[str, float]) -> None:
        """Take what a TRL trainer logs. Its last line sums the training up and has no `loss`: not a step."""
        if "loss" not in logs:
            return
        self.losses.append(logs["loss"])
        self.tokens = int(logs["num_tokens"])
        kept = {"step": step, "loss": logs["loss"], "learning_rate": logs["learning_rate"], "tokens": self.tokens}
        extras = {key.replace("/", "_"): value for key, value in logs.items() if key.startswith(("rewards/", "logps/"))}
        gauges = {key: value for key, value in logs.items() if key.startswith(("router/", "fp8/"))}  # as online_rl does
        self._append(self.losses_file, kept | extras | gauges)
        event = {"event": "progress", "done": step, "total": num_steps, "unit": "steps", "loss": round(logs["loss"], 4)}
        self._append(self.progress_file, event)

    @staticmethod
    def _append(path: Path, record: dict[str, Any]) -> None:
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def fp8_settings(section: Fp8Section | None) -> Fp8Settings | None:
    return None if section is None else section.settings()


def num_steps(train: TrainSettings, num_examples: int) -> int:
    """Optimiser steps that transformers' Trainer makes; the last batch of an epoch may be a small one."""
    return math.ceil(train.epochs * math.ceil(num_examples / train.batch_examples))


def trainer_arguments(train: TrainSettings, num_examples: int, seed: int, output_dir: str) -> dict[str, Any]:
    """Keyword arguments that `SFTConfig` and `DPOConfig` have in common."""
    from model.device import own_device

    micro = min(train.micro_batch_examples, train.batch_examples, num_examples)
    return {
        "output_dir": output_dir,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": round(train.warmup_share * num_steps(train, num_examples)),
        "num_train_epochs": train.epochs,
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": micro,
        "gradient_accumulation_steps": max(1, round(train.batch_examples / micro)),
        "max_length": None,  # over-long examples were dropped and counted; none is cut
        "bf16": train.dtype == "bfloat16",  # autocast over float32 weights: small updates are not rounded away
        "gradient_checkpointing": train.activation_checkpointing,
        # TRL's auxiliary loss takes a softmax over router logits that Llama 4 gates by a sigmoid, one micro-batch at a
        # time. Ours is in model/router.py; the sft stage adds it.
        "router_aux_loss_coef": 0.0,
        "seed": seed,
        "data_seed": seed,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "use_cpu": own_device().type == "cpu",  # else accelerate moves the model, and each batch as it is read
    }


def use_our_logprobs(model: Any, output_class: type, on_routes: Callable[[Any], None] | None = None) -> None:
    """Make `model(…, fused_lm_head=True)`, as TRL's trainers call it, answer with the log-probabilities of
    `model/logprobs.py`, which RL trains on too, instead of those of the head that TRL has put on it.

    `model` is the causal LM itself, without PEFT's wrapper; `output_class` is TRL's FusedCausalLMOutput; `on_routes`
    is handed the routes of every such forward pass. Labels are the ids themselves, or IGNORED."""
    from model import logprobs
    from model.transformer import IGNORED

    without_head = model.forward

    @functools.wraps(type(model).forward)  # `generate` and Trainer read the signature
    def forward(_: Any, *args: Any, fused_lm_head: bool = False, **inputs: Any) -> Any:
        if not fused_lm_head:
            return without_head(*args, **inputs)
        asked = {key: value for key, value in inputs.items() if value is not None}
        if args or not asked.keys() <= FUSED_INPUTS:
            raise TypeError(f"TRL calls its fused head with {[*asked]}; ours knows {sorted(FUSED_INPUTS)}")
        wanted_BS = asked["labels"] != IGNORED
        wanted_BS[:, 0] = False  # nothing predicts a first token
        stats, routes = logprobs.token_logprobs(
            model, asked["input_ids"], wanted_BS, attention_mask_BS=asked.get("attention_mask")
        )
        if on_routes is not None:
            on_routes(routes)
        wanted = wanted_BS[:, 1:]
        fields = {"log_probs": stats.logprob_T, "entropy": stats.entropy_T, "mean_logits": stats.mean_logit_T,
                  "is_top1": stats.is_top1_T}  # fmt: skip
        spread = {name: x_T.new_zeros(wanted.shape).masked_scatter(wanted, x_T) for name, x_T in fields.items()}
        loss = -stats.logprob_T.sum() / asked.get("num_items_in_batch", wanted.sum().clamp(min=1))
        return output_class(loss=loss, label_mask=wanted, **spread)

    model.forward = types.MethodType(forward, model)


@contextlib.contextmanager
def unchanged_config(model: Any) -> Iterator[None]:
    """TRL writes a pad token and `use_cache` into the model's configs. The checkpoint we save describes the model that
    was loaded, else no engine would recognise it as the same architecture."""
    configs = [config for config in (model.config, model.generation_config) if config is not None]
    before = [dict(vars(config)) for config in configs]
    try:
        yield
    finally:
        for config, values in zip(configs, before, strict=True):
            vars(config).update(values)


def stored_dtype(checkpoint: Path) -> Any:
    """The torch.dtype that a checkpoint's weights are stored in; float32 where its config.json names none."""
    import torch

    config = json.loads((checkpoint / "config.json").read_text())
    return getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")
