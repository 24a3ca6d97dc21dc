"""Stage 2 without staleness, bit for bit: against a loop that does one thing after the other, against itself, and
against a run that was stopped again and again."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from real_runs import ROOT, at_step, complete, events, start, wait_for

from model.tokenizer import decode_answer, encode_prompt, load_tokenizer, stop_token_ids
from pipeline.config import Recipe
from pipeline.engines import engine_settings
from pipeline.online_rl import learner_settings
from pipeline.runner import stage_seed
from pipeline.task_pool import curriculum_of, task_pool
from rewards.grade import grade
from rewards.sandbox import Sandbox
from rl.gates import Outcome
from rl.generator import VllmGenerator
from rl.learner import PolicyLearner
from rl.losses import group_advantages
from rl.types import SampleRequest, TrainBatch

BASE = ROOT / "recipes" / "tiny_base"
GROUPS, SIZE, STEPS, SEED = 3, 8, 10, 5


def write_recipe(folder: Path, **cluster: Any) -> tuple[Path, Path]:
    """(recipe, run directory)"""
    folder.mkdir(exist_ok=True)
    climb = {
        "name": "climb", "kind": "online_rl", "policy": f"{BASE}/", "tasks": {"domains": ["maths"], "levels": [1, 4]},
        "steps": STEPS, "groups_per_step": GROUPS, "group_size": SIZE, "max_staleness": 0, "max_answer_tokens": 48,
        "save_every_steps": 2, "warmup_steps": 1, "learning_rate": 4e-4,
    }  # fmt: skip
    path, run_dir = folder / "recipe.yaml", folder / "run"
    run = {"name": "exact", "dir": str(run_dir), "seed": SEED}
    path.write_text(yaml.safe_dump({"run": run, "cluster": cluster, "stages": [climb]}))
    return path, run_dir


def weights_of(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "climb" / "checkpoint" / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of what every other run is compared to."""
    return finished(*write_recipe(tmp_path_factory.mktemp("uninterrupted")))


def finished(recipe: Path, run_dir: Path) -> Path:
    log = recipe.with_name("log.txt")
    assert complete("run", str(recipe), log=log) == 0, log.read_text()[-3000:]
    return run_dir


def test_something_was_trained(uninterrupted: Path) -> None:
    assert weights_of(uninterrupted) != hashlib.sha256((BASE / "model.safetensors").read_bytes()).hexdigest()
    assert len(rewards_of(uninterrupted)) == STEPS


def test_a_second_run_whose_weights_pass_through_the_network_ends_with_the_same_bits(
    uninterrupted: Path, tmp_path: Path
) -> None:
    again = finished(*write_recipe(tmp_path, weight_transfer="network"))
    assert weights_of(again) == weights_of(uninterrupted) and rewards_of(again) == rewards_of(uninterrupted)


def test_a_loop_that_does_one_thing_after_the_other_ends_with_the_same_bits(
    uninterrupted: Path, tmp_path: Path
) -> None:
    assert synchronous_twin(tmp_path) == weights_of(uninterrupted)


def test_a_run_stopped_by_three_signals_ends_with_the_same_bits(uninterrupted: Path, tmp_path: Path) -> None:
    path, run_dir = write_recipe(tmp_path)
    log = tmp_path / "log.txt"
    stops = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}
    for done, (number, exit_code) in zip((3, 5, 7), stops.items(), strict=True):
        began = time.time()
        process = start("run", str(path), log=log)
        wait_for(process, run_dir, at_step(done), after=began, log=log)
        process.send_signal(number)
        assert process.wait(timeout=30) == exit_code, log.read_text()[-3000:]
        assert not (run_dir / "climb").exists()
        assert "received at time" not in log.read_text()  # Ray's own handler, which aborts three seconds later
    finished(path, run_dir)
    notes = [event["text"] for event in events(run_dir) if event["event"] == "note"]
    resumed = [int(found[1]) for note in notes if (found := re.match(r"resumed after step (\d+)", note))]
    assert len(resumed) == 3 and resumed == sorted(set(resumed)), notes
    assert weights_of(run_dir) == weights_of(uninterrupted) and rewards_of(run_dir) == rewards_of(uninterrupted)


def rewards_of(run_dir: Path) -> list[float]:
    return [json.loads(line)["reward_mean"] for line in (run_dir / "climb/steps.jsonl").read_text().splitlines()]


def synchronous_twin(folder: Path) -> str:
    """The same stage by a plain loop: sample a step's groups, grade, train, give the engine the weights."""
    path, _ = write_recipe(folder)
    recipe = Recipe.model_validate(yaml.safe_load(path.read_text()))
    stage, seed = recipe.stages[0], stage_seed(SEED, "climb")
    tokenizer = load_tokenizer(BASE)
    pool = task_pool(stage.tasks, seed, lambda task: True)
    curriculum = curriculum_of(stage, pool, SimpleNamespace(inputs={}, seed=seed), lambda task: True)
    learner = PolicyLearner(learner_settings(stage, BASE, seed, folder, world_size=1)[0])
    learner.start()
    generator = VllmGenerator(engine_settings(stage.dtype, BASE, seed), "twin")

    async def sampled(slot: int, prompt_ids: list[int], version: int) -> list:
        drawn_with = hashlib.sha256(f"{seed}/{slot}/0/0".encode()).digest()[:4]
        request = SampleRequest(
            request_id=f"{slot:08}", prompt_ids=prompt_ids, num_samples=SIZE, max_tokens=stage.max_answer_tokens,
            temperature=stage.temperature, stop_token_ids=tuple(stop_token_ids(tokenizer, BASE)),
            seed=int.from_bytes(drawn_with) >> 1, together=(f"step {version}", GROUPS),
        )  # fmt: skip
        return await generator.sample(request)

    async def run() -> None:
        await generator.start()
        for step in range(STEPS):
            weights = folder / f"v{step}.safetensors"
            published = learner.publish(str(weights))
            await generator.take_weights(str(weights), step, published)
            slots = range(step * GROUPS, (step + 1) * GROUPS)
            choices = [choice for (choice,) in curriculum.plan(slots)]
            tasks = [pool.task_of(choice.entry, slot, 0) for choice, slot in zip(choices, slots)]
            prompts = [encode_prompt(tokenizer, task.prompt) for task in tasks]
            groups = await asyncio.gather(*(sampled(slot, ids, step) for slot, ids in zip(slots, prompts)))
            rows, advantages, outcomes = [], [], []
            for slot, choice, task, ids, answers in zip(slots, choices, tasks, prompts, groups):
                scores = [grade(task, decode_answer(tokenizer, a.token_ids), sandbox).value for a in answers]
                rows += [(ids, answer) for answer in answers]
                advantages += (of_group := group_advantages(scores, stage.objective.advantage))
                lengths = [len(answer.token_ids) for answer in answers]
                outcomes.append(
                    Outcome(
                        slot=slot, turn=0, choice=choice, passes=sum(score >= 1.0 for score in scores),
                        total=len(scores), version=step, answers=len(answers), tokens=sum(lengths),
                        trained_tokens=sum(n for n, advantage in zip(lengths, of_group) if advantage), kept=True,
                    )
                )  # fmt: skip
            learner.step(
                TrainBatch(
                    version=step, prompt_ids=[ids for ids, _ in rows], answer_ids=[a.token_ids for _, a in rows],
                    generator_logprobs=[a.logprobs for _, a in rows], token_versions=[a.versions for _, a in rows],
                    advantages=advantages,
                )
            )  # fmt: skip
            curriculum.learn(step + 1, outcomes, choices)

    with Sandbox() as sandbox, asyncio.Runner() as runner:
        try:
            runner.run(run())
        finally:
            generator.stop()
    learner.save(str(folder / "checkpoint"))
    return hashlib.sha256((folder / "checkpoint" / "model.safetensors").read_bytes()).hexdigest()
