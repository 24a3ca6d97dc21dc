"""The objective by numbers worked by hand, by slow twins, and by surrogates whose gradient autograd takes."""

import dataclasses
import itertools
import math

import pytest
import torch

from rl.losses import (
    Denominators,
    Objective,
    Tokens,
    group_advantages,
    mean_best_of,
    overlong_penalty,
    policy_loss,
)

# --- advantages ---------------------------------------------------------------------------------------------------


def test_advantages_by_hand():
    scores = [1.0, 0.0, 0.0, 0.0]  # mean 1/4, std sqrt(3)/4
    assert group_advantages(scores, "dr_grpo") == [0.75, -0.25, -0.25, -0.25]
    assert group_advantages(scores, "rloo") == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3])
    assert group_advantages(scores, "grpo") == pytest.approx([math.sqrt(3), *[-1 / math.sqrt(3)] * 3])
    assert group_advantages(scores, "max_rl") == [3.0, -1.0, -1.0, -1.0]
    # Best of 2 with the right one: always 1; without it: 0. With a wrong one: 1 in 1 of 3; without it: in 2 of 3.
    assert group_advantages(scores, "pass_at_k", k=2) == pytest.approx([1.0, *[1 / 3 - 2 / 3] * 3])


def test_max_rl_weighs_a_rare_success_by_its_rarity():
    for right in (1, 2, 4):
        advantages = group_advantages([1.0] * right + [0.0] * (8 - right), "max_rl")
        assert advantages[0] == pytest.approx(8 / right - 1) and sum(advantages) == pytest.approx(0.0)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("scores", [[1, 0, 0, 1, 0, 0], [1, 1, 1, 1, 0, 1], [0.2, 0.9, 0.9, 0.0, 0.4, 0.1]])
def test_pass_at_k_is_the_average_over_all_subsets(scores, k):
    subsets = list(itertools.combinations(range(len(scores)), k))

    def mean_best(keep):
        best = [max(scores[j] for j in subset) for subset in subsets if keep(subset)]
        return sum(best) / len(best)

    slowly = [mean_best(lambda s, i=i: i in s) - mean_best(lambda s, i=i: i not in s) for i in range(len(scores))]
    assert group_advantages(scores, "pass_at_k", k) == pytest.approx(slowly)
    if k == 1:
        assert slowly == pytest.approx(group_advantages(scores, "rloo"))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_pass_at_k_points_along_the_gradient_of_pass_at_k(k):
    """Exactly: a policy of one number p, every group of 4 answers weighed by its probability. The mean of A_i ∇log π_i
    is 1/k of d/dp [1 - (1-p)^k] = k (1-p)^(k-1)."""
    p, n = 0.3, 4
    total = 0.0
    for group in itertools.product([0.0, 1.0], repeat=n):
        weight = math.prod(p if score else 1 - p for score in group)
        score_function = [1 / p if score else -1 / (1 - p) for score in group]
        advantages = group_advantages(group, "pass_at_k", k)
        total += weight * sum(a * g for a, g in zip(advantages, score_function)) / n
    assert total == pytest.approx(k * (1 - p) ** (k - 1) / k)


def test_the_best_of_k_estimator_by_hand():
    assert mean_best_of([0.0, 0.0, 1.0], 1) == pytest.approx(1 / 3)
    assert mean_best_of([0.0, 0.0, 1.0], 2) == pytest.approx(2 / 3)
    assert mean_best_of([0.0, 0.5, 1.0], 2, floor=0.75) == pytest.approx((0.75 + 1 + 1) / 3)


def test_an_ungraded_answer_gets_nothing_and_moves_no_baseline():
    assert group_advantages([1.0, None, 0.0], "dr_grpo") == [0.5, 0.0, -0.5]  # not [2/3, -1/3, -1/3]
    assert group_advantages([1.0, None, 0.0, 0.0], "pass_at_k", 2)[1] == 0.0


@pytest.mark.parametrize("kind", ["rloo", "grpo", "dr_grpo", "max_rl", "pass_at_k"])
@pytest.mark.parametrize("scores", [[1.0, 1.0], [0.0, 0.0, 0.0], [1.0, None], [None, None]])
def test_a_group_without_contrast_carries_no_signal(scores, kind):
    assert not any(group_advantages(scores, kind))


def test_an_unknown_advantage_is_refused():
    with pytest.raises(ValueError, match="gae"):
        group_advantages([1.0, 0.0], "gae")


def test_the_overlong_penalty_grows_over_its_buffer():
    seen = [overlong_penalty(length, 100, 20, 0.5, length == 100) for length in (10, 80, 90, 99, 100)]
    assert seen == pytest.approx([0, 0, 0.25, 0.475, 0.5])
    assert overlong_penalty(99, 100, 0, 0.5, False) == 0 and overlong_penalty(100, 100, 0, 0.5, True) == 0.5


# --- policy loss --------------------------------------------------------------------------------------------------


def gradient(ratios, advantages, objective=Objective(), answer=None, staleness=None, denominators=None):  # noqa: B008
    """d loss / d log π of tokens with these π/μ, μ = 1/e throughout; what was clipped, what was masked."""
    behaviour = torch.full((len(ratios),), -1.0)
    current = (behaviour + torch.tensor(ratios).log()).requires_grad_()
    answer = torch.tensor(answer or [0] * len(ratios))
    tokens = Tokens(current, behaviour, torch.tensor(advantages), torch.tensor(staleness or [0] * len(ratios)), answer,
                    torch.full((len(ratios),), 0.7))  # fmt: skip
    counted = denominators or Denominators(float(len(ratios)), float(answer.max() + 1), 10.0)
    result = policy_loss(tokens, counted, objective)
    result.loss.backward()
    return current.grad.tolist(), result.clipped.tolist(), result.masked.tolist()


def test_on_policy_every_choice_is_the_plain_policy_gradient():
    for region, ratio, proximal, mismatch in itertools.product(
        ("none", "ppo", "cispo", "aipo", "dppo"), ("token", "sequence"), ("recomputed", "rollout", "log_linear"),
        ("none", "tis", "icepop", "sequence_mask"),
    ):  # fmt: skip
        objective = Objective(trust_region=region, ratio=ratio, proximal=proximal, mismatch=mismatch)
        seen, clipped, masked = gradient([1.0, 1.0], [1.0, -0.5], objective)
        assert seen == pytest.approx([-0.5, 0.25]) and not any(clipped) and not any(masked)  # -A/N


def test_the_trust_region_stops_only_what_has_gone_far_enough_that_way():
    #               up, too far   up, back     down, too far  down, back within the cap
    ratios, advantages = [1.3, 0.5, 0.7, 1.5], [1.0, 1.0, -1.0, -1.0]
    seen, clipped, _ = gradient(ratios, advantages)
    assert clipped == [True, False, True, False]
    assert seen == pytest.approx([0.0, -0.5 / 4, 0.0, 1.5 / 4])
    assert gradient([5.0], [-1.0])[0] == pytest.approx([2.0])  # ratio_cap


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_ppo_is_the_gradient_of_the_clipped_surrogate(advantage):
    for ratio in (0.5, 0.79, 0.81, 1.0, 1.27, 1.29, 1.9):
        log_pi = torch.tensor(math.log(ratio), requires_grad=True)
        surrogate = torch.min(log_pi.exp() * advantage, log_pi.exp().clamp(0.8, 1.28) * advantage)
        surrogate.backward()
        assert gradient([ratio], [advantage])[0] == pytest.approx([-log_pi.grad.item()], abs=1e-6)


def test_cispo_bounds_the_weight_and_drops_nothing():
    objective = Objective(trust_region="cispo", clip_low=0.5, clip_high=1.0)
    seen, clipped, _ = gradient([0.1, 0.9, 3.0], [1.0, 1.0, -1.0], objective)
    assert seen == pytest.approx([-0.5 / 3, -0.9 / 3, 2.0 / 3]) and clipped == [True, False, True]


def test_aipo_is_the_importance_weight_capped_from_above():
    seen, _, _ = gradient([0.01, 1.5, 9.0], [1.0, 1.0, 1.0], Objective(trust_region="aipo", ratio_cap=3.0))
    assert seen == pytest.approx([-0.01 / 3, -1.5 / 3, -3.0 / 3])


def test_dppo_looks_at_the_probability_and_not_at_the_ratio():
    """μ = 0.368: half as likely again moves it by 0.18, within 0.2; twice as likely by 0.37."""
    objective = Objective(trust_region="dppo", clip_low=0.2, clip_high=0.2)
    seen, clipped, _ = gradient([1.5, 2.0, 0.5, 0.4], [1.0, 1.0, -1.0, -1.0], objective)
    assert clipped == [False, True, False, True]
    assert seen == pytest.approx([-1.5 / 4, 0.0, 0.5 / 4, 0.0])


def test_gspo_is_the_gradient_of_the_clipped_sequence_surrogate():
    ratios, answer, advantages = [1.1, 1.3, 0.9, 0.95], [0, 0, 1, 1], [1.0, 1.0, -1.0, -1.0]
    objective = Objective(ratio="sequence", aggregation="sequence_mean", clip_low=0.2, clip_high=0.28)
    log_ratio = torch.tensor(ratios).log().requires_grad_()
    means = torch.stack([log_ratio[:2].mean(), log_ratio[2:].mean()]).exp()
    signs = torch.tensor([1.0, -1.0])
    (-torch.min(means * signs, means.clamp(0.8, 1.28) * signs).mean()).backward()
    assert gradient(ratios, advantages, objective, answer)[0] == pytest.approx(log_ratio.grad.tolist(), abs=1e-6)


def test_mismatch_corrections_by_hand():
    """π₀ = π, so that r is 1 and w is the whole ratio."""
    ratios, answer = [0.1, 1.0, 4.0, 1.2], [0, 0, 1, 1]
    base = Objective(proximal="recomputed", mismatch_low=0.5, mismatch_high=2.0)

    def seen(mismatch):
        values, _, masked = gradient(ratios, [1.0] * 4, dataclasses.replace(base, mismatch=mismatch), answer)
        return [-4 * value for value in values], masked

    assert seen("none")[0] == pytest.approx(ratios)
    assert seen("tis") == (pytest.approx([0.1, 1.0, 2.0, 1.2]), [False, False, True, False])
    assert seen("icepop") == (pytest.approx([0.0, 1.0, 0.0, 1.2]), [True, False, True, False])
    # geometric means: sqrt(0.1) = 0.32 is outside, sqrt(4.8) = 2.19 too; with wider bounds the second is inside
    assert seen("sequence_mask")[1] == [True] * 4
    wider = dataclasses.replace(base, mismatch="sequence_mask", mismatch_high=3.0)
    assert gradient(ratios, [-4.0] * 4, wider, answer)[0] == pytest.approx([0.0, 0.0, 2.0, 1.2])


def test_log_linear_lies_between_the_sampler_and_the_learner_by_staleness():
    """Staleness 0 and 1: π₀ = μ; 4: three quarters of the way to π, so r = ρ^(1/4) and w = ρ^(3/4)."""
    objective = Objective(proximal="log_linear", trust_region="ppo", clip_high=0.1, ratio_cap=9.0)
    _, clipped, _ = gradient([1.2, 1.2, 1.2], [1.0] * 3, objective, staleness=[0, 1, 4])
    assert clipped == [True, True, False]  # 1.2^(1/4) = 1.047
    masked = gradient([16.0], [1.0], dataclasses.replace(objective, trust_region="none", mismatch="tis"), staleness=[4])
    assert masked[0] == pytest.approx([-2.0 * 16**0.25])  # w = 8, bounded by 2


def test_aggregations_by_hand():
    advantages, answer, ones = [1.0] * 4, [0, 1, 1, 1], [1.0] * 4

    def seen(aggregation):
        return gradient(ones, advantages, Objective(aggregation=aggregation), answer)[0]

    assert seen("token_mean") == pytest.approx([-0.25] * 4)
    assert seen("sequence_mean") == pytest.approx([-1 / 2, *[-1 / 6] * 3])
    assert seen("constant") == pytest.approx([-1 / 20] * 4)  # two answers of at most ten tokens


def test_entropy_and_kl_terms_by_hand():
    """-log π = 1 - log 2; its baseline 0.7. Without advantage nothing else is left."""
    seen = gradient([2.0], [0.0], Objective(entropy_coef=0.5))[0]
    assert seen == pytest.approx([-0.5 * (1 - math.log(2) - 0.7)])
    assert gradient([2.0], [0.0], Objective(kl_coef=0.5))[0] == pytest.approx([0.5 * math.log(2)])


def test_the_entropy_term_is_the_entropys_gradient_in_expectation():
    logits = torch.tensor([0.3, -1.0, 0.8], requires_grad=True)
    log_p = torch.log_softmax(logits, 0)
    entropy = -(log_p.exp() * log_p).sum()
    (exact,) = torch.autograd.grad(entropy, logits, retain_graph=True)
    expected = torch.zeros(3)
    for token in range(3):  # every token, weighed by its probability
        one = torch.zeros(1, dtype=torch.long)
        tokens = Tokens(log_p[token : token + 1], log_p[token : token + 1].detach(), torch.zeros(1), one, one,
                        entropy.detach().reshape(1))  # fmt: skip
        loss = policy_loss(tokens, Denominators(1.0, 1.0, 1.0), Objective(entropy_coef=1.0)).loss
        (seen,) = torch.autograd.grad(loss, logits, retain_graph=True)
        expected -= log_p[token].exp().detach() * seen
    torch.testing.assert_close(expected, exact)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_cutting_a_batch_between_answers_does_not_change_the_gradient(aggregation, ratio):
    objective = Objective(aggregation=aggregation, ratio=ratio, mismatch="sequence_mask", proximal="log_linear")
    ratios, advantages, answer = [1.1, 0.9, 1.0, 1.2], [1.0, 1.0, -1.0, -1.0], [0, 0, 1, 1]
    counted = Denominators(4.0, 2.0, 10.0)
    whole, *_ = gradient(ratios, advantages, objective, answer, denominators=counted)
    first, *_ = gradient(ratios[:2], advantages[:2], objective, denominators=counted)
    rest, *_ = gradient(ratios[2:], advantages[2:], objective, denominators=counted)
    assert first + rest == pytest.approx(whole)
    tempting, *_ = gradient(ratios[:2], advantages[:2], objective)  # by its own counts: twice too large
    assert tempting == pytest.approx([2 * value for value in whole[:2]])
