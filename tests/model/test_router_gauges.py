"""The routers' gauges by hand, and on a tiny model: counted once, zero drift at the start, an offset found."""

import contextlib
import math

import pytest
import torch
from transformers import Llama4TextConfig, LlamaConfig, LlamaForCausalLM

from model.router import NOT_RECORDED, router_parameters, routes_of
from model.router_gauges import (
    DriftProbe,
    RouterLoad,
    jensen_shannon,
    load_gauges,
    named,
    probe_rows,
    recorded_shares,
)
from model.router_watch import RoutedBatch, RouterWatch
from model.transformer import MoeForCausalLM


@pytest.fixture
def moe() -> MoeForCausalLM:
    torch.manual_seed(0)
    config = Llama4TextConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, intermediate_size_mlp=32, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_local_experts=4, num_experts_per_tok=1,
        interleave_moe_layer_step=2, attention_chunk_size=8, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    return MoeForCausalLM(config).train()


IDS = torch.randint(3, 32, (4, 12), generator=torch.Generator().manual_seed(1))
REAL = torch.arange(12) < torch.tensor([[12], [9], [5], [12]])  # 38 tokens


def watch(model, balance_coef=0.0, z_coef=0.0) -> RouterWatch:
    return RouterWatch(model, balance_coef=balance_coef, z_coef=z_coef, autocast=contextlib.nullcontext)


# --- by hand ------------------------------------------------------------------------------------------------------


def test_load_gauges_by_hand():
    """Of 8 tokens 4, 2, 2 and 0: H = ½ ln 2 + ½ ln 4 = 1.5 ln 2, over ln 4."""
    gauges = load_gauges(torch.tensor([4.0, 2.0, 2.0, 0.0]))
    assert gauges == pytest.approx({"max_vio": 1.0, "load_entropy": 0.75, "dead_share": 0.25})


@pytest.mark.parametrize(
    ("counts", "expected"),
    [([5.0] * 4, {"max_vio": 0.0, "load_entropy": 1.0, "dead_share": 0.0}),
     ([20.0, 0.0, 0.0, 0.0], {"max_vio": 3.0, "load_entropy": 0.0, "dead_share": 0.75}),
     ([100.0, 100.0, 100.0, 7.0], {"max_vio": 0.3029, "load_entropy": 0.8529, "dead_share": 0.25})],
)  # fmt: skip
def test_load_gauges_at_their_ends(counts, expected):
    assert load_gauges(torch.tensor(counts)) == pytest.approx(expected, abs=1e-4)


def test_jensen_shannon_by_hand():
    p = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.75, 0.25]])
    q = torch.tensor([[0.5, 0.5], [0.0, 1.0], [0.25, 0.75]])
    third = math.log(2) - (0.75 * math.log(4 / 3) + 0.25 * math.log(4))  # ln 2 - H(¾, ¼): the middle is even
    torch.testing.assert_close(jensen_shannon(p, q), torch.tensor([0.0, math.log(2), third]))


def test_the_metric_without_a_layer_is_that_of_the_worst():
    metrics = named([{"max_vio": 0.5, "load_entropy": 0.9}, {"max_vio": 0.2, "load_entropy": 0.4}], [1, 3])
    assert metrics == {
        "router/layer1/max_vio": 0.5, "router/layer1/load_entropy": 0.9, "router/layer3/max_vio": 0.2,
        "router/layer3/load_entropy": 0.4, "router/max_vio": 0.5, "router/load_entropy": 0.4,
    }  # fmt: skip


def test_recorded_shares_count_what_was_recorded_and_refuse_a_thin_record():
    replay = torch.tensor([[0, 1]] * 6 + [[2, 1]] * 3 + [[NOT_RECORDED] * 2])
    shares = recorded_shares([replay[:4], replay[4:]], 3)
    torch.testing.assert_close(shares, torch.tensor([[6 / 9, 0, 3 / 9], [0, 1, 0]]))
    assert recorded_shares([replay[:4], torch.full((1, 2), NOT_RECORDED)], 3) is None


def test_the_probe_takes_documents_from_all_over_and_no_more_tokens_than_allowed():
    documents = [[i] * 10 for i in range(100)]
    rows = probe_rows(documents, 45)
    assert [len(row) for row in rows] == [10, 10, 10, 10, 5]
    assert max(row[0] for row in rows) - min(row[0] for row in rows) > 50
    assert probe_rows(documents[:2], 45) == documents[:2]


# --- on a model ---------------------------------------------------------------------------------------------------


def test_counts_are_of_real_tokens_and_micro_batches_add_up(moe):
    whole, cut = RouterLoad(), RouterLoad()
    whole.add(routes_of(moe, IDS, REAL))
    for row in range(4):
        cut.add(routes_of(moe, IDS[row : row + 1], REAL[row : row + 1]))
    assert whole.sums[:, :4].sum(1).tolist() == [38, 38]
    torch.testing.assert_close(cut.sums, whole.sums)
    left, right, joined = RouterLoad(), RouterLoad(), RouterLoad()
    left.add(routes_of(moe, IDS[:2], REAL[:2]))
    right.add(routes_of(moe, IDS[2:], REAL[2:]))
    for part in (left, right, RouterLoad()):
        joined.join(part)
    torch.testing.assert_close(joined.sums, whole.sums)


def test_activation_checkpointing_counts_every_token_once(moe):
    moe.gradient_checkpointing_enable()
    calls = []
    for layer in moe.model.layers:
        if hasattr(layer.feed_forward, "router"):
            layer.feed_forward.router.register_forward_hook(lambda *_: calls.append(1))
    seen = watch(moe)
    batch = RoutedBatch(IDS, REAL)
    seen.begin_step([batch])
    calls.clear()
    outputs = moe.model(IDS, attention_mask=REAL, use_cache=False)
    seen.loss(outputs.routes)
    outputs.last_hidden_state.sum().backward()  # here layers are computed a second time
    assert len(calls) == 2, "a layer routed twice"
    assert seen.load.sums[:, :4].sum(1).tolist() == [38, 38]


def test_drift_is_zero_at_the_start_and_sees_a_moved_router(moe):
    documents = [ids[real].tolist() for ids, real in zip(IDS, REAL, strict=True)]
    probe = DriftProbe.taken(moe, documents)
    for layer in probe.by_layer(moe):
        assert layer == {"drift": pytest.approx(0.0, abs=1e-7), "moved": 0.0}
    router_parameters(moe)[1].data.neg_()
    first, second = probe.by_layer(moe)
    assert first["drift"] < 1e-7 and first["moved"] == 0.0
    assert 0.01 < second["drift"] < math.log(2) and second["moved"] > 0.5


def replay_of(moe, shift: int) -> torch.Tensor:
    """The model's own routes as an engine would record them: none for a row's last token. `shift` plants an offset."""
    replay = torch.full((*IDS.shape, 2), NOT_RECORDED)
    replay[REAL] = torch.stack([route.expert_T for route in routes_of(moe, IDS, REAL)], dim=1)
    for row, length in enumerate(REAL.sum(1).tolist()):
        replay[row, : length - 1] = replay[row, : length - 1].roll(shift, dims=0)
        replay[row, length - 1 :] = NOT_RECORDED
    return replay


@pytest.mark.parametrize(("shift", "low", "high"), [(0, 1.0, 1.0), (1, 0.0, 0.75)])
def test_agreement_is_one_for_its_own_routes_and_falls_when_they_are_off_by_one(moe, shift, low, high):
    seen = watch(moe)
    batch = RoutedBatch(IDS, REAL, replay_of(moe, shift))
    seen.begin_step([batch])
    seen.loss(routes_of(moe, *batch))
    metrics = seen.end_step()
    assert low <= metrics["router/agreement"] <= high
    assert metrics["router_replay_missing"] == 4  # the last token of each row


def test_without_a_replay_there_is_no_agreement_and_nothing_is_missing(moe):
    seen = watch(moe)
    seen.begin_step([RoutedBatch(IDS, REAL)])
    seen.loss(routes_of(moe, IDS, REAL))
    gauges = {"max_vio", "load_entropy", "dead_share", "drift", "moved"}
    assert set(seen.end_step()) == {f"router/{part}{gauge}" for part in ("", "layer1/", "layer3/") for gauge in gauges}


def test_shares_for_the_balance_loss_come_from_a_replay_without_a_forward_pass(moe):
    seen = watch(moe, balance_coef=1.0)
    calls = []
    seen.begin_step([RoutedBatch(IDS, REAL)])  # the probe runs now, not below
    moe.model.register_forward_hook(lambda *_: calls.append(1))
    replay = replay_of(moe, 0)
    replay[REAL] = replay[REAL].clamp(min=0)
    calls.clear()
    seen.begin_step([RoutedBatch(IDS, REAL, replay)])
    assert calls == []
    seen.begin_step([RoutedBatch(IDS, REAL)])
    assert calls == [1]
    torch.testing.assert_close(seen.router_loss.shares.sum(1), torch.ones(2))


def test_a_dense_model_has_no_router_metrics():
    config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    seen = watch(LlamaForCausalLM(config), balance_coef=1.0, z_coef=1.0)
    seen.begin_step([RoutedBatch(IDS, REAL)])
    assert seen.loss(()) == 0.0 and seen.end_step() == {}
