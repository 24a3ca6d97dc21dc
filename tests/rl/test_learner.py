"""Batcher and learner on a tiny random Llama 4, in this process."""

import dataclasses

import pytest
import torch

from rl.batcher import micro_batches
from rl.types import TrainBatch


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
    cuts = micro_batches(whole, max_padded_tokens=30)
    assert len(cuts) > 1 and all(cut.ids_BS.numel() <= 30 for cut in cuts)
    kept = sorted(token for cut in cuts for token in cut.ids_BS[cut.answer_BS].tolist())
    wanted = sorted(t for row, tokens in enumerate(whole.answer_ids) if whole.advantages[row] for t in tokens)
    assert kept == wanted
    for cut in cuts:
        assert len(cut.advantages) == len(cut.generator_logprobs) == int(cut.answer_BS.sum())


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
        checkpoint=checkpoint, dtype="float32", learning_rate=1e-3, warmup_steps=0, weight_decay=0.0, max_grad_norm=1e9,
        micro_batch_tokens=8192, temperature=1.0, train_router=True, clip_low=50.0, clip_high=1e9, mismatch_cap=1e9,
        seed=0,
    )
    made = PolicyLearner(dataclasses.replace(settings, **changes))
    made.start()
    return made


def gradients(checkpoint, **changes):
    made = learner(checkpoint, **changes)
    denominator = float(sum(len(a) for a, advantage in zip(batch().answer_ids, batch().advantages) if advantage))
    for cut in micro_batches(batch(), made.settings.micro_batch_tokens):
        made._backward(cut, denominator)
    return {name: p.grad for name, p in made.model.named_parameters() if p.grad is not None}


def test_the_gradient_does_not_depend_on_the_cut(checkpoint):
    whole, cut = gradients(checkpoint), gradients(checkpoint, micro_batch_tokens=16)
    assert whole.keys() == cut.keys()
    for name in whole:
        torch.testing.assert_close(whole[name], cut[name], atol=1e-5, rtol=1e-4, msg=name)


def test_a_step_raises_the_probability_of_what_was_rewarded(checkpoint):
    from model.logprobs import token_logprobs

    made = learner(checkpoint)
    cuts = micro_batches(batch(), 8192)

    def objective():
        with torch.no_grad():
            return sum((token_logprobs(made.model, c.ids_BS, c.answer_BS)[0] * c.advantages).sum() for c in cuts)

    before = objective()
    report = made.step(batch())
    assert objective() > before
    assert report.version == 1 and report.metrics["grad_norm"] > 0


def test_a_frozen_router_stays_as_it_is(checkpoint):
    made = learner(checkpoint, train_router=False)
    before = {name: p.clone() for name, p in made.model.named_parameters()}
    made.step(batch())
    changed = {name for name, p in made.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and not any(".router." in name for name in changed)


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
    from safetensors.torch import load_file

    made = learner(checkpoint, dtype="bfloat16", learning_rate=1e-6)
    before = {name: p.clone() for name, p in made.model.named_parameters()}
    made.step(batch(), str(tmp_path / "w.safetensors"))
    assert any(not torch.equal(p, before[name]) for name, p in made.model.named_parameters())
    assert {tensor.dtype for tensor in load_file(tmp_path / "w.safetensors").values()} == {torch.bfloat16}
