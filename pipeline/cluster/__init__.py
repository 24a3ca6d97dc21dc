"""The only door to Ray's actors.

The runner builds one `Cluster` per run; stages start plain classes as actors with it and share its vLLM engines.
Promises: every call has a deadline; a dead, silent or failing actor becomes an InfrastructureError with its last log
lines; after `shutdown`, or after a kill -9 of the run, no process of a private Ray is left.

    run ── Cluster ─┬─▶ raylet ─▶ ActorHost (our class inside) ─▶ engine core     all wear the run's tag
                    └─▶ watchdog: kills what wears the tag when the run is gone

    cluster.py        starts, finds again and stops actors and engines
    actor.py          one of them: the process around our object, and the handle its caller holds
    ray_process.py    Ray itself, private or somebody else's
    resource_plan.py  what all of them ask of it: arithmetic, no Ray

Waits, and what ends them: Ray's start, an actor's start (start_deadline_s); a call (its timeout_s, the actor's death,
ctrl-C); shutdown (SHUTDOWN_S, then the watchdog).
"""

from pipeline.cluster.actor import KEPT_ERRORS, Actor, ActorFailed, ActorGone, ActorHost
from pipeline.cluster.cluster import Cluster
from pipeline.cluster.resource_plan import plan_actors, thread_environment

__all__ = [
    "KEPT_ERRORS", "Actor", "ActorFailed", "ActorGone", "ActorHost", "Cluster", "plan_actors", "thread_environment",
]  # fmt: skip
