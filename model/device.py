"""Which device a process trains on. Called by the learner and by the trainers; not measured on a GPU.

Ray shows an actor the GPU that it was given (`cluster.gpus_per_actor`) and no other. So a GPU that can be seen here is
this process's own, and where none can be seen it trains on the CPU. vLLM chooses for an engine, by the same rule.
"""

from __future__ import annotations

import torch


def own_device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def backends(device: torch.device) -> str:
    """What the trainers of one model talk through, as `init_process_group` takes it: NCCL for what lies on GPUs, gloo
    for what lies on CPUs, Python objects among it."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
