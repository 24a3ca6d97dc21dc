"""What the actors of a run ask for, and where they go: no Ray."""

from pipeline.cluster import plan_actors, thread_environment
from pipeline.config import ClusterSettings


def test_plan_counts_generators_and_one_learner() -> None:
    plan = plan_actors(ClusterSettings(generators=3, cpus_per_actor=2.0, gpus_per_actor=0.5))
    assert (plan.num_cpus, plan.num_gpus) == (8.0, 2.0)  # (3 + 1) x 2, (3 + 1) x 0.5


def test_plan_counts_the_engines_of_the_stage_that_asks_for_most() -> None:
    settings = ClusterSettings(generators=2, cpus_per_actor=2.0, gpus_per_actor=1.0)
    assert plan_actors(settings, most_engines=4).num_gpus == 5.0
    assert plan_actors(settings, most_engines=1).num_gpus == 3.0  # the RL stage still has two


def test_plan_says_what_a_node_lacks() -> None:
    plan = plan_actors(ClusterSettings(generators=3, cpus_per_actor=2.0, gpus_per_actor=0.5))
    assert plan.lacking({"CPU": 8.0, "GPU": 2.0}) == []
    assert plan.lacking({"CPU": 7.0}) == [
        "CPU: 3 generator + 1 learner or trainer ask for 8, this node has 7",
        "GPU: 3 generator + 1 learner or trainer ask for 2, this node has 0",
    ]


def test_generators_go_where_most_room_is_left_beside_the_learners() -> None:
    settings = ClusterSettings(generators=4, learners=2, cpus_per_actor=2, gpus_per_actor=1)
    nodes = {"a": {"CPU": 16, "GPU": 3}, "b": {"CPU": 6, "GPU": 8}, "c": {"CPU": 64}}
    # Beside two learners a has room for one more; b for three, by its CPUs; c has no GPU.
    assert plan_actors(settings).nodes_of_generators(nodes, here="a") == ["b", "b", "a", "b"]
    crowded = plan_actors(settings.model_copy(update={"generators": 9}))
    assert len(crowded.nodes_of_generators(nodes, here="a")) == 4
    assert plan_actors(settings).nodes_of_generators({"a": nodes["a"]}, here="a") == ["a"]


def test_every_thread_pool_gets_the_same_number() -> None:
    environment = thread_environment(3)
    assert {environment[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")} == {"3"}
