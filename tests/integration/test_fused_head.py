"""Our log-probabilities in the place of TRL's fused head: the same numbers, and nothing else changed."""

from __future__ import annotations

import inspect

import pytest
import torch
from tiny_checkpoints import KINDS, save_tiny
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from model.checkpoint import load_policy
from pipeline.trainer_actor import use_our_logprobs

IDS = torch.tensor([[1, 7, 9, 30, 14, 0, 0], [2, 8, 18, 25, 6, 7, 9]])
REAL = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
LABELS = torch.where(torch.tensor([[0, 0, 1, 1, 1, 0, 0], [1, 1, 0, 1, 1, 1, 1]]).bool(), IDS, -100)
FIELDS = ("loss", "log_probs", "entropy", "mean_logits", "is_top1", "label_mask")


@pytest.fixture(params=KINDS)
def policy(request, tmp_path):
    model = load_policy(save_tiny(request.param, tmp_path), "float32")
    add_fused_lm_head(model, outputs=FIELDS[1:5])
    return model


def fused(model, **changes):
    return model(input_ids=IDS, attention_mask=REAL, labels=LABELS, use_cache=False, fused_lm_head=True, **changes)


@pytest.mark.parametrize("num_items", [None, 20])
def test_every_field_is_what_trl_computes(policy, num_items):
    results = []
    for replaced in (False, True):
        if replaced:
            use_our_logprobs(policy, FusedCausalLMOutput)
        policy.zero_grad()
        outputs = fused(policy, num_items_in_batch=num_items)
        outputs.loss.backward()
        gradient = policy.model.layers[0].self_attn.q_proj.weight.grad.clone()
        results.append([*(outputs[field] for field in FIELDS), gradient])
    for field, theirs, ours in zip([*FIELDS, "gradient"], *results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4, msg=field)


def test_the_numbers_come_from_token_logprobs_and_routes_are_handed_on(policy, monkeypatch):
    import model.logprobs

    seen = []
    use_our_logprobs(policy, FusedCausalLMOutput, seen.append)
    before = fused(policy).log_probs
    true = model.logprobs.token_statistics
    monkeypatch.setattr(
        model.logprobs, "token_statistics", lambda *args: true(*args)._replace(logprob_T=2 * true(*args).logprob_T)
    )
    torch.testing.assert_close(fused(policy).log_probs, 2 * before)
    num_layers = len(getattr(policy.config, "moe_layers", []))
    assert [len(routes) for routes in seen] == [num_layers] * 2
    assert all(len(route.expert_T) == 12 for routes in seen for route in routes)  # real tokens only


def test_any_other_call_reaches_the_model_unchanged_and_what_ours_cannot_do_is_refused(policy):
    before = policy(input_ids=IDS, attention_mask=REAL, use_cache=False).logits
    use_our_logprobs(policy, FusedCausalLMOutput)
    assert torch.equal(policy(input_ids=IDS, attention_mask=REAL, use_cache=False).logits, before)
    assert inspect.signature(policy.forward) == inspect.signature(type(policy)(policy.config).forward)
    with pytest.raises(TypeError, match="position_ids"):
        fused(policy, position_ids=torch.arange(7)[None])
    fused(policy, inputs_embeds=None)  # PEFT hands on every argument it knows
