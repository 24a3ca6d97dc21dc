"""The sft stage on tiny random models: the loss is the one worked by hand, and the checkpoint loads as before."""

from __future__ import annotations

import json

import pytest
from tiny_checkpoints import KINDS, config_of, load_plain, save_tiny

from pipeline.config import RouterSettings, TrainSettings
from pipeline.data import Example, write_examples
from pipeline.errors import DataError
from pipeline.sft import NOT_TRAINED, SftJob, SftTrainerActor, encode_examples, show_masked
from rewards.task import Task


def examples(count: int) -> list[Example]:
    return [
        Example(
            Task(task_id=f"maths/1/{i}", domain="maths", level=1, prompt=f"What is {i} + {i * i}?", verifier="number"),
            f"{i} + {i * i} = {i + i * i}. " * (1 + i % 3) + f"Answer: {i + i * i}",
        )
        for i in range(count)
    ]


def job_for(tmp_path, kind: str, kept: list[Example], router: RouterSettings | None = None, **train) -> SftJob:
    checkpoint = save_tiny(kind, tmp_path / "init")
    write_examples(tmp_path / "kept.jsonl", kept)
    work = tmp_path / "work"
    work.mkdir()
    settings = TrainSettings(**({"batch_examples": 16, "micro_batch_examples": 4, "warmup_share": 0.0} | train))
    return SftJob(
        stage="warm", checkpoint=checkpoint, kept=tmp_path / "kept.jsonl", work=work, train=settings,
        router=router or RouterSettings(), seed=3,
    )  # fmt: skip


def losses(job: SftJob) -> list[dict]:
    return [json.loads(line) for line in (job.work / "losses.jsonl").read_text().splitlines()]


def loss_by_hand(checkpoint, kept: list[Example]) -> tuple[float, float]:
    """(mean over answer tokens and ends of turn, mean over all tokens), one example at a time, nothing padded."""
    import torch

    from model.tokenizer import encode_example, load_tokenizer

    model, tokenizer = load_plain(checkpoint), load_tokenizer(checkpoint)
    masked, everything = [], []
    for example in kept:
        ids, mask = encode_example(tokenizer, example.task.prompt, example.answer)
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for position in range(1, len(ids)):
            loss = -logprobs[position - 1, ids[position]].item()
            everything.append(loss)
            masked += [loss] if mask[position] else []
    return sum(masked) / len(masked), sum(everything) / len(everything)


@pytest.mark.parametrize("kind", KINDS)
def test_first_loss_is_the_mean_over_answer_tokens_and_training_lowers_it(tmp_path, kind):
    kept = examples(16)
    job = job_for(tmp_path, kind, kept, epochs=6, learning_rate=3e-3)
    metrics = SftTrainerActor(job).train()

    on_answers, on_everything = loss_by_hand(job.checkpoint, kept)
    steps = losses(job)
    assert steps[0]["loss"] == pytest.approx(on_answers, abs=2e-4)
    assert abs(on_everything - on_answers) > 0.01  # the tempting wrong loss differs
    assert metrics["num_steps"] == len(steps) == 6
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"]
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    assert metrics["num_examples"] == 16 and metrics["dropped"] == {"too_long": 0}

    after, _ = loss_by_hand(job.work / "checkpoint", kept)  # loads in plain transformers, and holds what was learnt
    assert after < 0.8 * on_answers
    assert config_of(job.work / "checkpoint") == config_of(job.checkpoint)


@pytest.mark.parametrize("router", [RouterSettings(), RouterSettings(balance_coef=1.0, z_coef=0.1)])
def test_cutting_the_batch_into_micro_batches_does_not_change_the_loss(tmp_path, router):
    def run(name: str, micro: int) -> list[dict]:
        folder = tmp_path / name
        folder.mkdir()
        job = job_for(folder, "llama4", examples(8), router, batch_examples=8, micro_batch_examples=micro, epochs=3)
        SftTrainerActor(job).train()
        return losses(job)

    whole, cut = run("whole", 8), run("cut", 2)
    for key in ("loss", "router/max_vio", "router/drift"):
        assert [step[key] for step in cut] == pytest.approx([step[key] for step in whole], abs=1e-4)


def test_the_loss_is_that_of_token_logprobs_plus_the_router_losses(tmp_path):
    """One definition of log-probabilities: the very number, not one like it."""
    import torch

    from model.checkpoint import load_policy
    from model.logprobs import token_logprobs
    from model.tokenizer import load_tokenizer

    kept = examples(8)
    job = job_for(tmp_path, "llama4", kept, RouterSettings(balance_coef=0.5, z_coef=0.25), batch_examples=8, epochs=1)
    SftTrainerActor(job).train()
    (step,) = losses(job)

    model = load_policy(job.checkpoint)
    rows, _ = encode_examples(load_tokenizer(job.checkpoint), kept, 1000)
    logprobs = []
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            logprobs.append(token_logprobs(model, ids, labels != NOT_TRAINED)[0].logprob_T)
    plain = -torch.cat(logprobs).mean().item()
    assert step["router/balance_loss"] >= 1.0 - 1e-3 and step["router/z_loss"] > 0
    expected = plain + 0.5 * step["router/balance_loss"] + 0.25 * step["router/z_loss"]
    assert step["loss"] == pytest.approx(expected, abs=2e-5)


def test_activation_checkpointing_changes_no_number_and_counts_no_route_twice(tmp_path, monkeypatch):
    import model.transformer

    router, recomputed, seen = RouterSettings(balance_coef=1.0, z_coef=0.1), [], []
    plain = model.transformer.checkpoint
    monkeypatch.setattr(model.transformer, "checkpoint", lambda *a, **k: recomputed.append(1) or plain(*a, **k))
    for on in (False, True):
        assert not recomputed
        folder = tmp_path / str(on)
        folder.mkdir()
        job = job_for(folder, "llama4", examples(8), router, batch_examples=8, epochs=3, activation_checkpointing=on)
        SftTrainerActor(job).train()
        seen.append((losses(job), (job.work / "checkpoint" / "model.safetensors").read_bytes()))
    assert recomputed and len(seen[0][0]) == 3 and "router/max_vio" in seen[0][0][0]
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    ("policy", "share"), [("train", 1.0), ("frozen", 0.0), ("low_lr", 0.1)], ids=["train", "frozen", "low_lr"]
)
def test_the_router_moves_as_its_policy_says(tmp_path, policy, share):
    """One step of Adam moves a weight by the learning rate, 1e-3, whatever its gradient."""
    kept = examples(8)
    settings = RouterSettings(policy=policy)
    job = job_for(tmp_path, "llama4", kept, settings, batch_examples=8, epochs=1, learning_rate=1e-3)
    SftTrainerActor(job).train()
    before, after = (load_plain(path).state_dict() for path in (job.checkpoint, job.work / "checkpoint"))
    for name, tensor in after.items():
        moved = (tensor - before[name]).abs().max().item()
        assert moved == pytest.approx(1e-3 * (share if ".router." in name else 1.0), rel=0.02), name


def test_a_dense_model_is_trained_without_router_metrics(tmp_path):
    job = job_for(tmp_path, "dense", examples(4), RouterSettings(balance_coef=1.0), epochs=1)
    SftTrainerActor(job).train()
    assert not any(key.startswith("router") for key in losses(job)[0])


def test_bfloat16_training_runs_and_keeps_small_updates(tmp_path):
    job = job_for(tmp_path, "llama4", examples(8), dtype="bfloat16", epochs=2, learning_rate=1e-3)
    metrics = SftTrainerActor(job).train()
    assert metrics["last_loss"] < metrics["first_loss"]


def test_examples_that_are_too_long_are_dropped_and_counted_and_all_too_long_is_an_error(tmp_path):
    job = job_for(tmp_path, "dense", examples(6), max_tokens=60)
    from model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(job.checkpoint)
    lengths = [len(row["input_ids"]) for row in encode_examples(tokenizer, examples(6), 10_000)[0]]
    rows, num_too_long = encode_examples(tokenizer, examples(6), sorted(lengths)[2])
    assert num_too_long == sum(length > sorted(lengths)[2] for length in lengths) > 0
    assert len(rows) + num_too_long == 6

    short = SftJob(**{field: getattr(job, field) for field in job.__slots__} | {"train": TrainSettings(max_tokens=5)})
    with pytest.raises(DataError, match=r"all 6 examples .* stages\.warm\.train\.max_tokens"):
        SftTrainerActor(short).train()


def test_an_answer_without_tokens_is_refused_by_its_task(tmp_path):
    job = job_for(tmp_path, "dense", examples(1))
    from model.tokenizer import load_tokenizer

    empty = Example(examples(1)[0].task, "")
    with pytest.raises(DataError, match="maths/1/0"):
        encode_examples(load_tokenizer(job.checkpoint), [empty], 100)


def test_the_printed_sample_marks_the_answer_and_the_end_of_turn(tmp_path):
    job = job_for(tmp_path, "dense", examples(1))
    from model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(job.checkpoint)
    (row,), _ = encode_examples(tokenizer, examples(1), 200)
    shown = show_masked(tokenizer, row)
    assert shown.endswith("«0 + 0 = 0. Answer: 0<|eot|>»")
    assert "What is 0 + 0?" in shown.split("«")[0]
    assert row["labels"][-1] == tokenizer.eos_token_id and row["labels"][0] == NOT_TRAINED
