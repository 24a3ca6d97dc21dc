"""Batcher and learner on a tiny random Llama 4, in this process."""

import dataclasses
import re
from collections import Counter
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file

from model.kernels.quantise import input_major, quantise
from model.precision import Fp8Settings, Scope
from model.router import routes_of
from model.router_watch import RoutedBatch
from rl.batcher import micro_batches
from rl.losses import Objective
from rl.types import TrainBatch

FP8 = Fp8Settings(recipe="row", keep_first_and_last=False)  # the tiny model's MoE layers are its first and its last
FP8_ALL = dataclasses.replace(FP8, scope=get_args(Scope))


def batch(rows=6, version=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = [3 + 2 * row for row in range(rows)]
    answers = [torch.randint(6, 60, (n,), generator=generator).tolist() for n in lengths]
    return TrainBatch(
        version=version,
        prompt_ids=[[1, 7, 9 + row] for row in range(rows)],
        answer_ids=answers,
        generator_logprobs=[[-4.0] * n for n in lengths],
        token_versions=[[version] * n for n in lengths],
        advantages=[1.0, -1.0, 0.0, 0.5, -0.5, 1.0][:rows],
    )


def test_micro_batches_keep_every_answer_token_with_signal_once():
    whole = batch()
    cuts = micro_batches(whole, max_tokens=30)
    assert len(cuts) > 1 and all(cut.ids_BS.numel() <= 30 for cut in cuts)
    kept = sorted(token for cut in cuts for token in cut.ids_BS[cut.answer_BS].tolist())
    wanted = sorted(t for row, tokens in enumerate(whole.answer_ids) if whole.advantages[row] for t in tokens)
    assert kept == wanted
    for cut in cuts:
        assert len(cut.advantages) == len(cut.generator_logprobs) == int(cut.answer_BS.sum())


def test_micro_batches_say_what_is_real_and_carry_routes_to_their_tokens():
    """Ids 10·token + layer, so that a misplaced one shows; row 3's record ends one token early, row 4 has none."""
    whole = batch()
    lengths = [len(p) + len(a) for p, a in zip(whole.prompt_ids, whole.answer_ids)]
    routes = [[[10 * token, 10 * token + 1] for token in range(n - (row == 3))] for row, n in enumerate(lengths)]
    routes[4] = None
    cuts = micro_batches(dataclasses.replace(whole, routes=routes), max_tokens=30)
    seen = {}
    for cut in cuts:
        for ids, real, replay in zip(cut.ids_BS, cut.real_BS, cut.replay_BSM):
            row = int(ids[2]) - 9  # a prompt ends with its row
            length = int(real.sum())
            assert length == lengths[row] and real[:length].all()
            assert (replay[length:] == -1).all(), "padding went to an expert"
            seen[row] = replay[:length].tolist()
    assert seen[0] == routes[0] and seen[5] == routes[5]
    assert seen[3] == [*routes[3], [-1, -1]] and seen[4] == [[-1, -1]] * lengths[4]
    assert all(cut.replay_BSM is None for cut in micro_batches(whole, 30))


def groups():
    """Two prompts, three answers each; one answer carries no signal."""
    whole = batch()
    return dataclasses.replace(whole, prompt_ids=[[1, 7, 9, 12]] * 3 + [[1, 8]] * 3)


def test_a_shared_prompt_is_there_once_in_each_micro_batch_that_needs_it():
    whole = groups()
    routes = [[[row]] * (len(p) + len(a)) for row, (p, a) in enumerate(zip(whole.prompt_ids, whole.answer_ids))]
    whole = dataclasses.replace(whole, routes=routes)
    (one,) = micro_batches(whole, 8192, share_prompts=True)
    assert one.position_BS[:, 0].tolist() == [0, 4, 0, 2, 2]
    assert one.real_BS.sum(1).tolist() == [4 + 3, 5, 2 + 9, 11, 13]
    assert one.answer_BS.sum(1).tolist() == [3, 5, 9, 11, 13] and one.answer_BS.sum() == len(one.advantages)
    assert one.ids_BS[1, :5].tolist() == whole.answer_ids[1] and one.replay_BSM[1, :5].unique().tolist() == [1]
    cuts = micro_batches(whole, 24, share_prompts=True)
    assert [cut.position_BS[:, 0].tolist() for cut in cuts] == [[0, 4, 0], [0], [0]]
    assert all(cut.real_BS.sum() <= 24 for cut in cuts)
    kept = [token for cut in cuts for token in cut.ids_BS[cut.answer_BS].tolist()]
    assert kept == [t for row in (0, 1, 3, 4, 5) for t in whole.answer_ids[row]]


def test_routes_that_cannot_belong_to_their_rows_are_refused():
    whole = batch(rows=2)
    with pytest.raises(ValueError, match="routes of 7 tokens for a row of 6"):
        micro_batches(dataclasses.replace(whole, routes=[[[0]] * 7, None]), 30)
    with pytest.raises(ValueError, match=r"routes name \[1, 2\] MoE layers"):
        micro_batches(dataclasses.replace(whole, routes=[[[0]] * 6, [[0, 0]] * 8]), 30)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from model.checkpoint import save_policy
    from model.tiny import TinyShape, tiny_llama4
    from model.tokenizer import build_tokenizer

    torch.manual_seed(0)
    tokenizer = build_tokenizer(["Compute 1+2.", "user", "assistant"], 300)
    shape = TinyShape(hidden_size=32, head_dim=16, expert_size=32, dense_size=64, num_experts=4)
    directory = tmp_path_factory.mktemp("tiny")
    save_policy(tiny_llama4(shape, tokenizer), tokenizer, directory)
    return str(directory)


def learner(checkpoint, **changes):
    from rl.learner import LearnerSettings, PolicyLearner

    settings = LearnerSettings(
        checkpoint=checkpoint,
        dtype="float32",
        learning_rate=1e-3,
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1e9,
        micro_batch_tokens=8192,
        temperature=1.0,
        router_policy="train",
        router_learning_rate_scale=0.1,
        balance_coef=0.0,
        z_coef=0.0,
        objective=Objective(clip_low=50.0, clip_high=1e9, ratio_cap=1e9),
        longest_answer=64,
        seed=0,
    )
    made = PolicyLearner(dataclasses.replace(settings, **changes))
    made.start()
    return made


def gradients(checkpoint, whole=None, share_prompts=False, **changes):
    made = learner(checkpoint, **changes)
    cuts = micro_batches(whole or batch(), made.settings.micro_batch_tokens, share_prompts)
    made.routers.begin_step([RoutedBatch(cut.ids_BS, cut.real_BS) for cut in cuts])
    for cut in cuts:
        made._backward(cut, made._denominators(cuts))
    return {name: p.grad for name, p in made.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("losses", [{}, {"balance_coef": 3.0, "z_coef": 0.5}])
def test_the_gradient_does_not_depend_on_the_cut(checkpoint, losses):
    whole, cut = gradients(checkpoint, **losses), gradients(checkpoint, micro_batch_tokens=16, **losses)
    assert whole.keys() == cut.keys()
    for name in whole:
        torch.testing.assert_close(whole[name], cut[name], atol=1e-5, rtol=1e-4, msg=name)


def test_neither_sharing_prompts_nor_where_a_group_is_cut_changes_the_gradient(checkpoint):
    whole = groups()
    alone = gradients(checkpoint, whole)
    for tokens in (8192, 40, 12):
        shared = gradients(checkpoint, whole, share_prompts=True, micro_batch_tokens=tokens)
        assert alone.keys() == shared.keys()
        for name in alone:
            torch.testing.assert_close(alone[name], shared[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"balance_coef": 3.0, "z_coef": 0.5},
        {"dtype": "bfloat16"},
        {"fp8": FP8},
        {"fp8": FP8_ALL, "dtype": "bfloat16"},
        {"updates": 2},
    ],
)
def test_activation_checkpointing_changes_no_bit_of_a_step_and_routes_no_token_twice(checkpoint, changes):
    kept, recomputed = (gradients(checkpoint, activation_checkpointing=on, **changes) for on in (False, True))
    assert kept.keys() == recomputed.keys() and all(torch.equal(kept[name], recomputed[name]) for name in kept)
    seen = []
    for on in (False, True):
        made = learner(checkpoint, activation_checkpointing=on, **changes)
        calls = Counter()
        for layer in made.model.model.layers:  # before a call: a recomputed one ends as soon as all is there again
            layer.self_attn.register_forward_pre_hook(lambda *_, calls=calls: calls.update(["attention"]))
            if hasattr(layer.feed_forward, "router"):
                layer.feed_forward.router.register_forward_pre_hook(lambda *_, calls=calls: calls.update(["router"]))
        metrics = made.step(batch()).metrics
        del metrics["learner_step_s"], metrics["publish_ms"]
        seen.append((metrics, calls, weights_of(made)))
    (metrics, calls, weights), (metrics_again, calls_again, weights_again) = seen
    assert metrics == metrics_again and all(torch.equal(weights[name], weights_again[name]) for name in weights)
    assert calls_again["router"] == calls["router"] > 0
    layers = len(made.model.model.layers)
    assert calls_again["attention"] - calls["attention"] == layers * changes.get("updates", 1), "nothing was recomputed"


def test_prompts_are_shared_unless_the_routers_losses_count_their_tokens(checkpoint):
    assert learner(checkpoint)._shares_prompts()
    assert not learner(checkpoint, balance_coef=0.1)._shares_prompts()
    assert not learner(checkpoint, z_coef=0.1)._shares_prompts()


def test_the_balance_loss_evens_the_load_out(checkpoint):
    unbalanced, balanced = (learner(checkpoint, balance_coef=coef, learning_rate=3e-3) for coef in (0.0, 30.0))
    for made in (unbalanced, balanced):
        for version in range(6):
            made.step(batch(version=version))
    first, last = (made.step(batch(version=6)).metrics for made in (unbalanced, balanced))
    assert last["router/load_entropy"] > first["router/load_entropy"]
    assert "router/balance_loss" not in first and 0.9 < last["router/balance_loss"] < 2.0


def test_a_step_raises_the_probability_of_what_was_rewarded(checkpoint):
    from model.logprobs import token_logprobs

    made = learner(checkpoint)
    cuts = micro_batches(batch(), 8192)

    def objective():
        with torch.no_grad():
            stats = [token_logprobs(made.model, cut.ids_BS, cut.answer_BS)[0] for cut in cuts]
        return sum((stat.logprob_T * cut.advantages).sum() for stat, cut in zip(stats, cuts))

    before = objective()
    report = made.step(batch())
    assert objective() > before
    assert report.version == 1 and report.metrics["grad_norm"] > 0


def moved(made, **changes):
    """Largest change of each parameter after one step, by name."""
    before = {name: p.clone() for name, p in made.model.named_parameters()}
    made.step(batch(**changes))
    return {name: (p - before[name]).abs().max().item() for name, p in made.model.named_parameters()}


def test_a_frozen_router_stays_as_it_is(checkpoint):
    changes = moved(learner(checkpoint, router_policy="frozen"))
    assert all(change == 0.0 for name, change in changes.items() if ".router." in name)
    assert any(changes.values())


def test_a_slow_router_takes_its_share_of_the_learning_rate_through_warmup(checkpoint):
    """Adam's first step is as long as the learning rate: here half of 1e-3, and a tenth of it."""
    changes = moved(learner(checkpoint, router_policy="low_lr", router_learning_rate_scale=0.1, warmup_steps=2))
    for name, change in changes.items():
        assert change == pytest.approx(5e-5 if ".router." in name else 5e-4, rel=0.02), name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_parts_of_the_model_have_rates_of_their_own(checkpoint, optimizer):
    """Adam's first step is as long as the rate."""
    made = learner(checkpoint, optimizer=optimizer, rate_scales={"head": 4.0, "vectors": 0.5}, router_policy="low_lr")
    changes = moved(made)
    for name, scale in {"lm_head.weight": 4.0, "model.norm.weight": 0.5, "model.embed_tokens.weight": 1.0}.items():
        assert changes[name] == pytest.approx(1e-3 * scale, rel=0.02), name
    assert all(change == pytest.approx(1e-4, rel=0.02) for name, change in changes.items() if ".router." in name)


def test_the_learning_rate_declines_to_its_share_at_the_last_step(checkpoint):
    made = learner(checkpoint, warmup_steps=2, num_steps=5, last_rate=0.2)
    rates = [made.step(dataclasses.replace(batch(), version=version)).metrics["learning_rate"] for version in range(6)]
    assert rates == pytest.approx([0.5e-3, 0.8e-3, 0.6e-3, 0.4e-3, 0.2e-3, 0.2e-3])
    assert learner(checkpoint, num_steps=5).step(batch()).metrics["learning_rate"] == 1e-3


def weights_of(made):
    return {name: p.detach().clone() for name, p in made.model.named_parameters()}


def on_policy(checkpoint):
    """The batch, as if this checkpoint had sampled it."""
    from model.logprobs import token_logprobs

    whole, made = batch(), learner(checkpoint)
    rows = []
    for prompt, answer in zip(whole.prompt_ids, whole.answer_ids):
        ids = torch.tensor([prompt + answer])
        is_answer = torch.tensor([[False] * len(prompt) + [True] * len(answer)])
        rows.append(token_logprobs(made.model, ids, is_answer)[0].logprob_T.tolist())
    return dataclasses.replace(whole, generator_logprobs=rows)


@pytest.mark.parametrize("proximal", ["rollout", "recomputed"])
def test_several_updates_on_a_batch_are_as_many_steps_around_the_policy_of_its_start(checkpoint, proximal):
    whole = on_policy(checkpoint)
    tight = Objective(clip_low=1e-3, clip_high=1e-3, proximal=proximal)
    at_once = learner(checkpoint, objective=tight, updates=3)
    said = at_once.step(whole).metrics
    one_by_one = learner(checkpoint, objective=dataclasses.replace(tight, proximal="rollout"))
    for version in range(3):
        one_by_one.step(dataclasses.replace(whole, version=version))
    assert said["clip_share"] == 0.0 and said["last_clip_share"] > 0.5 and at_once.version == 1
    for name, weights in weights_of(one_by_one).items():
        assert torch.allclose(weights, weights_of(at_once)[name], atol=1e-7), name


def recorded(made, shift=0):
    """The learner's own routes as an engine records them: of every token but the last. `shift` plants an offset."""
    whole = batch()
    routes = []
    for prompt, answer in zip(whole.prompt_ids, whole.answer_ids):
        ids = torch.tensor([prompt + answer])
        layers = [route.expert_T for route in routes_of(made.model, ids, torch.ones_like(ids))]
        routes.append(torch.stack(layers, dim=1)[:-1].roll(shift, dims=0).tolist())
    return dataclasses.replace(whole, routes=routes)


def test_replaying_the_learners_own_routes_is_the_same_step_and_an_offset_of_one_shows(checkpoint):
    plain = learner(checkpoint).step(batch()).metrics
    right = learner(checkpoint).step(recorded(learner(checkpoint))).metrics
    shifted = learner(checkpoint).step(recorded(learner(checkpoint), shift=1)).metrics
    assert right["loss"] == pytest.approx(plain["loss"], abs=1e-6)
    assert right["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)
    assert right["router/agreement"] == 1.0 and shifted["router/agreement"] < 0.8
    assert right["router_replay_missing"] == 5  # the last token of each of the five rows with signal
    assert shifted["loss"] != pytest.approx(plain["loss"], abs=1e-6)
    assert "router/agreement" not in plain and "router_replay_missing" not in plain


def test_the_router_learns_under_replay(checkpoint):
    made = learner(checkpoint)
    before = {name: p.clone() for name, p in made.model.named_parameters() if ".router." in name}
    made.step(recorded(made))
    assert all(not torch.equal(p, before[name]) for name, p in made.model.named_parameters() if name in before)


def test_a_step_reports_what_its_routers_do(checkpoint):
    made = learner(checkpoint)
    metrics = made.step(batch()).metrics
    assert {f"router/layer{layer}/max_vio" for layer in made.model.config.moe_layers} < metrics.keys()
    assert 0 < metrics["router/drift"] < 0.01, "one small step moves a router a little"
    assert all(isinstance(value, float) for value in metrics.values())


def published(made, path):
    made.publish(str(path))
    return load_file(path)


@pytest.mark.parametrize(("fp8", "layers"), [(FP8, 2), (FP8_ALL, 4)])
def test_under_fp8_engines_get_the_weights_that_fp8_computes_with_and_checkpoints_the_exact_ones(
    checkpoint, tmp_path, fp8, layers
):
    made = learner(checkpoint, fp8=fp8)
    metrics = made.step(batch()).metrics
    assert metrics["fp8/layers"] == layers and metrics["fp8/layer1/gate_up.weight/snr_db"] > 25
    exact, served = dict(made.model.named_parameters()), published(made, tmp_path / "w.safetensors")
    for name, tensor in served.items():
        is_low = ".experts." in name or fp8 is FP8_ALL and re.search(r"layers.*(attn|forward|expert)\..*_proj", name)
        assert torch.equal(tensor, exact[name]) != bool(is_low), name
        if is_low:
            stored = quantise(input_major(exact[name].detach()), "row", axis=1).dequantise()
            torch.testing.assert_close(tensor, stored if tensor.dim() == 3 else stored[0].T)
    made.save(str(tmp_path / "checkpoint"))
    saved = load_file(tmp_path / "checkpoint" / "model.safetensors")
    assert all(torch.equal(saved[name], exact[name]) for name in exact)


def test_fp8_changes_the_step_a_little_and_bf16_again_not_at_all(checkpoint):
    plain = learner(checkpoint).step(batch()).metrics
    rounded = learner(checkpoint, fp8=FP8).step(batch()).metrics
    assert rounded["loss"] != plain["loss"]
    assert rounded["loss"] == pytest.approx(plain["loss"], rel=0.05)


def test_a_layer_that_fp8_stores_too_badly_leaves_it_and_says_so(checkpoint, tmp_path):
    made = learner(checkpoint, fp8=dataclasses.replace(FP8, min_snr_db=100.0))
    report = made.step(batch())
    assert len(report.extras["notes"]) == 2 and "goes back to BF16" in report.extras["notes"][0]
    again = made.step(batch(version=1))
    assert again.metrics["fp8/layers"] == 0 and again.extras["notes"] == []
    exact, served = dict(made.model.named_parameters()), published(made, tmp_path / "w.safetensors")
    assert all(torch.equal(served[name], exact[name]) for name in served)


def test_a_batch_of_another_version_is_refused(checkpoint):
    with pytest.raises(RuntimeError, match="version 3"):
        learner(checkpoint).step(batch(version=3))


def test_a_batch_without_signal_moves_nothing_but_the_version(checkpoint):
    made = learner(checkpoint)
    before = {name: p.clone() for name, p in made.model.named_parameters()}
    made.step(dataclasses.replace(batch(), advantages=[0.0] * 6))
    assert made.version == 1
    assert all(torch.equal(p, before[name]) for name, p in made.model.named_parameters())


def test_publishing_changed_weights_changes_the_digest(checkpoint, tmp_path):
    made = learner(checkpoint)
    first = made.publish(str(tmp_path / "a.safetensors"))
    assert made.publish(str(tmp_path / "b.safetensors")) == first
    made.step(batch())
    assert made.publish(str(tmp_path / "c.safetensors")) != first


def test_bfloat16_keeps_small_steps_in_the_weights_and_publishes_a_cast_copy(checkpoint, tmp_path):
    made = learner(checkpoint, dtype="bfloat16", learning_rate=1e-6)
    before = {name: p.clone() for name, p in made.model.named_parameters()}
    made.step(batch(), str(tmp_path / "w.safetensors"))
    assert any(not torch.equal(p, before[name]) for name, p in made.model.named_parameters())
    assert {tensor.dtype for tensor in load_file(tmp_path / "w.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("family", "recomputes"), [("Llama", False), ("Qwen2", False), ("Qwen3", False), ("Llama", True)]
)
def test_any_other_causal_lm_steps_publishes_and_saves(checkpoint, tmp_path, family, recomputes):
    import transformers

    from model.checkpoint import load_policy
    from model.tokenizer import load_tokenizer

    config = getattr(transformers, f"{family}Config")(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(tmp_path / "source")
    load_tokenizer(checkpoint).save_pretrained(tmp_path / "source")
    made = learner(str(tmp_path / "source"), activation_checkpointing=recomputes)
    assert made.model.is_gradient_checkpointing == recomputes
    assert type(made.model).__name__ == f"{family}ForCausalLM"
    before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    report = made.step(batch(), str(tmp_path / "v1.safetensors"))
    assert report.metrics["grad_norm"] > 0 and "router/max_vio" not in report.metrics
    moved = {name for name, tensor in made.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == before.keys()
    made.save(str(tmp_path / "out"))
    published, saved = load_file(tmp_path / "v1.safetensors"), load_policy(tmp_path / "out").state_dict()
    assert published.keys() == load_file(tmp_path / "source" / "model.safetensors").keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in published.items())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"fp8": FP8_ALL},
        {"fp8": dataclasses.replace(FP8_ALL, min_snr_db=100.0)},
        {"optimizer": "muon", "rate_scales": {"head": 2.0}},
    ],
    ids=["plain", "fp8", "fp8 that fell back", "muon"],
)
def test_a_resumed_learner_steps_on_bit_for_bit(checkpoint, tmp_path, changes):
    first, other, forgetful = (learner(checkpoint, warmup_steps=3, **changes) for _ in range(3))
    first.step(batch())
    first.save_state(str(tmp_path / "learner.pt"))
    for resumed in (other, forgetful):
        resumed.load_state(str(tmp_path / "learner.pt"))
    for optimizer in forgetful.optimizers:
        optimizer.state.clear()
    one, two, three = (
        resumed.step(batch(version=1, seed=1), str(tmp_path / name))
        for resumed, name in ((first, "1"), (other, "2"), (forgetful, "3"))
    )
    for report in (one, two):
        del report.metrics["learner_step_s"], report.metrics["publish_ms"]
    assert one.metrics == two.metrics and one.published == two.published
    assert all(torch.equal(a, b) for a, b in zip(first.model.state_dict().values(), other.model.state_dict().values()))
    assert three.published != one.published, "without its moments the optimiser goes elsewhere"
