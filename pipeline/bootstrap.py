"""Stage `bootstrap`: a tiny Llama-4-style base model, trained from scratch on generated worked solutions.

Two CPU cores train some thousands of tokens a second, so this stage is run once, long and well, and its checkpoint is
shipped; `recipes/tiny_base.yaml` is the recipe that rebuilds it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import BootstrapStage
from pipeline.corpus import documents
from pipeline.stage import StageContext
from pipeline.trainer_actor import START_S, Reporter, train_in_actor

if TYPE_CHECKING:
    import torch

    from model.checkpoint import PreTrainedModel
    from model.tokenizer import PreTrainedTokenizerBase

TOKENIZER_DOCUMENTS = 20_000
POOL_DOCUMENTS = 2_048  # drawn together and sorted by length, so that a batch has little padding
IGNORED = -100
LOG_EVERY = 50  # steps


@dataclass(frozen=True, kw_only=True)
class BootstrapJob:
    stage: BootstrapStage
    seed: int
    work: Path


def run(context: StageContext) -> dict[str, Any]:
    stage = context.stage
    assert isinstance(stage, BootstrapStage)
    job = BootstrapJob(stage=stage, seed=context.seed, work=context.work)
    return train_in_actor(context, BootstrapTrainer, job, START_S + stage.minutes * 60)


class BootstrapTrainer:
    """Trains the base model in a process of its own."""

    def __init__(self, job: BootstrapJob) -> None:
        self.stage, self.seed, self.work = job.stage, job.seed, job.work

    def train(self) -> dict[str, Any]:
        import torch

        from model.checkpoint import save_policy
        from model.device import own_device
        from model.tiny import TinyShape, tiny_llama4
        from model.tokenizer import build_tokenizer

        stage = self.stage
        torch.manual_seed(self.seed)
        corpus = itertools.islice(documents(seed=-1), TOKENIZER_DOCUMENTS)
        tokenizer = build_tokenizer((text for pair in corpus for text in (*pair, "user", "assistant", "system")), 768)
        shape = TinyShape(**{field: getattr(stage, field) for field in TinyShape.__dataclass_fields__})
        device = own_device()
        model = tiny_llama4(shape, tokenizer).to(device)
        optimizers = self._optimizers(model)
        batches, reporter = self._batches(tokenizer), Reporter(self.work)
        begin, trained, losses = time.monotonic(), 0, []
        for step in range(stage.max_steps):
            spent = (time.monotonic() - begin) / (stage.minutes * 60)
            done = max(step / stage.max_steps, spent)
            if done >= 1:
                break
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = group["initial_lr"] * _schedule(step, done)
            ids, labels = (part.to(device) for part in next(batches))
            loss, count = train_step(model, optimizers, ids, labels)
            trained += count
            losses.append(loss)
            if step % LOG_EVERY == 0:
                recent = losses[-LOG_EVERY:]
                logs = {"loss": sum(recent) / len(recent), "num_tokens": trained, "learning_rate": group["lr"]}
                reporter.step(step, round(step / done) if done else stage.max_steps, logs)
        save_policy(model, tokenizer, self.work / "checkpoint", dtype="bfloat16")
        parameters = sum(p.numel() for p in model.parameters())
        final = sum(losses[-100:]) / len(losses[-100:])
        return {"tokens_trained": trained, "steps": len(losses), "loss": final, "parameters": parameters}

    def _optimizers(self, model: PreTrainedModel) -> list[torch.optim.Optimizer]:
        """Muon for the hidden matrices, AdamW for the rest. Against AdamW for all, the loss after 100 steps was 1.52
        instead of 1.78 (docs/log.md)."""
        import torch

        hidden: list[torch.nn.Parameter] = []
        rest: list[torch.nn.Parameter] = []
        for name, parameter in model.named_parameters():
            is_hidden = parameter.dim() == 2 and not any(part in name for part in ("embed_tokens", "lm_head", "router"))
            (hidden if is_hidden else rest).append(parameter)
        muon = torch.optim.Muon(hidden, lr=self.stage.muon_learning_rate, weight_decay=0.1)
        adamw = torch.optim.AdamW(rest, lr=self.stage.learning_rate, weight_decay=0.1, betas=(0.9, 0.98), fused=True)
        for group in (*muon.param_groups, *adamw.param_groups):
            group["initial_lr"] = group["lr"]
        return [muon, adamw]

    def _batches(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Padded batches of about `batch_tokens`, alike in length within, shuffled among themselves."""
        import random

        import torch

        from model.tokenizer import encode_example

        rng, stream = random.Random(self.seed), documents(self.seed)
        while True:
            pool = [encode_example(tokenizer, *pair) for pair in itertools.islice(stream, POOL_DOCUMENTS)]
            pool.sort(key=lambda example: len(example[0]))
            rows: list[list[tuple[list[int], list[bool]]]] = [[]]
            for example in pool:
                if (len(rows[-1]) + 1) * len(example[0]) > self.stage.batch_tokens:
                    rows.append([])
                rows[-1].append(example)
            rng.shuffle(rows)
            for batch in rows:
                longest = max(len(ids) for ids, _ in batch)
                ids = torch.full((len(batch), longest), tokenizer.pad_token_id)
                labels = torch.full((len(batch), longest), IGNORED)
                for row, (tokens, mask) in enumerate(batch):
                    ids[row, : len(tokens)] = torch.tensor(tokens)
                    labels[row, : len(tokens)] = torch.tensor(
                        [token if on else IGNORED for token, on in zip(tokens, mask, strict=True)]
                    )
                yield ids, labels


def train_step(
    model: PreTrainedModel, optimizers: list[torch.optim.Optimizer], ids: torch.Tensor, labels: torch.Tensor
) -> tuple[float, int]:
    """One optimiser step on a padded batch [B, S]; returns the mean loss and how many tokens were trained on."""
    import torch

    from model.logprobs import token_logprobs

    wanted = labels != IGNORED
    wanted[:, 0] = False  # nothing predicts a first token
    stats, _ = token_logprobs(model, ids, wanted)
    loss = -stats.logprob_T.mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item(), int(wanted.sum())


def _schedule(step: int, done: float, warmup_steps: int = 200, decay_share: float = 0.35) -> float:
    """Warm up, hold, then fall linearly over the last `decay_share` of the training."""
    return min(1.0, (step + 1) / warmup_steps, (1.0 - done) / decay_share + 0.01)
