"""A whole `drover run` of a short stage 2 in one process: the real runner, run directory, loop, learner and files.

Left out is what leaves nothing in the run directory: Ray, vLLM and the sandbox. Actors are objects of this process,
whose errors come as they come over Ray. The engine reads the weights that it is given and answers from their digest:
another bit of a weight, another seed or another task is another answer. Answers are plain numbers: nobody runs them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow.parquet as pq
import torch
from rich.console import Console

from model import tokenizer as tokenizers
from model.checkpoint import save_policy
from model.disk import naming
from model.tiny import TinyShape, tiny_llama4
from pipeline import online_rl, runner
from pipeline.cluster import KEPT_ERRORS, ActorFailed
from pipeline.config import Recipe
from rl.health import DEFAULT_LIMITS
from rl.learner import LearnerSettings, PolicyLearner
from rl.run_state import LOOP
from rl.types import Published, SampledAnswer, SampleRequest, StepReport, SyncReport, TrainBatch
from rl.weight_sync import WeightFiles, weights_digest

GROUPS, SIZE, STEPS = 2, 2, 2
SHAPE = TinyShape(
    hidden_size=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, expert_size=8, dense_size=8, num_experts=2
)
TIMINGS = re.compile(r"time|.*_(s|ms|wait_share)")  # keys of steps.jsonl that no two runs share


@dataclass(frozen=True)
class Stage2:
    """One run: its directory and, where a cluster has its memory-backed folder, the published weights."""

    folder: Path  # run/, weights/
    base: Path  # the policy it starts from
    max_staleness: int = 0

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def recipe(self) -> Recipe:
        """Every limit of health is off: engine and learner do not agree here."""
        climb = {
            "name": "climb", "kind": "online_rl", "policy": f"{self.base}/",
            "tasks": {"domains": ["maths"], "levels": [1, 4]}, "steps": STEPS, "groups_per_step": GROUPS,
            "group_size": SIZE, "max_staleness": self.max_staleness, "save_every_steps": 1, "max_answer_tokens": 12,
            "warmup_steps": 1, "learning_rate": 1e-3, "health": {name: {} for name in DEFAULT_LIMITS},
        }  # fmt: skip
        run = {"name": "stage2", "dir": str(self.run_dir), "seed": 5}
        return Recipe.model_validate({"run": run, "stages": [climb]})

    def run(self) -> int:
        """`drover run`."""
        doors = runner.Doors(
            load_stage=lambda kind: online_rl.run,
            code_version=lambda kind: "1",
            make_cluster=lambda recipe, run_dir, emit: Cluster(self.folder),
            write_report=lambda run_dir: run_dir / "report.html",
        )
        with (
            mock.patch("rewards.sandbox.Sandbox", contextlib.nullcontext),
            mock.patch("model.tokenizer.load_tokenizer", load_tokenizer),
            mock.patch("pipeline.runner._environment", dict),
            open(os.devnull, "w") as nowhere,
        ):
            return runner.run(self.recipe, doors=doors, console=Console(file=nowhere))

    def run_in_child(self) -> int:
        """The same in a process of its own, whose output goes to a file; see `output`."""
        with (
            open(f"{self.folder}.txt", "a") as output,
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
        ):
            return self.run()

    def output(self) -> str:
        return Path(f"{self.folder}.txt").read_text()

    def result(self) -> dict[str, Any]:
        """All that a finished run leaves, without its timings."""
        place = self.run_dir / "climb"
        outputs = json.loads((place / "manifest.json").read_text())["outputs"]
        del outputs["steps.jsonl"]
        rollouts = pq.read_table(place / "rollouts.parquet", columns=["group_id", "step"]).to_pylist()
        steps = [json.loads(line) for line in (place / "steps.jsonl").read_text().splitlines()]
        return {
            "outputs": outputs,
            "steps": [{key: row[key] for key in row if not TIMINGS.fullmatch(key)} for row in steps],
            "trained": [(row["step"], int(row["group_id"])) for row in rollouts],
            "files": {path: "" for path in self._files()},
        }

    def _files(self) -> list[str]:
        """What an error that was overcome has left is no part of the result."""
        paths = (str(path.relative_to(self.run_dir)) for path in self.run_dir.rglob("*"))
        return sorted(path for path in paths if not path.startswith("logs"))


load_tokenizer = functools.cache(tokenizers.load_tokenizer)  # children are forked by the hundred, and inherit it


def make_base(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = tokenizers.build_tokenizer(["Compute 1+2.", "Answer: 3"], 280)
    save_policy(tiny_llama4(SHAPE, tokenizer), tokenizer, folder)
    return folder


class Engine:
    """About half of its answers are right."""

    def __init__(self, checkpoint: str) -> None:
        self.tokenizer = load_tokenizer(checkpoint)
        self.version, self.digest = -1, ""

    async def sample(self, request: SampleRequest) -> list[SampledAnswer]:
        asked = re.search(r"Compute ([\d+-]+)\.", self.tokenizer.decode(request.prompt_ids))
        assert asked
        right = sum(int(term) for term in re.findall(r"[+-]?\d+", asked[1]))
        rng = random.Random(f"{self.digest}/{request.seed}/{request.prompt_ids}")
        return [self._answer(right + rng.choice([0, 0, 1, 2]), rng) for _ in range(request.num_samples)]

    def _answer(self, number: int, rng: random.Random) -> SampledAnswer:
        ids = self.tokenizer.encode(f"Answer: {number}", add_special_tokens=False) + [self.tokenizer.eos_token_id]
        logprobs = [-rng.uniform(4, 6) for _ in ids]
        return SampledAnswer(token_ids=ids, logprobs=logprobs, versions=[self.version] * len(ids), finish_reason="stop")

    async def take_weights(self, path: str, version: int, expected: Published, repair: bool = False) -> SyncReport:
        with WeightFiles(path) as weights:
            self.version, self.digest = version, weights_digest(iter(weights))
            return SyncReport(version=version, num_tensors=len(weights), digest=self.digest, pause_ms=0, load_ms=0)


class Learner(PolicyLearner):
    """The real one, whose checkpoint also shows what another one's does not."""

    started: PolicyLearner | None = None  # in the parent of many children: a start is half of such a short run

    def start(self) -> dict[str, float]:
        if Learner.started is None:
            return super().start()
        vars(self).update(vars(Learner.started) | {"settings": self.settings})
        torch.manual_seed(self.settings.seed)
        return {}

    def step(self, batch: TrainBatch, publish_to: str | None = None) -> StepReport:
        torch.rand(1)  # as a model with dropout would
        return super().step(batch, publish_to)

    def save(self, directory: str) -> None:
        super().save(directory)
        digest = hashlib.sha256(torch.get_rng_state().numpy().tobytes())
        for optimizer in self.optimizers:
            for state in optimizer.state_dict()["state"].values():
                for tensor in state.values():
                    digest.update(tensor.numpy().tobytes())
        (loop,) = Path(directory).parent.rglob(LOOP)
        curriculum = json.loads(loop.read_text())["curriculum"]
        witness = {
            "version": self.version,
            "optimiser and random numbers": digest.hexdigest(),
            "curriculum": curriculum,
        }
        with naming(directory):
            (Path(directory) / "witness.json").write_text(json.dumps(witness))


class Actor:
    def __init__(self, name: str, held: Any) -> None:
        self.name, self.held = name, held

    def call(self, method: str, *args: Any, timeout_s: float) -> Any:
        with self._as_over_ray(method):
            return getattr(self.held, method)(*args)

    async def call_async(self, method: str, *args: Any, timeout_s: float) -> Any:
        with self._as_over_ray(method):
            result = getattr(self.held, method)(*args)
            return await result if hasattr(result, "__await__") else result

    @contextlib.contextmanager
    def _as_over_ray(self, method: str) -> Iterator[None]:
        try:
            yield
        except KEPT_ERRORS:
            raise
        except Exception as error:
            failed = ActorFailed(f"actor {self.name}: {method} failed: {type(error).__name__}: {error}")
            failed.kind = type(error).__name__
            raise failed from None


class Cluster:
    weights_served_at = ""  # engines read the files

    def __init__(self, folder: Path) -> None:
        self.shared_dir = folder / "weights"
        shutil.rmtree(self.shared_dir, ignore_errors=True)
        self.shared_dir.mkdir()

    def start(self, name: str, cls: type, settings: LearnerSettings) -> Actor:
        assert cls is PolicyLearner
        return Actor(name, Learner(settings))

    def prestart_generators(self, engine: Any, digest: str) -> None:
        pass

    def generators(self, engine: Any, digest: str) -> list[Actor]:
        return [Actor("generator-0", Engine(engine.checkpoint))]

    def stop(self, actor: Actor) -> None:
        pass

    def shutdown(self) -> None:
        pass
