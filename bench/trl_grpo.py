"""The peer of `bench/rl_efficiency.py`: TRL's GRPOTrainer on the same checkpoint, tasks and verifiers.

    python bench/trl_grpo.py CHECKPOINT POOL OUT --steps 100 --learning-rate 4e-4 …

POOL is a file of examples, drawn from uniformly. Leaves `steps.jsonl` in OUT, a row a step (tokens generated so far,
seconds so far without start and saving, pass rate), and `checkpoints/step-…`. The model is ours, whose experts are many
times faster than those of transformers, with our log-probabilities; so is whatever TRL leaves to its user. Generation
is transformers' own: TRL's vLLM modes need a GPU.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

LOSSES = ("dapo", "grpo", "dr_grpo", "bnpo", "cispo")


class Clock:
    """Seconds since the beginning, but for those inside `pause`."""

    def __init__(self) -> None:
        self.begin = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self.begin

    def pause(self, work: Any) -> None:
        begin = time.perf_counter()
        work()
        self.begin += time.perf_counter() - begin


def main(
    checkpoint: Annotated[Path, typer.Argument()],
    pool: Annotated[Path, typer.Argument(help="Examples (.jsonl or .jsonl.gz).")],
    out: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
    steps: Annotated[int, typer.Option(help="Batches that are sampled, and optimiser steps.")] = 100,
    learning_rate: Annotated[float, typer.Option()] = 4e-4,
    groups_per_step: Annotated[int, typer.Option()] = 16,
    group_size: Annotated[int, typer.Option()] = 16,
    loss: Annotated[str, typer.Option(help=" | ".join(LOSSES))] = "dapo",
    scale_rewards: Annotated[str, typer.Option(help="group | batch | none")] = "group",
    micro_batch: Annotated[int, typer.Option(help="Answers a forward pass; no effect on the result.")] = 64,
    max_answer_tokens: Annotated[int, typer.Option()] = 160,
    checkpoint_every: Annotated[int, typer.Option(help="Steps.")] = 10,
    seed: Annotated[int, typer.Option()] = 1,
    warmup_steps: Annotated[int, typer.Option(help="Of the learning rate, in updates.")] = 3,
    last_rate_share: Annotated[float, typer.Option(help="Of the rate at the end; it declines as a cosine.")] = 1.0,
    updates_per_step: Annotated[int, typer.Option(help="On each batch: TRL's num_iterations.")] = 1,
    head_rate_scale: Annotated[
        float, typer.Option(help="Of the learning rate, for the head: one of our levers.")
    ] = 1.0,
    threads: Annotated[int, typer.Option(help="Of torch; 1 where another run goes on beside it.")] = 2,
) -> None:
    """Train, and leave checkpoints on the way."""
    import torch
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer.utils import FusedCausalLMOutput

    from model.checkpoint import load_policy, save_policy
    from model.optimizers import make_optimizers
    from model.router import freeze_routers
    from model.tokenizer import load_tokenizer
    from pipeline.data import as_dataset, read_examples
    from pipeline.trainer_actor import unchanged_config, use_our_logprobs
    from rewards.grade import grade
    from rewards.sandbox import Sandbox
    from rewards.task import Score

    torch.set_num_threads(threads)
    tasks = {example.task.task_id: example.task for example in read_examples(pool)}
    tokenizer, model = load_tokenizer(checkpoint), load_policy(checkpoint, "float32")
    freeze_routers(model)  # as our stage's default
    (out / "checkpoints").mkdir(parents=True)
    generated, clock = 0, Clock()
    batch_logs: dict[str, float] = {}  # of the newest batch: TRL logs it with the first of its updates

    with Sandbox() as sandbox, (out / "steps.jsonl").open("w") as log, unchanged_config(model):

        def reward(completions: Any, completion_ids: Any, task_id: Any, **_: Any) -> list[float | None]:
            nonlocal generated
            generated += sum(map(len, completion_ids))
            verdicts = [grade(tasks[name], said[0]["content"], sandbox) for name, said in zip(task_id, completions)]
            return [verdict.value if isinstance(verdict, Score) else None for verdict in verdicts]

        def save(step: int) -> None:
            save_policy(model, tokenizer, out / "checkpoints" / f"step-{step:06}", "float32")

        class Log(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                clock.begin = time.perf_counter()

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
                if "grad_norm" not in logs:  # the end's summary
                    return
                batch_logs.update({name: logs[name] for name in ("reward", "frac_reward_zero_std") if name in logs})
                step, more_updates = divmod(state.global_step, updates_per_step)
                if more_updates:
                    return
                row = {"step": step, "time": time.time(), "generated_tokens": generated, "seconds": clock.seconds(),
                       "reward_mean": batch_logs["reward"], "zero_signal_share": batch_logs["frac_reward_zero_std"],
                       "grad_norm": logs["grad_norm"]}  # fmt: skip
                print(json.dumps(row), file=log, flush=True)
                if step % checkpoint_every == 0:
                    clock.pause(lambda: save(step))

        batch = groups_per_step * group_size
        micro_batch = min(micro_batch, batch)
        config = GRPOConfig(
            output_dir=str(out), learning_rate=learning_rate, warmup_steps=warmup_steps,
            lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": last_rate_share},
            adam_beta2=0.95, weight_decay=0.0, max_grad_norm=1.0, max_steps=steps * updates_per_step,
            num_iterations=updates_per_step, num_generations=group_size,
            per_device_train_batch_size=micro_batch, gradient_accumulation_steps=batch // micro_batch,
            max_completion_length=max_answer_tokens, temperature=1.0, beta=0.0, loss_type=loss,
            scale_rewards=scale_rewards, epsilon_high=0.28, router_aux_loss_coef=0.0, use_vllm=False, use_cpu=True,
            gradient_checkpointing=False, bf16=False, logging_steps=1, report_to="none", save_strategy="no",
            disable_tqdm=True, dataloader_pin_memory=False, seed=seed, data_seed=seed,
        )  # fmt: skip
        rows = [{"prompt": [{"role": "user", "content": task.prompt}], "task_id": name} for name, task in tasks.items()]
        adam = None  # TRL's own
        if head_rate_scale != 1.0:
            (adam,) = make_optimizers(model, "adamw", learning_rate, rate_scales={"head": head_rate_scale})
        trainer = GRPOTrainer(
            model=model, reward_funcs=reward, args=config, train_dataset=as_dataset(rows), processing_class=tokenizer,
            callbacks=[Log()], optimizers=(adam, None),
        )  # fmt: skip
        use_our_logprobs(trainer.model, FusedCausalLMOutput)
        trainer.train()


if __name__ == "__main__":
    typer.run(main)
