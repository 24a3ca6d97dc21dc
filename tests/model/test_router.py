"""Routing, replay and the routers' losses, against numbers by hand and against the tempting wrong ways."""

import math

import pytest
import torch
from transformers import Llama4TextConfig, LlamaConfig, LlamaForCausalLM

from model.router import (
    NOT_RECORDED,
    Route,
    Router,
    RouterLoss,
    balance_loss,
    expert_counts,
    freeze_routers,
    router_parameters,
    routes_of,
    slow_routers,
    z_loss,
)
from model.transformer import MoeForCausalLM


def tiny_model() -> MoeForCausalLM:
    torch.manual_seed(0)
    config = Llama4TextConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, intermediate_size_mlp=32, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_local_experts=4, num_experts_per_tok=1,
        interleave_moe_layer_step=2, attention_chunk_size=8, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    return MoeForCausalLM(config).train()


def route_of(logits: list[list[float]]) -> Route:
    logits_TE = torch.tensor(logits, requires_grad=True)
    expert_T = logits_TE.argmax(-1)
    return Route(logits_TE, expert_T, logits_TE.gather(1, expert_T[:, None])[:, 0].sigmoid(), expert_T)


def logit(gate: float) -> float:
    return math.log(gate / (1 - gate))


def identity_router(num_experts: int) -> Router:
    """Logits are the input itself."""
    router = Router(num_experts, num_experts)
    torch.nn.init.eye_(router.weight)
    return router


# --- routing and replay -------------------------------------------------------------------------------------------


def test_the_largest_logit_wins_the_first_of_equals_and_its_sigmoid_is_the_gate():
    route = identity_router(3)(torch.tensor([[0.5, 2.0, -1.0], [1.0, 1.0, 1.0], [-3.0, -2.0, -2.0]]))
    assert route.expert_T.tolist() == [1, 0, 1]
    torch.testing.assert_close(route.gate_T, torch.tensor([2.0, 1.0, -2.0]).sigmoid())
    assert not route.replayed


def test_a_gate_does_not_depend_on_a_tokens_place_in_the_batch():
    row = torch.tensor([[-1.3, 0.7311, 0.2]])
    for tokens in range(1, 70):
        gates = identity_router(3)(row.expand(tokens, 3)).gate_T
        assert (gates == gates[0]).all(), f"{tokens} tokens"
    plain = torch.full((69,), 0.7311).sigmoid()
    torch.testing.assert_close(gates, plain)


def test_routing_is_fp32_under_autocast():
    """1 and 1 + 2⁻¹⁰ are one number in bfloat16: the second expert would lose its token to the first."""
    x = torch.tensor([[1.0, 1.0 + 2**-10]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        route = identity_router(2)(x)
    assert route.logits_TE.dtype == torch.float32 and route.expert_T.tolist() == [1]


def test_a_replayed_token_goes_where_it_went_with_a_gate_from_live_logits_and_a_missing_one_by_itself():
    x = torch.tensor([[0.5, 2.0, -1.0], [3.0, 0.0, 1.0], [0.0, 1.0, 4.0]])
    route = identity_router(3)(x, torch.tensor([0, NOT_RECORDED, 2]))
    assert route.expert_T.tolist() == [0, 0, 2] and route.own_expert_T.tolist() == [1, 0, 2]
    torch.testing.assert_close(route.gate_T, torch.tensor([0.5, 3.0, 4.0]).sigmoid())
    assert route.replayed and route.num_missing == 1


@pytest.mark.parametrize("wrong", [-2, 3])
def test_an_id_that_is_no_expert_is_refused(wrong):
    with pytest.raises(ValueError, match=f"expert {wrong}; this layer has experts 0 to 2, and -1"):
        identity_router(3)(torch.zeros(1, 3), torch.tensor([wrong]))


def test_under_replay_the_router_learns_through_the_gate_of_the_recorded_expert():
    router = identity_router(3)
    x = torch.tensor([[0.5, 2.0, -1.0]])
    router(x, torch.tensor([2])).gate_T.sum().backward()
    slope = torch.tensor(-1.0).sigmoid() * torch.tensor(1.0).sigmoid()  # of a sigmoid at the third logit
    torch.testing.assert_close(router.weight.grad, torch.outer(torch.tensor([0.0, 0.0, 1.0]), x[0]) * slope)


IDS = torch.tensor([[1, 5, 7, 9, 3], [1, 8, 6, 0, 0]])
REAL = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def test_replaying_a_models_own_routes_changes_nothing_and_its_padding_is_nobodys_expert():
    model = tiny_model()
    plain = model.model(IDS, attention_mask=REAL, use_cache=False)
    own_TM = torch.stack([route.expert_T for route in plain.routes], dim=1)
    replay = torch.full((2, 5, 2), NOT_RECORDED)
    replay[REAL.bool()] = own_TM
    again = model.model(IDS, attention_mask=REAL, use_cache=False, replay=replay)
    for route in again.routes:
        assert len(route.expert_T) == 8 and route.num_missing == 0  # the two holes are no tokens at all
    torch.testing.assert_close(again.last_hidden_state, plain.last_hidden_state, atol=0, rtol=0)


def test_replay_decides_where_tokens_go_and_every_router_gets_a_gradient_from_it():
    model = tiny_model()
    replay = torch.full((2, 5, 2), 3)
    replay[0, 2] = NOT_RECORDED
    outputs = model.model(IDS, attention_mask=REAL, use_cache=False, replay=replay)
    for route in outputs.routes:
        own = int(route.own_expert_T[2])
        assert route.expert_T.tolist() == [3, 3, own, 3, 3, 3, 3, 3] and route.num_missing == 1
    outputs.last_hidden_state.square().sum().backward()
    for weight in router_parameters(model):
        assert weight.grad[3].abs().sum() > 0


def test_replay_of_another_number_of_layers_is_refused():
    with pytest.raises(ValueError, match=r"expected \[rows, tokens, MoE layers\] = \(2, 5, 2\)"):
        tiny_model()(IDS, attention_mask=REAL, use_cache=False, replay=torch.zeros(2, 5, 3, dtype=torch.long))


# --- losses -------------------------------------------------------------------------------------------------------


def test_balance_loss_by_hand():
    """Normalised gates (.75, .25), (.75, .25), (.25, .75): f = (2/3, 1/3), P = (7/12, 5/12), 2 Σ f P = 19/18."""
    route = route_of([[logit(0.6), logit(0.2)], [logit(0.3), logit(0.1)], [logit(0.2), logit(0.6)]])
    assert balance_loss([route]).item() == pytest.approx(19 / 18)
    softmax = route.logits_TE.softmax(-1).mean(0)
    assert abs(2 * (torch.tensor([2 / 3, 1 / 3]) @ softmax).item() - 19 / 18) > 5e-3  # the tempting wrong gates


def test_balance_loss_is_one_when_even_and_the_number_of_experts_at_worst():
    assert balance_loss([route_of([[2.0, -2.0], [-2.0, 2.0]])]).item() == pytest.approx(1.0)
    assert balance_loss([route_of([[50.0, -50.0, -50.0, -50.0]] * 3)]).item() == pytest.approx(4.0)


def test_z_loss_by_hand():
    route = route_of([[0.0, 0.0], [math.log(3.0), 0.0]])
    assert z_loss([route]).item() == pytest.approx((math.log(2) ** 2 + math.log(4) ** 2) / 2)


def cut_losses(model, cuts: list[slice], shares: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Router gradients of a batch of four rows in micro-batches; `shares` None takes each micro-batch's own."""
    ids, real = torch.cat([IDS, IDS.flip(1)]), torch.cat([REAL, REAL.flip(1)])
    model.zero_grad()
    loss = RouterLoss(balance_coef=0.5, z_coef=0.1, num_tokens=float(real.sum()), shares=shares)
    for cut in cuts:
        routes = model.model(ids[cut], attention_mask=real[cut], use_cache=False).routes
        if shares is None:
            loss.shares = torch.stack([expert_counts(route) / len(route.expert_T) for route in routes])
        loss(routes).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None} | {
        "sums": torch.tensor([loss.sums["balance"], loss.sums["z"]])
    }


def test_no_cut_of_a_batch_changes_the_router_losses_but_shares_of_a_micro_batch_would():
    model = tiny_model()
    ids, real = torch.cat([IDS, IDS.flip(1)]), torch.cat([REAL, REAL.flip(1)])
    routes = routes_of(model, ids, real)
    shares = torch.stack([expert_counts(route) / len(route.expert_T) for route in routes])
    whole = cut_losses(model, [slice(0, 4)], shares)
    assert whole["sums"][0].item() == pytest.approx(balance_loss(routes).item(), rel=1e-6)
    assert whole["sums"][1].item() == pytest.approx(z_loss(routes).item(), rel=1e-6)
    in_rows = [slice(i, i + 1) for i in range(4)]
    cut = cut_losses(model, in_rows, shares)
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, atol=1e-6, rtol=1e-4, msg=name)
    local = cut_losses(model, in_rows, None)
    router = "model.layers.1.feed_forward.router.weight"
    assert (local[router] - whole[router]).abs().max() > 10 * (cut[router] - whole[router]).abs().max() + 1e-3


# --- policies -----------------------------------------------------------------------------------------------------


def test_a_frozen_router_takes_no_gradient_and_nothing_else_is_frozen():
    model = tiny_model()
    freeze_routers(model)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == [f"model.layers.{layer}.feed_forward.router.weight" for layer in (1, 3)]


def test_slow_routers_step_by_a_share_of_the_learning_rate_and_nothing_else_does():
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    slow_routers(optimizer, model, 0.25)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # Adam's first step is the learning rate, whatever the gradient
    for name, parameter in model.named_parameters():
        moved = (before[name] - parameter).detach().mean().item()
        assert moved == pytest.approx(0.025 if ".router." in name else 0.1, rel=1e-4), name


def test_a_dense_model_has_no_routers():
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    freeze_routers(model)
    slow_routers(optimizer, model, 0.1)
    assert router_parameters(model) == [] and len(optimizer.param_groups) == 1
    assert all(parameter.requires_grad for parameter in model.parameters())
