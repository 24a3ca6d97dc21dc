"""Chunked log-probabilities against the plain way: all logits at once, log_softmax, gather."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import model.logprobs
from model.logprobs import token_logprobs


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    made = LlamaForCausalLM(config)
    for parameter in made.parameters():
        parameter.data.mul_(5.0)  # far from uniform, or the test proves little
    return made


IDS = torch.tensor([[1, 7, 9, 3, 4, 0, 0], [2, 8, 8, 5, 6, 7, 9]])
WANTED = torch.tensor([[0, 0, 1, 1, 1, 0, 0], [0, 1, 0, 1, 1, 1, 1]], dtype=torch.bool)


def plainly(policy, temperature):
    logprobs = torch.log_softmax(policy(IDS).logits.float() / temperature, -1)
    rows = [(logprobs[b, s - 1, IDS[b, s]], logprobs[b, s - 1]) for b, s in WANTED.nonzero().tolist()]
    return torch.stack([row for row, _ in rows]), torch.stack([-(d.exp() * d).sum() for _, d in rows])


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("slice_tokens", [4096, 3])
def test_values_and_gradients_equal_the_plain_way(policy, temperature, slice_tokens, monkeypatch):
    monkeypatch.setattr(model.logprobs, "SLICE_TOKENS", slice_tokens)
    results = []
    for way in (lambda: token_logprobs(policy, IDS, WANTED, temperature)[0][:2], lambda: plainly(policy, temperature)):
        policy.zero_grad()
        logprobs, entropy = way()
        (logprobs * torch.arange(1.0, 9.0)).sum().backward()
        gradient = policy.model.layers[0].self_attn.q_proj.weight.grad.clone()
        results.append((logprobs.detach(), entropy.detach(), gradient))
    for got, wanted in zip(*results, strict=True):
        # A gradient is a sum of terms as large as its largest element: an element near 0 is as exact as that allows.
        torch.testing.assert_close(got, wanted, atol=1e-5 * max(1.0, wanted.abs().max().item()), rtol=1e-4)


def test_padding_on_the_right_changes_nothing(policy):
    short, _ = token_logprobs(policy, IDS[:1, :5], WANTED[:1, :5])
    padded, _ = token_logprobs(policy, IDS[:1], WANTED[:1])
    torch.testing.assert_close(short, padded, atol=1e-6, rtol=1e-6)


def test_nothing_predicts_a_first_token(policy):
    with pytest.raises(ValueError, match="first token"):
        token_logprobs(policy, IDS, torch.ones_like(WANTED))
