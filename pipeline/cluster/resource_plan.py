"""What the actors of a run ask of Ray, as plain arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.config import ClusterSettings


@dataclass(frozen=True)
class ActorPlan:
    role: str
    count: int
    num_cpus: float  # each; logical: Ray counts them, nothing enforces them
    num_gpus: float  # each


@dataclass(frozen=True)
class ResourcePlan:
    """What the actors of a run ask of Ray at the same time."""

    actors: tuple[ActorPlan, ...]

    @property
    def num_cpus(self) -> float:
        return sum(actor.count * actor.num_cpus for actor in self.actors)

    @property
    def num_gpus(self) -> float:
        return sum(actor.count * actor.num_gpus for actor in self.actors)

    def nodes_of_generators(self, nodes: Mapping[str, Mapping[str, float]], here: str) -> list[str]:
        """A node for each generator that fits, where they need not be `here`, on the node that the learners have: each
        goes to where most room is left. `nodes`: node → its resources."""
        generator, learner = self.actors
        asked = {"CPU": generator.num_cpus, "GPU": generator.num_gpus}
        room = {
            node: min(int(resources.get(kind, 0) // number) for kind, number in asked.items() if number)
            for node, resources in sorted(nodes.items())
        }
        room[here] -= learner.count
        chosen: list[str] = []
        while len(chosen) < generator.count and room[most := max(room, key=room.__getitem__)] > 0:
            chosen.append(most)
            room[most] -= 1
        return chosen

    def lacking(self, available: Mapping[str, float]) -> list[str]:
        """What a node with `available` resources cannot give, one line each; empty where the plan fits."""
        asked = {"CPU": self.num_cpus, "GPU": self.num_gpus}
        who = " + ".join(f"{actor.count} {actor.role}" for actor in self.actors)
        return [
            f"{kind}: {who} ask for {number:g}, this node has {available.get(kind, 0):g}"
            for kind, number in asked.items()
            if number > available.get(kind, 0)
        ]


def plan_actors(settings: ClusterSettings, most_engines: int = 0) -> ResourcePlan:
    """The most actors a run has at once: its generators, and its learners or, in their place, a trainer.

    `most_engines`: the largest number that a stage asks for instead of `settings.generators`. Engines outlive their
    stage, so a trainer may find that many.
    """
    share = (settings.cpus_per_actor, settings.gpus_per_actor)
    return ResourcePlan((
        ActorPlan("generator", max(settings.generators, most_engines), *share),
        ActorPlan("learner or trainer", settings.learners, *share),
    ))  # fmt: skip


def thread_environment(num_threads: int) -> dict[str, str]:
    """Two OpenMP processes with more threads than cores collapse; every library that counts threads gets a number."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {name: str(num_threads) for name in names} | {"TOKENIZERS_PARALLELISM": "false"}
