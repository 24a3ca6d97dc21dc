"""Stage 2 without staleness, bit for bit: against a loop that does one thing after the other, against itself, and
against a run that was killed."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from pathlib import Path
from types import SimpleNamespace

import yaml
from real_runs import ROOT, complete, kill, start, wait_for

from model.tokenizer import decode_answer, encode_prompt, load_tokenizer, stop_token_ids
from pipeline.config import Recipe
from pipeline.engines import engine_settings
from pipeline.online_rl import curriculum_of, learner_settings, task_pool
from pipeline.runner import stage_seed
from rewards.grade import grade
from rewards.sandbox import Sandbox
from rl.gates import Outcome
from rl.generator import VllmGenerator
from rl.learner import PolicyLearner
from rl.losses import group_advantages
from rl.types import SampleRequest, TrainBatch

BASE = ROOT / "recipes" / "tiny_base"
GROUPS, SIZE, STEPS, SEED = 3, 8, 6, 5


def write_recipe(folder: Path) -> tuple[Path, Path]:
    """(recipe, run directory)"""
    folder.mkdir(exist_ok=True)
    climb = {
        "name": "climb", "kind": "online_rl", "policy": f"{BASE}/", "tasks": {"domains": ["maths"], "levels": [1, 4]},
        "steps": STEPS, "groups_per_step": GROUPS, "group_size": SIZE, "max_staleness": 0, "max_answer_tokens": 48,
        "save_every_steps": 2, "warmup_steps": 1, "learning_rate": 4e-4,
    }  # fmt: skip
    path, run_dir = folder / "recipe.yaml", folder / "run"
    path.write_text(yaml.safe_dump({"run": {"name": "exact", "dir": str(run_dir), "seed": SEED}, "stages": [climb]}))
    return path, run_dir


def weights_of(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "climb" / "checkpoint" / "model.safetensors").read_bytes()).hexdigest()


def test_repeated_killed_and_synchronous_runs_end_with_the_same_weights(tmp_path: Path) -> None:
    seen = {}
    for name in ("one", "two"):
        path, run_dir = write_recipe(tmp_path / name)
        log = tmp_path / f"{name}.txt"
        assert complete("run", str(path), log=log) == 0, log.read_text()[-3000:]
        seen[name] = weights_of(run_dir)

    path, run_dir = write_recipe(tmp_path / "killed")
    log, began = tmp_path / "killed.txt", time.time()
    process = start("run", str(path), log=log)
    wait_for(process, run_dir, lambda e: e["event"] == "progress" and e.get("done", 0) >= 3, after=began, log=log)
    kill(process)
    assert complete("run", str(path), log=log) == 0, log.read_text()[-3000:]
    assert "resumed after step" in (run_dir / "events.jsonl").read_text()
    seen["killed"] = weights_of(run_dir)

    seen["synchronous"] = synchronous_twin(tmp_path / "twin")
    assert len(set(seen.values())) == 1, seen
    moved = hashlib.sha256((BASE / "model.safetensors").read_bytes()).hexdigest()
    assert moved not in seen.values(), "nothing was trained"
    rewards = [rewards_of(tmp_path / name / "run") for name in ("one", "two", "killed")]
    assert rewards[0] == rewards[1] == rewards[2] and len(rewards[0]) == STEPS


def rewards_of(run_dir: Path) -> list[float]:
    return [json.loads(line)["reward_mean"] for line in (run_dir / "climb/steps.jsonl").read_text().splitlines()]


def synchronous_twin(folder: Path) -> str:
    """The same stage by a plain loop: sample a step's groups, grade, train, give the engine the weights."""
    path, _ = write_recipe(folder)
    recipe = Recipe.model_validate(yaml.safe_load(path.read_text()))
    stage, seed = recipe.stages[0], stage_seed(SEED, "climb")
    tokenizer = load_tokenizer(BASE)
    pool = task_pool(stage.tasks, seed, lambda task: True)
    curriculum = curriculum_of(stage, pool, SimpleNamespace(inputs={}, seed=seed))
    learner = PolicyLearner(learner_settings(stage, BASE, seed, folder, world_size=1)[0])
    learner.start()
    generator = VllmGenerator(engine_settings(stage.dtype, BASE, seed), "twin")

    async def sampled(slot: int, prompt_ids: list[int], version: int) -> list:
        drawn_with = hashlib.sha256(f"{seed}/{slot}/0/0/{version}".encode()).digest()[:4]
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
