"""Two learner processes, gloo between them, against one."""

import dataclasses
import os
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from model.checkpoint import load_policy, save_policy
from model.experts import Experts
from model.fp8_gauges import TensorStats
from model.parallel import full_tensors
from model.precision import Fp8Settings, Scope
from model.tiny import TinyShape, tiny_llama4
from model.tokenizer import build_tokenizer
from rl.learner import LearnerSettings, PolicyLearner
from rl.losses import Objective
from rl.types import TrainBatch
from rl.weight_sync import WeightFiles, weights_digest

STEPS = 3
LENGTHS = [3, 5, 7, 9, 11, 13]
BATCH = TrainBatch(
    version=0,
    prompt_ids=[[1, 7, 9 + row] for row in range(6)],
    answer_ids=[[10 + (7 * row + i) % 50 for i in range(n)] for row, n in enumerate(LENGTHS)],
    generator_logprobs=[[-4.0] * n for n in LENGTHS],
    token_versions=[[0] * n for n in LENGTHS],
    advantages=[1.0, -1.0, 0.0, 0.5, -0.5, 1.0],
)


def steps(rank: int, settings: LearnerSettings, out: str, resume_from: str = "", num_steps: int = STEPS) -> None:
    """One learner's steps; leaves behind what it saw, and the first one what all hold together."""
    learner = PolicyLearner(dataclasses.replace(settings, rank=rank))
    learner.start()
    if resume_from:
        learner.load_state(resume_from)
    if learner.fp8 and rank == 1:  # this one alone sees a tensor that FP8 stores badly
        bad = TensorStats(amax=1.0, saturation_share=0.0, underflow_share=0.9, snr_db=1.0)
        learner.fp8.gauges[1].read = lambda: {"down.input": bad}  # type: ignore[method-assign]
    metrics, published = [], None
    for _ in range(num_steps):
        batch = dataclasses.replace(
            BATCH, version=learner.version, token_versions=[[learner.version] * length for length in LENGTHS]
        )
        report = learner.step(batch, f"{out}/published.safetensors")
        metrics.append(report.metrics | {"notes": len(report.extras["notes"])})
        published = report.published
    states = [state for optimizer in learner.optimizers for state in optimizer.state.values()]
    own_bytes = sum(
        (one.to_local() if isinstance(one, DTensor) else one).nbytes
        for one in (*learner.model.parameters(), *states)
        for one in (one.values() if isinstance(one, dict) else [one])
    )
    name = f"{rank}-of-{settings.world_size}"
    weights = {name: tensor.clone() for name, tensor in full_tensors(learner.model)}
    learner.save_state(f"{out}/{'resumed' if resume_from else 'state'}-{settings.world_size}.pt")
    learner.save(f"{out}/checkpoint-{settings.world_size}")
    experts = [len(module.weights()[0]) for module in learner.model.modules() if isinstance(module, Experts)]
    torch.save({"metrics": metrics, "weights": weights, "bytes": own_bytes, "probe": vars_of(published),
                "experts": experts}, f"{out}/{name}.pt")  # fmt: skip
    if settings.world_size > 1:  # all is written; a process that tears down with gloo's threads alive may abort
        os._exit(0)


def vars_of(published: Any) -> dict[str, Any]:
    return {"digest": published.digest, "labels": published.probe.label_ids, "logprobs": published.probe.logprobs}


def tiny_settings(directory: Path, **changes: Any) -> LearnerSettings:
    torch.manual_seed(0)
    tokenizer = build_tokenizer(["Compute 1+2.", "user", "assistant"], 300)
    shape = TinyShape(hidden_size=32, head_dim=16, expert_size=32, dense_size=64, num_experts=4)
    save_policy(tiny_llama4(shape, tokenizer), tokenizer, directory / "tiny")
    settings = LearnerSettings(
        checkpoint=str(directory / "tiny"), dtype="float32", learning_rate=1e-3, warmup_steps=0, weight_decay=0.0,
        max_grad_norm=1e9, micro_batch_tokens=16, temperature=1.0, router_policy="train",
        router_learning_rate_scale=0.1, balance_coef=0.0, z_coef=0.0,
        objective=Objective(clip_low=50.0, clip_high=1e9, ratio_cap=1e9), longest_answer=64,
        seed=0, rendezvous=str(directory / "meet"),
    )  # fmt: skip
    return dataclasses.replace(settings, **changes)


def of_one(settings: LearnerSettings, out: Path, **how: Any) -> dict[str, Any]:
    steps(0, settings, str(out), **how)
    return torch.load(out / "0-of-1.pt")


def of_two(settings: LearnerSettings, out: Path, *how: Any) -> list[dict[str, Any]]:
    (out / "meet").unlink(missing_ok=True)
    torch.multiprocessing.spawn(steps, (dataclasses.replace(settings, world_size=2), str(out), *how), nprocs=2)
    return [torch.load(out / f"{rank}-of-2.pt") for rank in (0, 1)]


def assert_same(others: list[dict[str, Any]], one: dict[str, Any], gauges: list[str]) -> None:
    for other in others:
        for seen, expected in zip(other["metrics"], one["metrics"], strict=True):
            assert seen["loss"] == pytest.approx(expected["loss"], abs=1e-5)
            assert seen["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
            for name in gauges:
                assert seen[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-7), name
        for name, tensor in one["weights"].items():
            torch.testing.assert_close(other["weights"][name], tensor, atol=1e-5, rtol=1e-4, msg=name)
        assert other["probe"]["labels"] == one["probe"]["labels"]
        assert other["probe"]["logprobs"] == pytest.approx(one["probe"]["logprobs"], abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "gauges"),
    [
        ({}, ["router/max_vio", "router/drift"]),
        ({"balance_coef": 3.0, "z_coef": 0.5}, ["router/balance_loss", "router/z_loss"]),
        (
            {"max_grad_norm": 0.05, "micro_batch_tokens": 1000},
            ["router/drift"],
        ),  # one micro-batch: one learner has none
        ({"router_policy": "low_lr", "weight_decay": 0.1}, ["router/drift"]),
        ({"router_policy": "frozen"}, ["router/max_vio"]),
        ({"activation_checkpointing": True}, ["router/max_vio", "router/drift"]),
        ({"optimizer": "muon", "rate_scales": {"head": 2.0}, "weight_decay": 0.1}, ["router/drift"]),
    ],
    ids=[
        "plain",
        "router losses",
        "one micro-batch",
        "slow routers",
        "frozen routers",
        "activation checkpointing",
        "muon",
    ],
)
def test_two_learners_make_the_steps_that_one_makes(tmp_path, changes, gauges):
    settings = tiny_settings(tmp_path, **changes)
    one = of_one(settings, tmp_path)
    two = of_two(settings, tmp_path)
    assert_same(two, one, gauges)
    assert abs(two[0]["bytes"] - two[1]["bytes"]) < 0.05 * one["bytes"], "each holds its share"
    assert sum(half["bytes"] for half in two) < 1.05 * one["bytes"], "and nothing is held twice"
    assert_whole(tmp_path, two[0])


@pytest.mark.parametrize(
    ("changes", "gauges"),
    [
        ({"router_policy": "low_lr", "weight_decay": 0.1}, ["router/max_vio", "router/drift"]),
        ({"balance_coef": 3.0, "z_coef": 0.5}, ["router/balance_loss", "router/z_loss"]),
        ({"max_grad_norm": 0.05, "micro_batch_tokens": 1000}, ["router/drift"]),
        ({"optimizer": "muon", "rate_scales": {"head": 2.0}, "weight_decay": 0.1}, ["router/drift"]),
    ],
    ids=["slow routers", "router losses", "one micro-batch", "muon"],
)
def test_two_learners_with_half_of_the_experts_each_make_the_steps_that_one_makes(tmp_path, changes, gauges):
    settings = tiny_settings(tmp_path, **changes)
    one = of_one(settings, tmp_path)
    two = of_two(dataclasses.replace(settings, expert_parallel=2), tmp_path)
    assert_same(two, one, gauges)
    for half in two:
        assert half["experts"] == [2] * len(one["experts"]) and set(one["experts"]) == {4}, "of each layer"
        norms = [[metrics["grad_norm"] for metrics in learner["metrics"]] for learner in (half, one)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert sum(half["bytes"] for half in two) < 1.05 * one["bytes"], "nothing is held twice"
    assert_whole(tmp_path, two[0])


def assert_whole(out: Path, two: dict[str, Any]) -> None:
    """What two learners saved and published is what they hold together."""
    whole = dict(load_policy(out / "checkpoint-2").named_parameters())
    for name, tensor in two["weights"].items():
        assert torch.equal(whole[name], tensor), name
    with WeightFiles(out / "published.safetensors") as files:
        assert weights_digest(iter(files)) == two["probe"]["digest"]


@pytest.mark.parametrize(("expert_parallel", "optimizer"), [(1, "adamw"), (2, "adamw"), (2, "muon")])
def test_a_state_of_two_learners_is_gone_on_from_bit_for_bit_by_two_and_closely_by_one(
    tmp_path, expert_parallel, optimizer
):
    settings = tiny_settings(tmp_path, expert_parallel=expert_parallel, optimizer=optimizer)
    uninterrupted = of_two(settings, tmp_path)[0]
    of_two(settings, tmp_path, "", 1)  # leaves state-2.pt
    state = str(tmp_path / "state-2.pt")
    resumed = of_two(settings, tmp_path, state, STEPS - 1)[0]
    for name, tensor in uninterrupted["weights"].items():
        assert torch.equal(resumed["weights"][name], tensor), name
    alone = of_one(dataclasses.replace(settings, expert_parallel=1), tmp_path, resume_from=state, num_steps=STEPS - 1)
    for name, tensor in uninterrupted["weights"].items():
        torch.testing.assert_close(alone["weights"][name], tensor, atol=1e-5, rtol=1e-4, msg=name)


def test_two_learners_of_a_dense_llama(tmp_path):
    settings = tiny_settings(tmp_path)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    save_policy(LlamaForCausalLM(config), build_tokenizer(["Compute 1+2.", "user"], 300), tmp_path / "llama")
    settings = dataclasses.replace(settings, checkpoint=str(tmp_path / "llama"))
    one = of_one(settings, tmp_path)
    assert_same(of_two(settings, tmp_path), one, [])


@pytest.mark.parametrize("expert_parallel", [1, 2])
def test_a_layer_that_one_learner_sees_stored_badly_leaves_fp8_in_both(tmp_path, expert_parallel):
    """Learners that disagreed would compute different models."""
    fp8 = Fp8Settings(keep_first_and_last=False, scope=get_args(Scope))
    for seen in of_two(tiny_settings(tmp_path, fp8=fp8, expert_parallel=expert_parallel), tmp_path):
        metrics = seen["metrics"][0]
        assert metrics["fp8/layer1/down.input/snr_db"] == 1.0 and metrics["notes"] == 1
