"""Record formats: where tasks and examples come from, and how they lie on disk.

Called by every stage. Files (.jsonl, .jsonl.gz, .json, .parquet) are read directly; hub ids go through `datasets`,
which has its only door here. Data that is wrong is a DataError: the file, what was wanted, what was found.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.deadline import HUB_DEADLINE_S, call_within
from pipeline.config import DatasetTasks, ExampleMix, GeneratedTasks, TaskSource
from pipeline.errors import DataError, InfrastructureError
from rewards.task import UNKNOWN_LEVEL, Task, split_of

Record = dict[str, Any]

FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
COLUMNS = {
    "gsm8k": ("question", "answer"),
    "humaneval": ("prompt", "canonical_solution"),
    "prompt_answer": ("prompt", "answer"),
}
HUB_CONFIGS = {"gsm8k": "main"}  # openai/gsm8k also holds "socratic", and the hub chooses neither by itself
SEEDS_PER_SOURCE = 1_000_000  # tasks of two source seeds never share a task seed
DRAWS_PER_TASK = 20  # the easiest levels hold few distinct prompts; stop looking for new ones after so many draws


@dataclass(frozen=True, slots=True)
class Example:
    """A task and one answer to it, as an annotator (careful or not) or a data set gives it."""

    task: Task
    answer: str


# --- tasks and examples -------------------------------------------------------------------------------------------


def load_tasks(source: TaskSource, seed: int, *, dropped: Counter[str] | None = None) -> list[Task]:
    """The tasks of a source, with distinct prompts, all on the source's side of the wall; the same for the same seed.

    Generated levels that hold fewer distinct prompts than `tasks_per_level` give as many as they hold. Data sets keep
    the order of the file and ignore the seed. What is not in the list is counted in `dropped`: `rows_of_other_split`
    and `duplicate_prompts` among the rows read, `tasks_not_found` where levels gave too few. Raises DataError, and
    InfrastructureError where the hub is too slow.
    """
    dropped = Counter() if dropped is None else dropped
    if isinstance(source, GeneratedTasks):
        return list(_generated_tasks(source, seed, dropped))
    return [example.task for example in _dataset_examples(source, dropped)]


def load_examples(
    source: TaskSource, mix: ExampleMix, seed: int, *, dropped: Counter[str] | None = None
) -> list[Example]:
    """Tasks with answers: generated ones answered in a style drawn from `mix`, data sets with their own answers.

    Tasks, errors and `dropped` are those of `load_tasks`.
    """
    dropped = Counter() if dropped is None else dropped
    if isinstance(source, DatasetTasks):
        return _dataset_examples(source, dropped)
    from rewards.domains import Style, worked_solution

    rng = random.Random(f"styles {seed}")
    styles: list[Style] = ["careful", "wrong", "hasty"]
    weights = [mix.careful, mix.wrong, max(0.0, 1.0 - mix.careful - mix.wrong)]
    return [
        Example(task, worked_solution(task, rng.choices(styles, weights)[0], rng))
        for task in _generated_tasks(source, seed, dropped)
    ]


def _generated_tasks(source: GeneratedTasks, seed: int, dropped: Counter[str]) -> Iterator[Task]:
    from rewards.domains import generate

    seen: set[str] = set()
    for domain in source.domains:
        for level in range(source.levels[0], source.levels[1] + 1):
            found = 0
            for draw in range(source.tasks_per_level * DRAWS_PER_TASK):
                task = generate(domain, level, seed * SEEDS_PER_SOURCE + draw, source.split)
                if task.prompt in seen:
                    continue
                seen.add(task.prompt)
                yield task
                found += 1
                if found == source.tasks_per_level:
                    break
            else:
                dropped["tasks_not_found"] += source.tasks_per_level - found


def _dataset_examples(source: DatasetTasks, dropped: Counter[str]) -> list[Example]:
    rows = ((f"{source.dataset}, record {number}", row) for number, row in enumerate(_rows(source), start=1))
    read = _own_examples(rows) if source.format == "examples" else _foreign_examples(source, rows)
    examples: list[Example] = []
    seen: set[str] = set()
    for example in read:
        if split_of(example.task.prompt) != source.split:
            dropped["rows_of_other_split"] += 1
            continue
        if example.task.prompt in seen:
            dropped["duplicate_prompts"] += 1
            continue
        seen.add(example.task.prompt)
        examples.append(example)
        if len(examples) == source.limit:
            break
    if not examples:
        raise DataError(f"{source.dataset}: no {source.format} task on the {source.split} side")
    return examples


def _own_examples(rows: Iterable[tuple[str, Record]]) -> Iterator[Example]:
    for where, row in rows:
        try:
            yield example_from_json(row)
        except (TypeError, KeyError) as error:
            raise DataError(f"{where}: not an example of ours ({error})") from error


def _foreign_examples(source: DatasetTasks, rows: Iterable[tuple[str, Record]]) -> Iterator[Example]:
    """Each row by the reader of its format."""
    prompt_column, answer_column = COLUMNS[source.format]
    prompt_column, answer_column = source.prompt_column or prompt_column, source.answer_column or answer_column
    read = {"gsm8k": _gsm8k, "humaneval": _humaneval, "prompt_answer": _prompt_answer}[source.format]
    wanted = [prompt_column, answer_column, *(["test", "entry_point"] if source.format == "humaneval" else [])]
    for number, (where, row) in enumerate(rows):
        _require_columns(row, wanted, where)
        yield read(row, row[prompt_column], row[answer_column], f"{source.format}/{number}", where)


def _gsm8k(row: Record, question: str, solution: str, task_id: str, where: str) -> Example:
    steps, marker, final = solution.rpartition("####")
    if not marker:
        raise DataError(f"{where}: a gsm8k answer ends in '#### number'; this one ends in {solution[-40:]!r}")
    check = {"answer": final.strip().replace(",", "")}
    # <<48/2=24>> calls a calculator that the policy does not have.
    answer = re.sub(r"<<.*?>>", "", steps) + f"#### {check['answer']}"
    return Example(_task(task_id, "maths", question, "number", check), answer)


def _humaneval(row: Record, prompt: str, solution: str, task_id: str, where: str) -> Example:
    check = {"prompt": prompt, "test": row["test"], "entry_point": row["entry_point"]}
    request = f"Complete this Python function. Answer with the whole program.\n```python\n{prompt.rstrip()}\n```"
    task = _task(str(row.get("task_id", task_id)), "code", request, "humaneval", check)
    return Example(task, f"```python\n{prompt}{solution.rstrip()}\n```")


def _prompt_answer(row: Record, prompt: str, answer: str, task_id: str, where: str) -> Example:
    final = answer.rpartition("Answer:")[2].strip()
    spoken = answer if "Answer:" in answer else f"Answer: {final}"
    return Example(_task(task_id, "reasoning", prompt, "text", {"answer": final}), spoken)


def _task(task_id: str, domain: str, prompt: str, verifier: Any, check: Record) -> Task:
    return Task(task_id=task_id, domain=domain, level=UNKNOWN_LEVEL, prompt=prompt, verifier=verifier, check=check)


# --- reading data sets --------------------------------------------------------------------------------------------


def _rows(source: DatasetTasks) -> Iterable[Record]:
    path = Path(source.dataset).expanduser()
    if path.is_file():
        return _file_rows(path)
    if source.dataset.endswith(FILE_SUFFIXES) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source.dataset):
        raise DataError(f"{source.dataset}: no such file (looked in {path.parent.resolve()})")
    return _hub_rows(source.dataset, HUB_CONFIGS.get(source.format))


def _file_rows(path: Path) -> list[Record]:
    if path.name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_table(path).to_pylist()
        except pyarrow.ArrowException as error:
            raise DataError(f"{path}: not a readable parquet file ({error})") from error
    if path.name.endswith(".json"):
        rows = _parse_json(path.read_text(encoding="utf-8"), str(path))
        if not isinstance(rows, list):
            raise DataError(f"{path}: wanted a JSON list of records, found {type(rows).__name__}")
        return rows
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return read_jsonl(path)
    raise DataError(f"{path}: wanted one of {', '.join(FILE_SUFFIXES)}, found {path.suffix or 'no suffix'!r}")


def _hub_rows(hub_id: str, config: str | None) -> Iterable[Record]:
    import datasets

    try:
        splits = call_within(HUB_DEADLINE_S, datasets.load_dataset, hub_id, config)
    except TimeoutError as error:
        raise InfrastructureError(
            f"{hub_id}: the hub had not sent the data set after {HUB_DEADLINE_S:.0f} s; the same command tries again, "
            "or download the file and write its path"
        ) from error
    except Exception as error:  # the hub client raises many kinds; each means that the data is not there to be read
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise DataError(
            f"{hub_id}: no such file, and the Hugging Face hub did not give it as a data set ({reason}); "
            "offline, download the file and write its path"
        ) from error
    return splits["train"] if "train" in splits else next(iter(splits.values()))


def _require_columns(row: Any, wanted: list[str], where: str) -> None:
    if not isinstance(row, dict):
        raise DataError(f"{where}: wanted a record, found {type(row).__name__}")
    for column in wanted:
        if column not in row:
            raise DataError(f"{where}: wanted column {column!r}, found {', '.join(map(repr, row)) or 'none'}")
        if not isinstance(row[column], str):
            raise DataError(f"{where}: column {column!r}: wanted text, found {type(row[column]).__name__}")


# --- our records on disk ------------------------------------------------------------------------------------------


def as_dataset(rows: list[Record]) -> Any:
    """Records with equal keys as the `datasets.Dataset` that TRL's trainers ask for."""
    import datasets

    return datasets.Dataset.from_list(rows)


def task_to_json(task: Task) -> Record:
    """A task as a JSON object, `task_from_json`'s opposite."""
    fields = ("task_id", "domain", "level", "prompt", "verifier", "check")
    return {field: getattr(task, field) for field in fields}


def task_from_json(record: Record) -> Task:
    return Task(**record)


def example_to_json(example: Example) -> Record:
    return {"task": task_to_json(example.task), "answer": example.answer}


def example_from_json(record: Record) -> Example:
    return Example(task_from_json(record["task"]), record["answer"])


def write_examples(path: Path, examples: Iterable[Example]) -> None:
    write_jsonl(path, map(example_to_json, examples))


def read_examples(path: Path) -> list[Example]:
    """Raises DataError naming the file and record that is not an example."""
    return list(_own_examples((f"{path}, record {i}", row) for i, row in enumerate(read_jsonl(path), start=1)))


def write_jsonl(path: Path, records: Iterable[Record]) -> None:
    """One JSON object a line, gzipped where the name ends in .gz. The same records are the same bytes, whenever they
    are written: a stage that reads them is then the same stage."""
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(lines, mtime=0) if path.name.endswith(".gz") else lines)


def read_jsonl(path: Path) -> list[Record]:
    """The records of a .jsonl or .jsonl.gz file; blank lines are skipped. Raises DataError naming file and line."""
    try:
        with (gzip.open if path.name.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
            lines = enumerate(file, start=1)
            return [_parse_json(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
