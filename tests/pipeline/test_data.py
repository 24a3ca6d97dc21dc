"""Data sets become our records, or a DataError that names what is wrong; records survive the disk."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import DatasetTasks, ExampleMix, GeneratedTasks
from pipeline.data import (
    Example,
    load_examples,
    load_tasks,
    read_examples,
    read_jsonl,
    write_examples,
    write_jsonl,
)
from pipeline.errors import DataError, InfrastructureError
from rewards.domains import worked_solution
from rewards.task import Task, split_of

GSM8K = [
    {"question": f"Ann has {n} pens and buys {n}000.", "answer": f"{n}+{n}000 = <<{n}+1=2>>pens\n#### {n},00{n}"}
    for n in range(1, 9)
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        write_jsonl(path, rows)
    return str(path)


def dataset(path: str, **keys: Any) -> DatasetTasks:
    return DatasetTasks.model_validate({"dataset": path, "format": "gsm8k"} | keys)


# --- data sets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"])
def test_every_file_format_gives_the_same_examples(tmp_path: Path, name: str) -> None:
    source = dataset(write(tmp_path / name, GSM8K))
    expected = [row["question"] for row in GSM8K if split_of(row["question"]) == "train"]
    examples = load_examples(source, ExampleMix(), seed=0)
    assert [example.task.prompt for example in examples] == expected
    first = examples[0]
    number = first.task.prompt.split()[2]
    assert first.task.verifier == "number" and first.task.check == {"answer": f"{number}00{number}"}  # comma gone
    assert first.answer == f"{number}+{number}000 = pens\n#### {number}00{number}"  # calculator call gone
    assert load_tasks(source, seed=1) == [example.task for example in examples]


def test_the_two_sides_of_a_data_set_share_no_prompt_and_lose_none(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": f"What is {n} + 0?", "answer": f"#### {n}"} for n in range(200)])
    train, held_out = (load_tasks(dataset(path, split=side), seed=0) for side in ("train", "held_out"))
    assert len(train) + len(held_out) == 200 and 20 < len(held_out) < 65
    assert not {task.prompt for task in train} & {task.prompt for task in held_out}


def test_limit_counts_distinct_tasks_of_the_split(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [row for row in GSM8K for _ in range(2)])
    tasks = load_tasks(dataset(path, limit=3), seed=0)
    assert len(tasks) == len({task.prompt for task in tasks}) == 3


def test_every_row_that_is_left_out_is_counted(tmp_path: Path) -> None:
    rows = [{"question": f"What is {n} + 0?", "answer": f"#### {n}"} for n in range(50)]
    source = dataset(write(tmp_path / "a.jsonl", rows + rows[:10]))
    dropped: Counter[str] = Counter()
    tasks = load_tasks(source, seed=0, dropped=dropped)
    assert dropped["rows_of_other_split"] > 3 and dropped["duplicate_prompts"] > 3
    assert len(tasks) + dropped.total() == 60
    again: Counter[str] = Counter()
    assert len(load_examples(source, ExampleMix(), seed=0, dropped=again)) == len(tasks) and again == dropped


def test_humaneval_rows_become_code_tasks_with_a_whole_program_as_answer(tmp_path: Path) -> None:
    rows = [
        {"task_id": f"HumanEval/{n}", "prompt": f'def f{n}(x):\n    """Add."""\n', "entry_point": f"f{n}",
         "canonical_solution": "    return x + 1\n\n", "test": "def check(candidate):\n    assert candidate(1) == 2\n"}
        for n in range(5)
    ]  # fmt: skip
    example = load_examples(dataset(write(tmp_path / "a.jsonl.gz", rows), format="humaneval"), ExampleMix(), seed=0)[0]
    assert example.task.verifier == "humaneval" and example.task.domain == "code"
    assert set(example.task.check) == {"prompt", "test", "entry_point"}
    assert example.task.check["prompt"].rstrip() in example.task.prompt
    namespace: dict[str, Any] = {}
    exec(example.answer.removeprefix("```python\n").removesuffix("\n```"), namespace)  # noqa: S102 - written above
    assert namespace[example.task.check["entry_point"]](1) == 2


def test_plain_columns_by_any_name(tmp_path: Path) -> None:
    rows = [{"ask": f"Capital {n}?", "say": said} for n in range(9) for said in ("I think.\nAnswer: Paris",)]
    rows += [{"ask": f"Colour {n}?", "say": "red"} for n in range(9)]
    path = write(tmp_path / "a.jsonl", rows)
    source = dataset(path, format="prompt_answer", prompt_column="ask", answer_column="say")
    examples = load_examples(source, ExampleMix(), seed=0)
    assert {example.task.check["answer"] for example in examples} == {"Paris", "red"}
    assert {example.answer for example in examples} == {"I think.\nAnswer: Paris", "Answer: red"}


def test_a_stage_reads_the_examples_that_another_wrote_with_their_levels_and_verifiers(tmp_path: Path) -> None:
    written = load_examples(GeneratedTasks(domains=["maths", "code"], tasks_per_level=2), ExampleMix(), seed=0)
    write_examples(tmp_path / "kept.jsonl.gz", written)
    source = dataset(str(tmp_path / "kept.jsonl.gz"), format="examples")
    assert load_examples(source, ExampleMix(), seed=0) == written
    assert {task.level for task in load_tasks(source, seed=0)} == set(range(1, 11))


def test_the_same_examples_are_the_same_bytes_whenever_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = load_examples(GeneratedTasks(domains=["maths"], tasks_per_level=1), ExampleMix(), seed=0)
    for name, now in (("one", 1.0e9), ("two", 2.0e9)):
        monkeypatch.setattr("time.time", lambda now=now: now)
        write_examples(tmp_path / f"{name}.jsonl.gz", examples)
    one, two = ((tmp_path / f"{name}.jsonl.gz").read_bytes() for name in ("one", "two"))
    assert one == two and one[:2] == b"\x1f\x8b"


# --- what is wrong with data --------------------------------------------------------------------------------------


def test_missing_column_names_file_record_column_and_what_is_there(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"q": "1?", "answer": "#### 1"}])
    with pytest.raises(DataError) as error:
        load_tasks(dataset(path), seed=0)
    assert all(word in str(error.value) for word in (path, "record 1", "'question'", "'q', 'answer'"))


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"question": "1?", "answer": "#### 1"}\n{"question": ', ["line 2", "not JSON"]),
        ('{"question": "1?", "answer": "it is one"}', ["record 1", "####", "it is one"]),
        ('{"question": 1, "answer": "#### 1"}', ["question", "wanted text", "int"]),
        ("[1, 2]", ["record 1", "wanted a record", "list"]),
        ("", ["no gsm8k task on the train side"]),
        (b"\xff\xfe\x00", ["cannot be read"]),
    ],
)
def test_broken_content_is_a_data_error(tmp_path: Path, text: str | bytes, words: list[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError) as error:
        load_tasks(dataset(str(path)), seed=0)
    assert str(path) in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("key", ["prompt_column", "answer_column"])
def test_columns_of_examples_cannot_be_named(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key}: format examples has keys of its own"):
        DatasetTasks.model_validate({"dataset": "a.jsonl", "format": "examples", key: "x"})


def test_a_record_that_is_no_example_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"task": {"prompt": "1?"}}])
    with pytest.raises(DataError, match="record 1: not an example of ours"):
        load_tasks(dataset(path, format="examples"), seed=0)


def test_truncated_and_false_gzip_and_parquet_are_data_errors(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"question": "1?", "answer": "#### 1"}\n' * 500)
    for name, content in {"cut.jsonl.gz": whole[:40], "no.jsonl.gz": b"plain", "no.parquet": b"plain"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            load_tasks(dataset(str(tmp_path / name)), seed=0)


@pytest.mark.parametrize("name", ["nowhere/gone.jsonl", "./gone", "/gone/too"])
def test_missing_file_is_named_and_no_hub_is_asked(name: str) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_tasks(dataset(name), seed=0)


def test_hub_id_without_a_hub_is_a_data_error_with_the_way_out() -> None:
    with pytest.raises(DataError, match="nobody/nothing.*write its path"):
        load_tasks(dataset("nobody/nothing"), seed=0)


def test_a_hub_that_never_ends_is_an_infrastructure_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_: time.sleep(5))
    monkeypatch.setattr("pipeline.data.HUB_DEADLINE_S", 0.05)
    with pytest.raises(InfrastructureError, match="nobody/nothing.*write its path"):
        load_tasks(dataset("nobody/nothing"), seed=0)


def test_reading_a_file_does_not_import_the_datasets_library(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", GSM8K)
    code = (
        "import sys; from pipeline.config import DatasetTasks; from pipeline.data import load_tasks\n"
        f"load_tasks(DatasetTasks(dataset={path!r}, format='gsm8k'), 0)\n"
        "sys.exit('datasets' in sys.modules or 'torch' in sys.modules)"
    )
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=60).returncode == 0


# --- generated tasks ----------------------------------------------------------------------------------------------


def test_generated_tasks_are_distinct_repeatable_and_on_their_side() -> None:
    source = GeneratedTasks(levels=(2, 4), tasks_per_level=5)
    tasks = load_tasks(source, seed=3)
    assert tasks == load_tasks(source, seed=3) != load_tasks(source, seed=4)
    assert len({task.prompt for task in tasks}) == len(tasks)
    assert {split_of(task.prompt) for task in tasks} == {"train"}
    cells = Counter((task.domain, task.level) for task in tasks)
    assert set(cells.values()) == {5} and len(cells) == 4 * 3


def test_held_out_seeds_never_meet_training_seeds() -> None:
    levels = {"domains": ["maths"], "levels": (1, 2), "tasks_per_level": 30}
    train = load_tasks(GeneratedTasks.model_validate(levels), seed=1)
    held_out = load_tasks(GeneratedTasks.model_validate(levels | {"split": "held_out"}), seed=1)
    assert train and held_out
    assert not {task.prompt for task in train} & {task.prompt for task in held_out}


def test_tasks_that_a_level_does_not_hold_are_counted() -> None:
    source = GeneratedTasks(domains=["maths"], levels=(1, 1), tasks_per_level=2000)
    dropped: Counter[str] = Counter()
    tasks = load_tasks(source, seed=0, dropped=dropped)
    assert len(tasks) < 2000 and dropped == {"tasks_not_found": 2000 - len(tasks)}


def test_examples_follow_the_mix() -> None:
    import random

    source = GeneratedTasks(domains=["maths"], levels=(3, 8), tasks_per_level=40)
    careful = load_examples(source, ExampleMix(careful=1.0, wrong=0.0), seed=5)
    mixed = load_examples(source, ExampleMix(careful=0.5, wrong=0.0), seed=5)
    assert [example.task for example in careful] == [example.task for example in mixed] == load_tasks(source, seed=5)
    hasty = [worked_solution(example.task, "hasty", random.Random(0)) for example in careful]
    longest_hasty = max(map(len, hasty))
    num_careful = sum(len(example.answer) > longest_hasty for example in mixed)
    assert all(len(example.answer) > longest_hasty for example in careful)  # careful answers show their steps
    assert 0.35 < num_careful / len(mixed) < 0.65


# --- our records on disk ------------------------------------------------------------------------------------------


def test_examples_survive_the_disk(tmp_path: Path) -> None:
    task = Task(task_id="code/1/7", domain="code", level=1, prompt='f(x)\n"ü"\u2028', verifier="code",
                check={"function": "f", "cases": [[[1], [2.5, None]]]})  # fmt: skip
    examples = [Example(task, "def f(x): ...\n"), Example(task, "")]
    write_examples(tmp_path / "e.jsonl", examples)
    assert read_examples(tmp_path / "e.jsonl") == examples


def test_a_record_that_is_not_ours_is_named(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    write_jsonl(path, [{"task": {"prompt": "?"}, "answer": ""}])
    with pytest.raises(DataError, match=r"e\.jsonl, record 1"):
        read_examples(path)
    assert read_jsonl(path) == [{"task": {"prompt": "?"}, "answer": ""}]
    with pytest.raises(DataError, match="gone"):
        read_jsonl(tmp_path / "gone.jsonl")
