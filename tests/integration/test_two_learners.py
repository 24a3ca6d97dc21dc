"""Two learner processes, gloo between them, against one."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from model.checkpoint import save_policy
from model.fp8_gauges import TensorStats
from model.precision import Fp8Settings
from model.tiny import TinyShape, tiny_llama4
from model.tokenizer import build_tokenizer
from rl.learner import LearnerSettings, PolicyLearner
from rl.losses import Objective
from rl.types import TrainBatch

LENGTHS = [3, 5, 7, 9, 11, 13]
BATCH = TrainBatch(
    version=0,
    prompt_ids=[[1, 7, 9 + row] for row in range(6)],
    answer_ids=[[10 + (7 * row + i) % 50 for i in range(n)] for row, n in enumerate(LENGTHS)],
    generator_logprobs=[[-4.0] * n for n in LENGTHS],
    token_versions=[[0] * n for n in LENGTHS],
    advantages=[1.0, -1.0, 0.0, 0.5, -0.5, 1.0],
)


def step(rank: int, settings: LearnerSettings, out: str) -> None:
    learner = PolicyLearner(dataclasses.replace(settings, rank=rank))
    learner.start()
    if learner.fp8 and rank == 1:  # this one alone sees a tensor that FP8 stores badly
        bad = TensorStats(amax=1.0, saturation_share=0.0, underflow_share=0.9, snr_db=1.0)
        learner.fp8.gauges[1].read = lambda: {"down.input": bad}  # type: ignore[method-assign]
    report = learner.step(BATCH)
    metrics = report.metrics | {"notes": len(report.extras["notes"])}
    torch.save((metrics, learner.model.state_dict()), f"{out}/{rank}-of-{settings.world_size}.pt")


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


def two_steps(settings: LearnerSettings, out: Path) -> list[tuple[dict[str, float], dict[str, torch.Tensor]]]:
    """(metrics, weights) of each of two learners."""
    torch.multiprocessing.spawn(step, (dataclasses.replace(settings, world_size=2), str(out)), nprocs=2)
    return [torch.load(out / f"{rank}-of-2.pt") for rank in (0, 1)]


@pytest.mark.parametrize("losses", [{}, {"balance_coef": 3.0, "z_coef": 0.5}])
def test_two_learners_make_the_step_that_one_makes(tmp_path, losses):
    settings = tiny_settings(tmp_path, **losses)
    step(0, settings, str(tmp_path))  # leaves 0-of-1.pt
    metrics, state = torch.load(tmp_path / "0-of-1.pt")
    for other_metrics, other_state in two_steps(settings, tmp_path):
        assert other_metrics["loss"] == pytest.approx(metrics["loss"], abs=1e-5)
        assert other_metrics["grad_norm"] == pytest.approx(metrics["grad_norm"], rel=1e-4)
        for name in ["router/max_vio", *(["router/balance_loss", "router/z_loss"] if losses else [])]:
            assert other_metrics[name] == pytest.approx(metrics[name], rel=1e-5), name
        for name, tensor in state.items():
            torch.testing.assert_close(other_state[name], tensor, atol=1e-5, rtol=1e-4, msg=name)


def test_a_layer_that_one_learner_sees_stored_badly_leaves_fp8_in_both(tmp_path):
    """Learners that disagreed would compute different models."""
    fp8 = Fp8Settings(keep_first_and_last=False)
    for metrics, _ in two_steps(tiny_settings(tmp_path, fp8=fp8), tmp_path):
        assert metrics["fp8/layer1/down.input/snr_db"] == 1.0 and metrics["notes"] == 1
