"""The dpo stage on tiny random models: it starts at ln 2, learns the preference, and merges into a plain checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from math import log

import pytest
from tiny_checkpoints import KINDS, config_of, load_plain, save_tiny

from pipeline.config import LoraSettings, TrainSettings
from pipeline.dpo import (
    DpoJob,
    DpoTrainerActor,
    check_reference,
    dpo_trainer,
    lora_layers,
    read_pairs,
    read_rollouts,
    write_pairs,
)
from pipeline.errors import DataError, RecipeError
from pipeline.mine_pairs import Pair
from pipeline.trainer_actor import Reporter


def pairs_for(checkpoint, count: int) -> list[Pair]:
    from model.tokenizer import encode_prompt, load_tokenizer

    tokenizer = load_tokenizer(checkpoint)

    def answer_ids(text: str) -> list[int]:
        return [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]

    return [
        Pair(
            task_id=f"maths/1/{i}", domain="maths", level=1, group_id=f"g{i}", step=1, category="wrong",
            prompt_ids=encode_prompt(tokenizer, f"What is {i} + 1?"),
            chosen_ids=answer_ids(f"{i} + 1 = {i + 1}. Answer: {i + 1}"), rejected_ids=answer_ids(f"The answer is {i}"),
            chosen_text="", rejected_text="", chosen_score=1.0, rejected_score=0.0, rejected_reason="wrong",
        )
        for i in range(count)
    ]  # fmt: skip


def job_for(tmp_path, kind: str, count: int = 16, targets: list[str] | None = None, **train) -> DpoJob:
    checkpoint = save_tiny(kind, tmp_path / "init")
    work = tmp_path / "work"
    work.mkdir()
    write_pairs(work / "pairs.parquet", pairs_for(checkpoint, count))
    settings = {"batch_examples": 8, "micro_batch_examples": 4, "learning_rate": 3e-3, "warmup_share": 0.0} | train
    return DpoJob(
        stage="tidy", checkpoint=checkpoint, pairs=work / "pairs.parquet", work=work, beta=0.1,
        lora=LoraSettings(rank=4, alpha=8.0, **({"targets": targets} if targets else {})),
        train=TrainSettings(**settings), seed=5,
    )  # fmt: skip


def answer_logprob(model, prompt_ids: list[int], answer_ids: list[int]) -> float:
    import torch

    with torch.no_grad():
        logprobs = model(torch.tensor([prompt_ids + answer_ids])).logits[0].log_softmax(-1)
    start = len(prompt_ids)
    return sum(logprobs[start + i - 1, token].item() for i, token in enumerate(answer_ids))


@pytest.mark.parametrize("kind", KINDS)
def test_dpo_starts_at_ln2_learns_the_preference_and_leaves_a_plain_checkpoint(tmp_path, kind):
    job = job_for(tmp_path, kind, epochs=8)
    metrics = DpoTrainerActor(job).train()

    assert metrics["loss_before"] == pytest.approx(log(2), abs=1e-5)
    assert metrics["first_loss"] == pytest.approx(log(2), abs=1e-5)
    assert metrics["loss_after"] < 0.5
    assert metrics["accuracy"] == 1.0 and metrics["margin"] > 0.5
    assert metrics["num_steps"] == 16

    # The saved checkpoint loads through plain transformers and holds just the drift that the trainer measured.
    before, after = load_plain(job.checkpoint), load_plain(job.work / "checkpoint")
    assert config_of(job.work / "checkpoint") == config_of(job.checkpoint)
    pairs = read_pairs(job.pairs)
    for key, ids_of in (("chosen", lambda pair: pair.chosen_ids), ("rejected", lambda pair: pair.rejected_ids)):
        drifts = [
            answer_logprob(after, pair.prompt_ids, ids_of(pair)) - answer_logprob(before, pair.prompt_ids, ids_of(pair))
            for pair in pairs
        ]
        tolerance = 1e-3 if kind == "llama4" else 0.3  # the dense one is stored in bfloat16
        assert metrics[f"{key}_logprob_drift"] == pytest.approx(sum(drifts) / len(drifts), abs=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_keeps_the_function_and_only_adapters_were_trained(tmp_path, kind):
    import torch

    from model.checkpoint import load_policy
    from model.tokenizer import load_tokenizer

    job = job_for(tmp_path, kind, epochs=4)
    model = load_policy(job.checkpoint, "float32")
    frozen = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer = dpo_trainer(
        model, load_tokenizer(job.checkpoint), read_pairs(job.pairs), job, Reporter(job.work), str(tmp_path / "scratch")
    )
    trainable = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert trainable and all(".lora_" in name for name in trainable)
    assert not any("router" in name for name in trainable)
    trainer.train()

    ids = torch.tensor([read_pairs(job.pairs)[0].prompt_ids])
    trainer.model.eval()
    with torch.no_grad():
        adapted = trainer.model(ids).logits
        merged = trainer.model.merge_and_unload(safe_merge=True)
        torch.testing.assert_close(merged(ids).logits, adapted, rtol=0, atol=1e-4)
    changed = {name for name, parameter in merged.named_parameters() if not torch.equal(parameter, frozen[name])}
    assert changed == {f"{name}.weight" for name in lora_layers(merged, job.lora.targets, "")}


def test_activation_checkpointing_changes_no_number(tmp_path, monkeypatch):
    """Also behind frozen weights: nothing that a LoRA does not need has a gradient, and the reference has none."""
    import model.transformer

    recomputed, seen = [], []
    plain = model.transformer.checkpoint
    monkeypatch.setattr(model.transformer, "checkpoint", lambda *a, **k: recomputed.append(1) or plain(*a, **k))
    for on in (False, True):
        assert not recomputed
        folder = tmp_path / str(on)
        folder.mkdir()
        job = job_for(folder, "llama4", epochs=2, activation_checkpointing=on)
        metrics = DpoTrainerActor(job).train()
        files = [(job.work / name).read_bytes() for name in ("losses.jsonl", "checkpoint/model.safetensors")]
        seen.append(({key: value for key, value in metrics.items() if not key.endswith(("_s", "seconds"))}, files))
    assert recomputed and seen[0] == seen[1]


def trainer_for(job: DpoJob, tmp_path):
    from model.checkpoint import load_policy
    from model.tokenizer import load_tokenizer

    model, tokenizer = load_policy(job.checkpoint, "float32"), load_tokenizer(job.checkpoint)
    return dpo_trainer(model, tokenizer, read_pairs(job.pairs), job, Reporter(job.work), str(tmp_path / "scratch"))


def losses(job: DpoJob) -> list[dict]:
    return [json.loads(line) for line in (job.work / "losses.jsonl").read_text().splitlines()]


def test_gauges_of_routers_are_those_of_the_policys_own_passes(tmp_path):
    """A step at a learning rate of nothing: where the tokens go is known by one pass of the checkpoint."""
    import torch

    from model.checkpoint import load_policy
    from model.router import routes_of
    from model.router_gauges import RouterLoad, named

    job = job_for(tmp_path, "llama4", count=8, epochs=1, learning_rate=1e-30)
    trainer = trainer_for(job, tmp_path)
    trainer.train()
    model, load = load_policy(job.checkpoint, "float32"), RouterLoad()
    for pair in read_pairs(job.pairs):
        for answer_ids in (pair.chosen_ids, pair.rejected_ids):
            ids = torch.tensor([pair.prompt_ids + answer_ids])
            load.add(routes_of(model, ids, torch.ones_like(ids, dtype=torch.bool)))
    (step,) = losses(job)
    expected = named(load.by_layer(), model.config.moe_layers)
    assert len(expected) == 3 * (1 + len(model.config.moe_layers))
    assert {key: step[key] for key in expected} == pytest.approx(expected)
    assert step["router/drift"] == 0.0 and step["router/moved"] == 0.0
    # Shares are the same where passes are counted twice; sums are not.
    assert torch.equal(trainer.routers.load.sums, load.sums)


def test_neither_the_reference_nor_measured_pairs_are_counted_and_what_the_lora_does_to_routing_is_seen(tmp_path):
    job = job_for(tmp_path, "llama4", count=8, epochs=3)
    trainer = trainer_for(job, tmp_path)
    trainer.evaluate(trainer.train_dataset)
    assert trainer.routers.load.sums is None
    trainer.train()
    num_tokens = sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in read_pairs(job.pairs))
    assert trainer.routers.load.sums[:, :-3].sum(1).tolist() == [num_tokens, num_tokens], "a whole step, once"
    trainer.evaluate(trainer.train_dataset)
    assert trainer.routers.load.sums[:, :-3].sum(1).tolist() == [num_tokens, num_tokens]
    drift = [step["router/drift"] for step in losses(job)]
    assert len(drift) == 3 and 0 < drift[0] < drift[-1]


def test_cutting_the_batch_into_micro_batches_does_not_change_the_loss_or_the_gauges(tmp_path):
    def run(name: str, micro: int) -> list[dict]:
        (tmp_path / name).mkdir()
        job = job_for(tmp_path / name, "llama4", count=8, micro_batch_examples=micro, epochs=3)
        trainer_for(job, tmp_path / name).train()
        return losses(job)

    whole, cut = run("whole", 8), run("cut", 2)
    for key in ("loss", "router/max_vio", "router/drift"):
        assert [step[key] for step in cut] == pytest.approx([step[key] for step in whole], abs=1e-4)


def test_a_dense_model_is_trained_without_router_metrics(tmp_path):
    job = job_for(tmp_path, "dense", count=4, epochs=1)
    trainer_for(job, tmp_path).train()
    assert not any(key.startswith("router") for key in losses(job)[0])


def test_lora_reaches_attention_dense_mlp_and_shared_expert_and_neither_router_nor_routed_experts(tmp_path):
    from model.checkpoint import load_policy

    model = load_policy(save_tiny("llama4", tmp_path / "init"), "float32")
    names = lora_layers(model, LoraSettings().targets, "stages.tidy.lora.targets")
    kinds = {name.split(".", 3)[3] for name in names}
    attention = {f"self_attn.{letter}_proj" for letter in "qkvo"}
    mlp = {f"feed_forward.{part}_proj" for part in ("gate", "up", "down")}
    shared = {f"feed_forward.shared_expert.{part}_proj" for part in ("gate", "up", "down")}
    assert kinds == attention | mlp | shared
    with pytest.raises(RecipeError, match=r"stages\.tidy\.lora\.targets: 'router'.*'q_proj'"):
        lora_layers(model, ["q_proj", "router"], "stages.tidy.lora.targets")


def test_the_trainer_sees_the_sampled_ids_and_nothing_else(tmp_path):
    from model.checkpoint import load_policy
    from model.tokenizer import load_tokenizer

    job = job_for(tmp_path, "dense", count=2)
    pairs = read_pairs(job.pairs)
    # Ids that no tokenizer would give for their own text: decoding and encoding would merge them.
    odd = replace(pairs[0], chosen_ids=[50, 50, 50, 51], rejected_ids=[51, 50, 51])
    trainer = dpo_trainer(
        load_policy(job.checkpoint, "float32"), load_tokenizer(job.checkpoint), [odd, pairs[1]], job,
        Reporter(job.work), str(tmp_path / "scratch"),
    )  # fmt: skip
    batch = trainer.data_collator([trainer.train_dataset[0]])
    length = len(odd.prompt_ids)
    assert batch["input_ids"][0].tolist() == odd.prompt_ids + [50, 50, 50, 51]
    assert batch["input_ids"][1].tolist()[: length + 3] == odd.prompt_ids + [51, 50, 51]
    assert batch["completion_mask"].tolist() == [[0] * length + [1] * 4, [0] * length + [1] * 3 + [0]]


def test_log_probabilities_are_those_that_rl_trains_on(tmp_path, monkeypatch):
    import model.logprobs

    def ours(*_, **__):
        raise RuntimeError("token_logprobs was asked")

    monkeypatch.setattr(model.logprobs, "token_logprobs", ours)
    with pytest.raises(RuntimeError, match="token_logprobs was asked"):
        DpoTrainerActor(job_for(tmp_path, "dense", count=4)).train()


def test_bfloat16_starts_at_ln2_too(tmp_path):
    metrics = DpoTrainerActor(job_for(tmp_path, "llama4", dtype="bfloat16", epochs=4)).train()
    assert metrics["loss_before"] == pytest.approx(log(2), abs=1e-3)
    assert metrics["accuracy"] > 0.9


def test_a_reference_that_differs_stops_the_stage():
    check_reference({"eval_loss": log(2)})
    with pytest.raises(RuntimeError, match="policy and reference differ"):
        check_reference({"eval_loss": 0.69})


def test_rollouts_without_a_needed_column_are_refused_by_its_name(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rollouts.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"task_id": ["a"]}), path)
    with pytest.raises(DataError, match="'domain'"):
        read_rollouts(path)
    with pytest.raises(DataError, match="not a readable parquet"):
        read_rollouts(tmp_path / "absent.parquet")
