"""Muon against torch's and against the singular value decomposition; which parameter is whose."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from model.optimizers import MOMENTUM, Muon, make_optimizers, orthogonal, parts
from model.router import freeze_routers
from model.tiny import TinyShape, tiny_llama4
from model.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def llama4():
    shape = TinyShape(hidden_size=32, head_dim=16, expert_size=32, dense_size=64, num_experts=4)
    return tiny_llama4(shape, build_tokenizer(["a b"], 300))


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16), (3, 16, 40), (2, 3, 40, 16)], ids=str)
def test_directions_stay_and_lengths_become_one(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    u, lengths, vt = torch.linalg.svd(orthogonal(matrices), full_matrices=False)
    assert 0.65 < lengths.min() and lengths.max() < 1.25
    u_of, _, vt_of = torch.linalg.svd(matrices, full_matrices=False)
    aligned = u_of.mT @ orthogonal(matrices) @ vt_of.mT  # diagonal, if the singular vectors are those of the matrix
    torch.testing.assert_close(aligned, torch.diag_embed(aligned.diagonal(dim1=-2, dim2=-1)), atol=1e-4, rtol=0)
    assert (aligned.diagonal(dim1=-2, dim2=-1) > 0).all()


def test_the_length_of_a_gradient_counts_for_nothing_and_none_moves_nothing():
    torch.manual_seed(0)
    matrix = torch.randn(16, 24)
    torch.testing.assert_close(orthogonal(1e-8 * matrix), orthogonal(matrix), atol=1e-5, rtol=1e-4)
    assert not orthogonal(torch.zeros(3, 4, 5)).any()


def test_each_matrix_of_a_stack_goes_alone():
    torch.manual_seed(0)
    stack = torch.randn(4, 16, 24) * torch.tensor([1.0, 1e3, 1e-3, 0.0])[:, None, None]
    torch.testing.assert_close(orthogonal(stack), torch.stack([orthogonal(matrix) for matrix in stack]))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)], ids=str)
def test_steps_are_those_of_torch(shape):
    """Which multiplies in bf16: singular values are off by some per cent, and so may a step be."""
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), torch.randn(6, *shape)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    settings = {"lr": 0.03, "weight_decay": 0.1}
    pair = (Muon([ours], momentum=MOMENTUM, **settings),
            torch.optim.Muon([theirs], momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw", **settings))  # fmt: skip
    for gradient in gradients:
        for parameter, optimizer in zip((ours, theirs), pair):
            parameter.grad = gradient.clone()
            optimizer.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved
    assert (ours - start).norm() > 0.5 * moved


def test_a_step_is_as_long_as_one_of_adam():
    """By the root mean square: 0.2 of the rate, as AdamW's are once gradients alternate (Moonlight)."""
    matrix = torch.nn.Parameter(torch.zeros(64, 96))
    matrix.grad = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    Muon([matrix], lr=1e-3).step()
    assert matrix.square().mean().sqrt().item() == pytest.approx(0.2e-3, rel=0.2)


def test_every_trainable_parameter_is_in_one_group_at_its_rate(llama4):
    freeze_routers(llama4)
    muon, adam = make_optimizers(llama4, "muon", 1e-3, 0.1, {"embedding": 4.0, "head": 2.0, "matrices": 0.5})
    rates = {id(p): group["lr"] for made in (muon, adam) for group in made.param_groups for p in group["params"]}
    trained = {name: p for name, p in llama4.named_parameters() if p.requires_grad}
    assert len(rates) == len(trained) == sum(len(g["params"]) for made in (muon, adam) for g in made.param_groups)
    for name, parameter in trained.items():
        scale = 4.0 if "embed_tokens" in name else 2.0 if "lm_head" in name else 1.0 if parameter.ndim == 1 else 0.5
        assert rates[id(parameter)] == 1e-3 * scale, name
    of_muon = {id(p) for group in muon.param_groups for p in group["params"]}
    assert {name for name, p in trained.items() if id(p) in of_muon} == {
        name for name in trained if "layers" in name and "norm" not in name
    }


def test_adamw_alone_moves_every_parameter_as_torch_does(llama4):
    ours, theirs = copy.deepcopy(llama4).requires_grad_(True), copy.deepcopy(llama4).requires_grad_(True)
    (adam,) = make_optimizers(ours, "adamw", 1e-3, 0.1)
    plain = torch.optim.AdamW(theirs.parameters(), 1e-3, (0.9, 0.95), weight_decay=0.1, fused=True)
    for model, optimizer in ((ours, adam), (theirs, plain)):
        torch.manual_seed(1)
        for _ in range(2):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
    for (name, mine), other, start in zip(ours.named_parameters(), theirs.parameters(), llama4.parameters()):
        assert torch.equal(mine, other) and not torch.equal(mine, start), name


def test_an_expert_that_no_token_came_to_stays():
    """Its averaged gradient is not nought, and made orthogonal it would be a step of full length, for ever."""
    stack = torch.nn.Parameter(torch.zeros(3, 16, 24))
    muon = Muon([stack], lr=1e-3)
    stack.grad = torch.randn(3, 16, 24, generator=torch.Generator().manual_seed(0))
    muon.step()
    before = stack.detach().clone()
    stack.grad[1] = 0.0
    muon.step()
    assert [torch.equal(now, then) for now, then in zip(stack, before)] == [False, True, False]


def test_a_tied_head_is_the_embedding():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 40}
    config = LlamaConfig(
        **sizes, num_attention_heads=2, attention_bias=True, tie_word_embeddings=True
    )  # as many biases and norms as matrices
    tied = LlamaForCausalLM(config)
    found = [part for part, _ in parts(tied)]
    assert found.count("embedding") == 1 and "head" not in found
    assert set(found) == {"embedding", "vectors", "matrices"}
    assert len(make_optimizers(tied, "muon", 1e-3)) == 2
    with pytest.raises(ValueError, match="rate_scales: head: this model trains embedding, matrices, vectors"):
        make_optimizers(tied, "adamw", 1e-3, rate_scales={"head": 4.0})
