"""Writes a pool of tasks from reasoning-gym, levels by its own curricula, as examples that a stage reads.

    pip install reasoning-gym            # in an environment of its own: nothing of Drover needs it
    python bench/reasoning_gym_pool.py POOL.jsonl.gz --data-set chain_sum --data-set gcd --levels 6 --per-level 40

A recipe then says `tasks: {dataset: POOL.jsonl.gz, format: examples}`, and for what is held out `split: held_out`.
Level L of a data set is level L - 1 of its curriculum in all of its attributes. Only data sets whose answers can be
compared are taken: its own scorer must give each answer 1, and a wrong one less.
"""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

DATA_SETS = ("chain_sum", "products", "gcd", "count_bits", "letter_counting", "leg_counting", "spell_backward",
             "time_intervals")  # fmt: skip
WRONG = "something else"


def main(
    out: Annotated[Path, typer.Argument(help="A .jsonl or .jsonl.gz file.")],
    data_set: Annotated[list[str], typer.Option(help="Of reasoning-gym.")] = list(DATA_SETS),  # noqa: B006
    levels: Annotated[int, typer.Option(help="From 1 to this one, as far as the data set goes.")] = 4,
    per_level: Annotated[int, typer.Option(help="Tasks of each data set and level.")] = 100,
    seed: Annotated[int, typer.Option()] = 1,
) -> None:
    """Write the pool."""
    from reasoning_gym.factory import create_curriculum, create_dataset

    from pipeline.data import Example, write_examples
    from rewards.task import Task, Verifier

    examples: dict[str, Example] = {}
    for name in data_set:
        for level in range(1, levels + 1):
            curriculum = create_curriculum(name)
            deepest = max(len(attribute.levels) for attribute in curriculum.attributes.values())
            if level > deepest:
                break
            curriculum.set_global_level(level - 1)
            config = curriculum.generate_configuration({"seed": seed * 1000 + level, "size": per_level})
            source = create_dataset(name, **vars(config))
            for number, entry in enumerate(source):
                answer = str(entry["answer"])
                if source.score_answer(answer, entry) < 1.0 or source.score_answer(WRONG, entry) >= 1.0:
                    raise SystemExit(f"{name}, level {level}: its scorer and its answer {answer!r} do not agree")
                prompt = f"{entry['question'].strip()}\nEnd with a line 'Answer: ' and the answer alone."
                kind: Verifier = "number" if re.fullmatch(r"-?\d+", answer) else "text"
                task = Task(task_id=f"{name}/{level}/{number}", domain=name, level=level, prompt=prompt, verifier=kind,
                            check={"answer": answer})  # fmt: skip
                examples.setdefault(prompt, Example(task, f"Answer: {answer}"))
    shuffled = random.Random(seed).sample(list(examples.values()), len(examples))  # `limit` then takes of all alike
    write_examples(out, shuffled)
    print(f"{out}: {len(examples)} tasks")


if __name__ == "__main__":
    typer.run(main)
