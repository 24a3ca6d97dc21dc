import math

import pytest
import torch

from rl.losses import group_advantages, policy_loss


def test_advantages_by_hand():
    scores = [1.0, 0.0, 0.0, 0.0]  # mean 1/4, std sqrt(3)/4
    assert group_advantages(scores, "dr_grpo") == [0.75, -0.25, -0.25, -0.25]
    assert group_advantages(scores, "rloo") == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3])
    assert group_advantages(scores, "grpo") == pytest.approx([math.sqrt(3), *[-1 / math.sqrt(3)] * 3])


def test_an_ungraded_answer_gets_nothing_and_moves_no_baseline():
    assert group_advantages([1.0, None, 0.0], "dr_grpo") == [0.5, 0.0, -0.5]  # not [2/3, -1/3, -1/3]


@pytest.mark.parametrize("scores", [[1.0, 1.0], [0.0, 0.0, 0.0], [1.0, None], [None, None]])
def test_a_group_without_contrast_carries_no_signal(scores):
    assert not any(group_advantages(scores, "rloo"))


def test_an_unknown_advantage_is_refused():
    with pytest.raises(ValueError, match="gae"):
        group_advantages([1.0, 0.0], "gae")


def loss_and_gradient(ratios, advantages, **changes):
    settings = dict(denominator=float(len(ratios)), clip_low=0.2, clip_high=0.28, cap=2.0) | changes
    generator = torch.full((len(ratios),), -1.0)
    learner = (generator + torch.tensor(ratios).log()).requires_grad_()
    loss, clipped = policy_loss(learner, generator, torch.tensor(advantages), **settings)
    loss.backward()
    return loss.item(), learner.grad.tolist(), clipped.tolist()


def test_on_policy_it_is_the_plain_policy_gradient():
    loss, gradient, clipped = loss_and_gradient([1.0, 1.0], [1.0, -0.5])
    assert gradient == pytest.approx([-0.5, 0.25])  # -A/N
    assert loss == pytest.approx(-(1.0 * -1.0 + -0.5 * -1.0) / 2)
    assert clipped == [False, False]


def test_the_trust_region_stops_only_what_has_gone_far_enough_that_way():
    #               up, too far   up, back     down, too far  down, back within the cap
    ratios, advantages = [1.3, 0.5, 0.7, 1.5], [1.0, 1.0, -1.0, -1.0]
    _, gradient, clipped = loss_and_gradient(ratios, advantages)
    assert clipped == [True, False, True, False]
    assert gradient == pytest.approx([0.0, -0.5 / 4, 0.0, 1.5 / 4])


def test_the_importance_weight_is_truncated():
    _, gradient, _ = loss_and_gradient([5.0], [-1.0], cap=2.0)
    assert gradient == pytest.approx([2.0])


def test_cutting_a_batch_does_not_change_the_gradient():
    ratios, advantages = [1.1, 0.9, 1.0], [1.0, -1.0, 0.5]
    _, whole, _ = loss_and_gradient(ratios, advantages)
    _, first, _ = loss_and_gradient(ratios[:1], advantages[:1], denominator=3.0)
    _, rest, _ = loss_and_gradient(ratios[1:], advantages[1:], denominator=3.0)
    assert first + rest == pytest.approx(whole)
    _, tempting, _ = loss_and_gradient(ratios[:1], advantages[:1])  # its own mean: three times too large
    assert tempting[0] == pytest.approx(3 * whole[0])
