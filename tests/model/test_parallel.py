"""Plans that do not fit are refused, and one process needs none; several processes: tests/integration."""

import pytest
import torch
from torch import nn

from model.parallel import ParallelPlan, clip_grad_norm, full_tensors, load_full, parallelise, within_forward

SCOUT = (16, 5120, 8192)  # experts, hidden size, width of an expert


@pytest.mark.parametrize(
    "plan, num_processes, shapes, message",
    [
        (ParallelPlan(data=2, expert=2), 8, [SCOUT], "data 2 × expert 2 is for 4 processes; 8 are running"),
        (ParallelPlan(expert=2), 2, [], "the model is dense"),
        (ParallelPlan(expert=3), 3, [SCOUT], "expert must divide the number of experts, 16"),
        (ParallelPlan(data=3), 3, [SCOUT], "data must divide the hidden size, 5120, and the width of an expert, 8192"),
        (ParallelPlan(data=5), 5, [SCOUT], "data must divide"),  # 5120 but not 8192
    ],
)
def test_a_plan_that_does_not_fit_is_refused(plan, num_processes, shapes, message):
    with pytest.raises(ValueError, match=message):
        plan.check(num_processes, shapes)


@pytest.mark.parametrize("data, expert, shapes", [(64, 16, [SCOUT]), (1, 16, [SCOUT]), (7, 1, []), (32, 1, [SCOUT])])
def test_a_plan_that_fits_is_taken(data, expert, shapes):
    ParallelPlan(data=data, expert=expert).check(data * expert, shapes)


@pytest.mark.parametrize("axis", ["data", "expert"])
def test_an_axis_without_ranks_is_refused(axis):
    with pytest.raises(ValueError, match=f"{axis} is 0; at least 1"):
        ParallelPlan(**{axis: 0})


def test_one_process_leaves_the_model_as_it_is():
    model = nn.Linear(3, 2)
    assert parallelise(model, ParallelPlan()) is model and type(model) is nn.Linear
    assert within_forward(model, lambda row: model.weight[row], 1).tolist() == model.weight[1].tolist()


def test_whole_tensors_go_out_and_come_in():
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    load_full(target, full_tensors(source))
    assert torch.equal(target.weight, source.weight) and torch.equal(target.bias, source.bias)


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"weight": torch.ones(2, 3)}, "1 missing .bias."),
        ({"weight": torch.ones(3, 2)}, r"weight \[3, 2\], wanted \[2, 3\]"),
        ({"scale": torch.ones(2)}, r"scale \[2\], not the model's"),
    ],
)
def test_weights_that_are_not_the_models_are_refused(tensors, message):
    with pytest.raises(ValueError, match=message):
        load_full(nn.Linear(3, 2), tensors.items())


@pytest.mark.parametrize("max_norm", [0.1, 100.0])
def test_clipping_in_one_process_is_pytorchs(max_norm):
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    for model in (ours, theirs):
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
    norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
    assert clip_grad_norm(ours, max_norm).item() == pytest.approx(norm.item(), rel=1e-6)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
