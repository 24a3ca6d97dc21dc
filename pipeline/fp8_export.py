"""`drover export-fp8`: the words around `model/fp8_export.py`, its progress bar, and its last words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import DataError, RecipeError


def export_checkpoint(
    source: str,
    target: str,
    *,
    recipe: str,
    all_layers: bool,
    layers: Sequence[int] | None = None,
    scope: Sequence[str] | None = None,
) -> None:
    """Write the Llama 4 behind a path or hub id with FP8 experts, or more of it. RecipeError for options that say
    nothing or two things at once, DataError for a checkpoint that cannot be served so."""
    from rich.console import Console
    from rich.progress import Progress

    from model.checkpoint import CheckpointNotFound, resolve
    from model.fp8_export import export_fp8
    from model.precision import Fp8Settings

    if layers and all_layers:
        raise RecipeError(f"--layer {layers[0]} and --all-layers contradict each other; leave one of them out")
    try:
        settings = Fp8Settings(
            recipe=recipe,  # type: ignore[arg-type]
            keep_first_and_last=not all_layers,
            layers=tuple(layers) if layers else None,
            scope=tuple(scope) if scope else Fp8Settings.scope,  # type: ignore[arg-type]
        )
    except ValueError as error:
        raise RecipeError(str(error)) from error
    if Path(target).exists():
        raise DataError(f"{target} exists; name a directory that does not")
    try:
        with Progress(console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task("quantising", total=None)
            size = export_fp8(
                resolve(source),
                Path(target),
                settings,
                lambda done, total: progress.update(bar, completed=done, total=total),
            )
    except (CheckpointNotFound, ValueError) as error:
        raise DataError(str(error)) from error
    before, after = size.values()
    what = f"{', '.join(settings.scope)} in FP8 ({recipe})"
    print(f"{target}: {what}, {before / 2**20:,.1f} MiB → {after / 2**20:,.1f} MiB; for vLLM on GPUs")
