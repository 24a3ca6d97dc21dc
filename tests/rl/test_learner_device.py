"""The learner's device: which one it takes, and that on a (pretended) GPU everything of a step lies there."""

import dataclasses

import pytest
import torch
from pretended_gpu import GpuTensor, pretended_gpu
from safetensors.torch import load_file
from test_learner import batch, checkpoint, groups, learner, recorded  # noqa: F401  a fixture is used by its name

from model.device import backends, own_device
from rl.batcher import MicroBatch
from rl.losses import Objective


def test_a_process_trains_on_the_gpu_that_it_can_see_and_else_on_the_cpu(monkeypatch):
    assert own_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert own_device() == torch.device("cuda:0")


def test_learners_on_gpus_talk_through_nccl_and_hand_objects_through_gloo():
    assert backends(torch.device("cpu")) == "gloo"
    assert backends(torch.device("cuda:0")) == "cpu:gloo,cuda:nccl"


def on_gpu(values):
    """All tensors among them, by whether they are there."""
    return {isinstance(value, GpuTensor) for value in values if isinstance(value, torch.Tensor)}


def state_of(made):
    """Every tensor that a step reads or writes beside its batch."""
    states = [state for optimizer in made.optimizers for state in optimizer.state.values()]
    moments = [value for state in states for value in state.values()]
    probe = made.routers.probe
    return [*made.model.parameters(), *moments, probe.ids_BS, probe.real_BS, *probe.logits_LTE, *probe.expert_LT]


SEVERAL_CUTS = {"micro_batch_tokens": 16, "balance_coef": 3.0, "z_coef": 0.5}
TIGHT = Objective(clip_low=1e-3, clip_high=1e-3, proximal="log_linear", ratio="sequence", mismatch="sequence_mask")


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (batch, {}),
        (batch, SEVERAL_CUTS),
        (groups, {"updates": 2, "objective": dataclasses.replace(TIGHT, entropy_coef=0.1, kl_coef=0.1)}),
        (groups, {"objective": dataclasses.replace(TIGHT, aggregation="sequence_mean"), "router_policy": "low_lr"}),
        (None, SEVERAL_CUTS),
        (None, {"dtype": "bfloat16"}),
        (batch, {"optimizer": "muon", "rate_scales": {"head": 2.0}}),
    ],
    ids=[
        "plain",
        "router losses",
        "two updates",
        "slow routers",
        "router losses under replay",
        "replay in bfloat16",
        "muon",
    ],
)
def test_a_step_on_a_gpu_mixes_no_devices_and_is_the_step_of_a_cpu(checkpoint, tmp_path, changes, make):  # noqa: F811
    whole = make() if make else recorded(learner(checkpoint))
    expected = learner(checkpoint, device="cpu", **changes)
    wanted = expected.step(whole, str(tmp_path / "cpu.safetensors"))
    with pretended_gpu():
        made = learner(checkpoint, **changes)
        assert made.device.type == "cuda"
        seen = made.step(whole, str(tmp_path / "gpu.safetensors"))
        assert on_gpu(state_of(made)) == {True}
    closely = {"rel": 1e-3, "abs": 1e-5} if made.settings.dtype == "float32" else {"rel": 0.02, "abs": 1e-3}
    for name in ("loss", "entropy", "grad_norm", "is_weight_mean", "mismatch_k3", "router/drift"):
        if name in wanted.metrics:
            assert seen.metrics[name] == pytest.approx(wanted.metrics[name], **closely), name
    assert seen.metrics.keys() == wanted.metrics.keys()
    assert seen.published.probe.logprobs == pytest.approx(wanted.published.probe.logprobs, abs=0.02)
    written, exact = load_file(tmp_path / "gpu.safetensors"), dict(made.model.named_parameters())
    assert written.keys() == load_file(tmp_path / "cpu.safetensors").keys() == exact.keys()
    assert all(torch.equal(tensor, exact[name].inside.to(tensor.dtype)) for name, tensor in written.items())


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(MicroBatch)])
def test_any_part_of_a_batch_that_stayed_behind_would_be_seen(checkpoint, monkeypatch, field):  # noqa: F811
    whole, moved = recorded(learner(checkpoint)), MicroBatch.to

    def forgetful(self, device):
        return dataclasses.replace(moved(self, device), **{field: getattr(self, field)})

    monkeypatch.setattr(MicroBatch, "to", forgetful)
    with pretended_gpu(), pytest.raises(RuntimeError, match="found cuda:0 and cpu"):
        learner(checkpoint, objective=TIGHT).step(whole)


def test_a_state_goes_on_on_the_other_device(checkpoint, tmp_path):  # noqa: F811
    def gone_on(made, state):
        made.load_state(str(tmp_path / state))
        return made.step(batch(version=1, seed=1)).metrics

    with pretended_gpu():
        first = learner(checkpoint)
        first.step(batch())
        first.save_state(str(tmp_path / "gpu.pt"))
        uninterrupted = first.step(batch(version=1, seed=1)).metrics
        other = learner(checkpoint)
        resumed = gone_on(other, "gpu.pt")
        assert on_gpu(state_of(other)) == {True}
        assert all(torch.equal(p.inside, q.inside) for p, q in zip(first.model.parameters(), other.model.parameters()))
    onto_cpu = learner(checkpoint, device="cpu")
    moved = gone_on(onto_cpu, "gpu.pt")
    assert on_gpu(state_of(onto_cpu)) == {False}
    for name in ("loss", "grad_norm", "router/drift"):
        assert resumed[name] == uninterrupted[name]
        assert moved[name] == pytest.approx(uninterrupted[name], rel=1e-3)


def test_a_checkpoint_saved_from_a_gpu_is_whole(checkpoint, tmp_path):  # noqa: F811
    with pretended_gpu():
        made = learner(checkpoint)
        made.step(batch())
        made.save(str(tmp_path / "out"))
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(saved[name], p.inside) for name, p in made.model.named_parameters())


def test_experts_on_an_older_gpu_have_products_too(checkpoint):  # noqa: F811
    """Torch's kernel and ours are for 16 bits on newer ones; above, fp32 goes without them."""
    with pretended_gpu(capability=(7, 5)):
        older = learner(checkpoint, dtype="bfloat16").step(batch()).metrics
    with pretended_gpu():
        newer = learner(checkpoint, dtype="bfloat16").step(batch()).metrics
    assert older["loss"] == pytest.approx(newer["loss"], rel=0.02)


def test_a_model_of_transformers_steps_on_a_gpu_too(checkpoint, tmp_path):  # noqa: F811
    from transformers import LlamaConfig, LlamaForCausalLM

    from model.tokenizer import load_tokenizer

    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "source")
    load_tokenizer(checkpoint).save_pretrained(tmp_path / "source")
    wanted = learner(str(tmp_path / "source"), device="cpu").step(batch(), str(tmp_path / "cpu.safetensors"))
    with pretended_gpu():
        seen = learner(str(tmp_path / "source")).step(batch(), str(tmp_path / "gpu.safetensors"))
    assert seen.metrics["grad_norm"] == pytest.approx(wanted.metrics["grad_norm"], rel=1e-3)
    expected = load_file(tmp_path / "cpu.safetensors")
    for name, tensor in load_file(tmp_path / "gpu.safetensors").items():
        torch.testing.assert_close(tensor, expected.pop(name), atol=1e-3, rtol=1e-3)
    assert not expected
