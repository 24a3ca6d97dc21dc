"""Two and four gloo processes against one: same loss, same gradients, same steps, same checkpoints, under every plan.

All cases of one number of processes share their start. Documents are dealt out one or two a rank; rank 1 of four has no
token at all.
"""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from model import logprobs
from model.parallel import (
    ExpertParallel,
    ParallelPlan,
    clip_grad_norm,
    full_tensors,
    load_full,
    parallelise,
    within_forward,
)
from model.router import balance_loss, expert_counts, z_loss

DEADLINE_S = 240.0  # for all processes of one number; they take seconds
LENGTHS = (9, 0, 14, 5)  # tokens of each document
ROW = max(LENGTHS)
TRAINED_TOKENS, ALL_TOKENS = sum(max(0, n - 1) for n in LENGTHS), sum(LENGTHS)
NUM_EXPERTS, MAX_NORM, FULL_STATE = 8, 0.5, StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass(frozen=True)
class Case:
    kind: str  # of model: dense, moe, llama
    plan: ParallelPlan
    flag: str = ""  # recompute: activation checkpointing; replay: all tokens to expert 0; logprobs: the learner's path,
    # in slices; frozen: neither router nor embedding learns; averaged: gradients as PyTorch would have them, wrong here

    @property
    def name(self) -> str:
        return f"{self.kind}-data{self.plan.data}-expert{self.plan.expert}-{self.flag or 'plain'}"

    @property
    def reference(self) -> str:
        """The single process that it must equal."""
        return f"{self.kind}-{'' if self.flag in ('recompute', 'averaged') else self.flag}"


def cases(world_size: int) -> list[Case]:
    data, expert = ParallelPlan(data=world_size), ParallelPlan(expert=world_size)
    both = [
        *(Case("dense", data, flag) for flag in ("", "recompute")),
        *(Case("llama", data, flag) for flag in ("", "recompute", "logprobs")),
        *(Case("moe", data, flag) for flag in ("", "recompute")),
        *(Case("moe", expert, flag) for flag in ("", "recompute", "replay", "logprobs")),
    ]
    mixed = ParallelPlan(data=2, expert=2)
    flags = ("", "recompute", "replay", "logprobs", "frozen")
    return both if world_size < 4 else [*both, *(Case("moe", mixed, flag) for flag in flags)]


AVERAGED = Case("moe", ParallelPlan(data=2, expert=2), "averaged")


# --- the little world: models, batches, a step --------------------------------------------------------------------


def build(kind: str) -> Any:
    """Always the same weights."""
    from transformers import Llama4TextConfig, LlamaConfig, LlamaForCausalLM

    from model.transformer import MoeForCausalLM

    torch.manual_seed(3)
    sizes: dict[str, Any] = dict(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, use_cache=False,
    )  # fmt: skip
    if kind == "llama":  # 50 rows do not divide by 4, and embedding and head are one
        return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)).train()
    moe_layers = {"dense": [], "moe": [1, 2]}[kind]
    config = Llama4TextConfig(
        **sizes, intermediate_size_mlp=32, num_local_experts=NUM_EXPERTS, moe_layers=moe_layers, attention_chunk_size=8,
        floor_scale=4, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    return MoeForCausalLM(config).train()


def documents(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """This rank's share of the rows: ids, mask and labels [B, S]."""
    ids = torch.randint(3, 50, (len(LENGTHS), ROW), generator=torch.Generator().manual_seed(5))
    real = torch.arange(ROW) < torch.tensor(LENGTHS).unsqueeze(1)
    own = slice(rank * len(LENGTHS) // world_size, (rank + 1) * len(LENGTHS) // world_size)
    batch = {"input_ids": ids, "attention_mask": real.long(), "labels": torch.where(real, ids, -100)}
    return {name: tensor[own] for name, tensor in batch.items()}


def loss_of(model: Any, case: Case, rank: int, world_size: int) -> torch.Tensor:
    """This rank's part of the loss of the whole batch."""
    batch = documents(rank, world_size)
    if case.kind == "llama":  # masked altogether, transformers' attention gives nan
        batch.pop("attention_mask")
    if case.flag == "replay":
        batch["replay"] = torch.zeros(*batch["input_ids"].shape, 2, dtype=torch.long)
    if case.flag == "logprobs":
        wanted = batch["labels"] != -100
        wanted[:, 0] = False
        args = (model, batch["input_ids"], wanted, 0.7, batch.get("attention_mask"))
        stats, routes = within_forward(model, logprobs.token_logprobs, *args)
        loss = -stats.logprob_T.sum() / TRAINED_TOKENS
    else:
        out = model(**batch, num_items_in_batch=torch.tensor(float(TRAINED_TOKENS)))
        loss, routes = out.loss, getattr(out, "routes", ())
    if not routes:
        return loss
    counts = [expert_counts(route) for route in routes]
    if world_size > 1:
        for count in counts:
            dist.all_reduce(count)
    shares = [count / ALL_TOKENS for count in counts]
    return loss + 0.1 * balance_loss(routes, shares, ALL_TOKENS) + 0.1 * z_loss(routes, ALL_TOKENS)


def adamw(model: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-5, weight_decay=0.1, foreach=True)


def step(model: Any, optimizer: Any, case: Case, rank: int, world_size: int) -> dict[str, Any]:
    """One optimiser step; loss, gradients and their norm before it, weights after it."""
    if case.flag == "recompute":
        model.gradient_checkpointing_enable()
    loss = loss_of(model, case, rank, world_size)
    loss.backward()
    total = loss.detach().clone()
    if world_size > 1:
        dist.all_reduce(total)
    gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    norm = clip_grad_norm(model, MAX_NORM)
    optimizer.step()
    optimizer.zero_grad()
    weights = {name: tensor.clone() for name, tensor in full_tensors(model)}
    return {"loss": total, "gradients": gradients, "norm": norm, "weights": weights}


def whole(gradient: torch.Tensor) -> torch.Tensor:
    return (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).clone()


def two_steps(case: Case, rank: int = 0, world_size: int = 1) -> list[dict[str, Any]]:
    model = build(case.kind)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (case.flag == "frozen" and (".router." in name or ".embed_tokens." in name)))
    if world_size > 1:
        parallelise(model, case.plan)
    if case.flag == "averaged":
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(2.0 if isinstance(module, ExpertParallel) else 4.0)
    optimizer = adamw(model)
    return [step(model, optimizer, case, rank, world_size) for _ in range(2)]


# --- processes ----------------------------------------------------------------------------------------------------


def rank_main(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet-{world_size}", rank=rank, world_size=world_size,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    logprobs.SLICE_TOKENS = 4
    for case in [*cases(world_size), *[AVERAGED] * (world_size == 4)]:
        steps = two_steps(case, rank, world_size)
        if rank == 0:
            torch.save(steps, f"{folder}/{world_size}-{case.name}.pt")
    (save_under_expert_plan if world_size == 2 else resume_under_other_plans)(rank, world_size, Path(folder))
    dist.destroy_process_group()


def save_under_expert_plan(rank: int, world_size: int, folder: Path) -> None:
    """One step, then weights as a checkpoint and the optimiser beside it."""
    from model.checkpoint import save_policy
    from model.tokenizer import build_tokenizer

    case = Case("moe", ParallelPlan(expert=2))
    model = parallelise(build("moe"), case.plan)
    optimizer = adamw(model)
    result = step(model, optimizer, case, rank, world_size)
    tensors = full_tensors(model)
    if rank == 0:
        save_policy(model, build_tokenizer(["Compute 1+2."], 300), folder / "checkpoint", weights=tensors)
    for _ in tensors:
        pass
    state = get_optimizer_state_dict(model, optimizer, options=FULL_STATE)
    if rank == 0:
        torch.save(state, folder / "optimizer.pt")
        torch.save(result["weights"], folder / "saved.pt")


def resume_under_other_plans(rank: int, world_size: int, folder: Path) -> None:
    from model.transformer import MoeForCausalLM
    from model.weight_files import read_tensors, stored_tensors

    for plan in (ParallelPlan(data=4), ParallelPlan(data=2, expert=2)):
        with torch.device("meta"):
            model = MoeForCausalLM(build("moe").config).train()
        parallelise(model, plan, device="cpu")
        load_full(model, read_tensors(stored_tensors(folder / "checkpoint").values()))
        loaded = {name: tensor.clone() for name, tensor in full_tensors(model)}
        optimizer = adamw(model)
        set_optimizer_state_dict(model, optimizer, torch.load(folder / "optimizer.pt"), options=FULL_STATE)
        result = step(model, optimizer, Case("moe", plan), rank, world_size)
        if rank == 0:
            torch.save((loaded, result), folder / f"resumed-data{plan.data}.pt")


def run_processes(world_size: int, folder: Path) -> None:
    """Errors of any process are raised here; whoever is left at the deadline is ended."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "model.parallel", "model.checkpoint",
         "model.transformer", "transformers.models.llama.modeling_llama"]
    )  # fmt: skip
    ranks = torch.multiprocessing.start_processes(
        rank_main, (world_size, str(folder)), nprocs=world_size, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + DEADLINE_S
    try:
        while not ranks.join(timeout=1.0):
            assert time.monotonic() < deadline, f"{world_size} processes are not done after {DEADLINE_S:.0f} s"
    finally:
        for process in ranks.processes:
            process.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plans")
    for world_size in (2, 4):  # in this order: four processes load what two have saved
        run_processes(world_size, path)
    return path


@pytest.fixture(scope="module")
def single() -> dict[str, list[dict[str, Any]]]:
    """By Case.reference."""
    needed = {case.reference: case for case in cases(4) if case.flag != "recompute"}
    return {reference: two_steps(replace(case, plan=ParallelPlan())) for reference, case in needed.items()}


# --- what must hold -----------------------------------------------------------------------------------------------


def largest_difference(got: dict[str, Any], wanted: dict[str, Any]) -> float:
    """Over all tensors, relative to the largest number of each (or to 1e-3, where all are smaller)."""
    assert got.keys() == wanted.keys()
    return max(
        float((got[name] - wanted[name]).abs().max() / wanted[name].abs().max().clamp(min=1e-3)) for name in wanted
    )


@pytest.mark.parametrize(
    "world_size, case",
    [(n, case) for n in (2, 4) for case in cases(n)],
    ids=lambda value: getattr(value, "name", value),
)
def test_every_plan_makes_the_steps_that_one_process_makes(folder, single, world_size, case):
    steps = zip(torch.load(folder / f"{world_size}-{case.name}.pt"), single[case.reference], strict=True)
    for got, wanted in steps:
        assert float(got["loss"]) == pytest.approx(float(wanted["loss"]), abs=1e-5)
        assert float(got["norm"]) == pytest.approx(float(wanted["norm"]), rel=1e-5)
        assert wanted["norm"] > MAX_NORM  # so that clipping has work to do
        assert largest_difference(got["gradients"], wanted["gradients"]) < 1e-5
        assert largest_difference(got["weights"], wanted["weights"]) < 1e-5


def test_gradients_averaged_as_pytorch_does_would_be_seen(folder, single):
    """Over each parameter's own mesh: the experts would even learn twice as fast as the rest."""
    got = torch.load(folder / f"4-{AVERAGED.name}.pt")[0]["gradients"]
    for name, wanted in single[AVERAGED.reference][0]["gradients"].items():
        divided = wanted / (2 if ".experts." in name else 4)
        assert largest_difference({name: got[name]}, {name: divided}) < 1e-5
        assert largest_difference({name: got[name]}, {name: wanted}) > 1e-2


def test_a_checkpoint_of_one_plan_loads_in_one_process(folder):
    from model.checkpoint import load_policy

    loaded = dict(load_policy(folder / "checkpoint").named_parameters())
    saved = torch.load(folder / "saved.pt")
    assert all(torch.equal(loaded[name], saved[name]) for name in saved) and loaded.keys() == saved.keys()


@pytest.mark.parametrize("data", [4, 2])
def test_weights_and_optimiser_of_one_plan_go_on_under_another(folder, single, data):
    loaded, got = torch.load(folder / f"resumed-data{data}.pt")
    saved, wanted = torch.load(folder / "saved.pt"), single["moe-"][1]
    assert all(torch.equal(loaded[name], saved[name]) for name in saved) and loaded.keys() == saved.keys()
    assert largest_difference(got["gradients"], wanted["gradients"]) < 1e-5
    assert largest_difference(got["weights"], wanted["weights"]) < 1e-5
