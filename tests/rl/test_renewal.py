"""New prompts come from the frontier, never from what is held out, and a resumed run makes the same ones."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from curricula import curriculum

from rewards.domains import generate
from rewards.task import Task, split_of
from rl.curriculum import Curriculum
from rl.gates import Choice, Outcome
from rl.renewal import NGRAM, Frontier, Overlap, Renewal, RenewalRules, ngrams


def number(i: int) -> Task:
    """A foreign problem, of no generator of ours."""
    prompt = f"Ann has {i} pens and finds {i + 3} more. How many are there?"
    return Task(
        task_id=f"n{i}", domain="sums", level=1, prompt=prompt, verifier="number", check={"answer": str(2 * i + 3)}
    )


def renewal(tasks: list[Task], held_out: tuple[str, ...] = (), fits: Any = lambda task: True, **rules: Any) -> Renewal:
    defaults = dict(every=1, prompts=4, share=0.5, sources=("combine", "go_on"), band=(0.25, 0.75))
    return Renewal(RenewalRules(**defaults | rules), {task.task_id: task for task in tasks}, held_out, fits, seed=1)


def of(source: Renewal) -> Curriculum:
    cells = {name: (task.domain, task.level) for name, task in source.tasks.items()}
    return curriculum(cells, renewal=source, band=(0.25, 0.75), retire_above=0.9)


def outcome(entry: str, passes: int, version: int = 0) -> Outcome:
    choice = Choice(entry=entry, size=16, known=0.0, expected=0.5)
    return Outcome(slot=0, turn=0, choice=choice, passes=passes, total=16, version=version, answers=16, tokens=160,
                   trained_tokens=160, kept=True)  # fmt: skip


def taught(tasks: list[Task], passes: dict[str, int], **rules: Any) -> Curriculum:
    chooser = of(renewal(tasks, **rules))
    chooser.learn(1, [outcome(name, count) for name, count in passes.items()], [])
    return chooser


def test_new_prompts_are_made_of_those_that_are_solved_and_join_the_pool() -> None:
    chooser = taught([number(i) for i in range(8)], {"n0": 16, "n1": 15, "n2": 16, "n3": 16, "n4": 0, "n5": 1})
    assert len(chooser.renewed) == 4
    for new in chooser.renewed:
        assert set(new.parents) <= {"n0", "n1", "n2", "n3"}, "what is not solved would become too hard"
        assert new.task.level == 2 and new.version == 1 and new.source in ("combine", "go_on")
        assert chooser.domain_of(new.task.task_id) == "sums"
        assert chooser.renewal.tasks[new.task.task_id] == new.task
    assert chooser.difficulty.counts()["new"] == 8 - 6 + 4
    drawn = {
        choice.entry for slot in range(0, 160, 16) for turns in chooser.plan(range(slot, slot + 16)) for choice in turns
    }
    assert drawn & {new.task.task_id for new in chooser.renewed}, "and they are asked"


def test_nothing_is_made_of_nothing() -> None:
    chooser = taught([number(i) for i in range(8)], {"n2": 0})
    assert chooser.renewed == [] and chooser.renewal.refused["does not apply"] > 0


def test_synthetic_prompts_are_at_most_their_share() -> None:
    chooser = of(renewal([number(i) for i in range(30)], share=0.25, prompts=7))
    for version in range(1, 6):
        chooser.learn(version, [outcome(f"n{i}", 16, version - 1) for i in range(6)], [])
    made = len(chooser.renewal.made)
    assert made == 10 and made / (30 + made) == 0.25


def test_retired_prompts_make_room_for_others() -> None:
    """A pool that the policy outgrows goes on growing, and no re-test brings back more than its share."""
    chooser = of(renewal([number(i) for i in range(30)], share=0.25, prompts=10))
    chooser.learn(1, [outcome(f"n{i}", 16) for i in range(6)], [])
    first = [new.task.task_id for new in chooser.renewed]
    assert len(first) == 10
    chooser.learn(2, [outcome(name, 16, 1) for name in first[:4]], [])
    assert chooser.difficulty.counts()["retired"] == 6 + 4 and len(chooser.renewed) == 4
    chooser.learn(3, [outcome(name, 8, 2) for name in first[4:]], [])
    assert chooser.renewed == []
    ids = np.array([chooser.entries.id_of[name] for name in first])
    assert chooser.difficulty.num_alive(ids) == 6, "those whose place was taken"
    chooser.learn(99, [], [])
    due = {chooser.entries.names[i] for i in chooser.difficulty.due_now(np.arange(len(chooser.entries)))}
    assert due == {f"n{i}" for i in range(6)}


def test_sources_that_cannot_make_anything_of_a_pool_do_not_stand_in_the_way() -> None:
    """Nothing is ever learnt of them, so their promise stays as high as that of what was never tried."""
    source = renewal([number(i) for i in range(60)], sources=("wrap", "extend", "generators", "go_on"))
    chooser = of(source)
    for version in range(1, 5):
        poor = [outcome(new.task.task_id, 0, version - 1) for new in chooser.renewed]  # go_on, without signal
        chooser.learn(version, [*(outcome(f"n{i}", 16, version - 1) for i in range(20)), *poor], [])
        assert [new.source for new in chooser.renewed] == ["go_on"] * 4


def test_generators_keep_out_of_pools_that_are_not_theirs() -> None:
    """Of the domain maths too: GSM8K has no use for "Compute 15."."""
    foreign = [replace(number(i), domain="maths", level=0) for i in range(40)]
    chooser = taught(foreign, {f"n{i}": 16 for i in range(20)}, sources=("generators",))
    assert chooser.renewed == []
    ours = [generate("maths", 2, seed, "train") for seed in range(5)]
    mixed = taught([*foreign, *ours], {ours[0].task_id: 0, "n3": 8}, sources=("generators",))
    assert {(new.task.domain, new.task.level) for new in mixed.renewed} == {("maths", 2)}, "word problems have no level"


def test_only_every_so_many_versions() -> None:
    chooser = of(renewal([number(i) for i in range(8)], every=3))
    grown = []
    for version in range(1, 7):
        chooser.learn(version, [outcome("n0", 16, version - 1), outcome("n1", 16, version - 1)], [])
        grown.append(len(chooser.renewed))
    assert [bool(count) for count in grown] == [False, False, True, False, False, True]


def test_what_is_known_held_out_or_too_long_is_refused() -> None:
    held_out = "Take the answer to this and add 4 to it. Give only the final result and nothing else at all."
    overlap = Overlap(["How  many PENS?"], [held_out])
    assert overlap.reason("how many pens") == "known"
    near = next(
        f"Problem {i}. {held_out} Please." for i in range(99) if split_of(f"Problem {i}. {held_out} Please.") == "train"
    )
    assert overlap.reason(near) == "held out", "thirteen words in a row are shared"
    other = next(f"Is {i} even?" for i in range(99) if split_of(f"Is {i} even?") == "held_out")
    assert overlap.reason(other) == "held out", "by the wall that every prompt stands on one side of"
    assert len(next(iter(ngrams(held_out)))) == NGRAM and len(ngrams("two words")) == 1

    chooser = taught([number(i) for i in range(8)], {"n0": 16, "n1": 16}, fits=lambda task: False)
    assert chooser.renewed == [] and chooser.renewal.refused["too long"] > 0


def test_the_wording_of_a_data_set_is_near_nothing() -> None:
    """HumanEval's every prompt begins with the same fifteen words and signs."""
    wording = "Complete this Python function. Answer with the whole program. Write nothing else around it, please."
    overlap = Overlap(
        [f"{wording} Add {i}." for i in range(3)],
        [f"{wording} Reverse the words of every line, last first, and drop the empty ones."],
    )
    ours = next(f"{wording} Add {i}." for i in range(9, 99) if split_of(f"{wording} Add {i}.") == "train")
    assert overlap.reason(ours) == ""
    near = (f"{i}. Reverse the words of every line, last first, and drop the empty ones." for i in range(99))
    assert overlap.reason(next(one for one in near if split_of(one) == "train")) == "held out"


def test_prompts_that_are_too_hard_make_room_after_those_that_are_too_easy() -> None:
    """And do not come back when their neighbours rise."""
    source = renewal([number(i) for i in range(30)], share=0.25, prompts=10)
    cells = {name: (task.domain, task.level) for name, task in source.tasks.items()}
    chooser = curriculum(cells, renewal=source, band=(0.25, 0.75), retire_above=0.9, park_below=0.1, retest_every=50)
    chooser.learn(1, [outcome(f"n{i}", 16) for i in range(6)], [])
    first = [new.task.task_id for new in chooser.renewed]
    chooser.learn(2, [outcome(name, 0 if i < 4 else 16, 1) for i, name in enumerate(first[:6])], [])
    ids = np.array([chooser.entries.id_of[name] for name in first])
    assert len(chooser.renewed) == 6
    assert chooser.difficulty.given_up(ids).tolist() == [True] * 6 + [False] * 4
    chooser.learn(3, [outcome(name, 16, 2) for name in first[6:]], [])
    chooser.learn(99, [], [])
    assert not set(chooser.difficulty.due_now(ids)) & set(ids[:6])


def test_turns_by_size_count_the_prompts_that_were_added() -> None:
    tasks = [number(i) for i in range(30)] + [
        replace(number(i), domain="other", task_id=f"o{i}") for i in range(30, 40)
    ]
    source = renewal(tasks, share=0.5, prompts=20, sources=("go_on",))
    cells = {name: (task.domain, task.level) for name, task in source.tasks.items()}
    chooser = curriculum(cells, renewal=source, domain_turns="by_size")
    assert chooser.mix.sizes == {"sums": 30, "other": 10}
    chooser.learn(1, [outcome(f"n{i}", 16) for i in range(30)], [])
    assert chooser.mix.sizes == {"sums": 50, "other": 10}
    again = curriculum(cells, renewal=renewal(tasks, share=0.5, prompts=20, sources=("go_on",)), domain_turns="by_size")
    again.restore(chooser.state())
    assert again.mix.sizes == chooser.mix.sizes


def test_a_prompt_that_was_on_its_way_when_its_place_was_taken_does_not_come_back() -> None:
    chooser = of(renewal([number(i) for i in range(30)], share=0.25, prompts=10))
    chooser.learn(1, [outcome(f"n{i}", 16) for i in range(6)], [])
    first = [new.task.task_id for new in chooser.renewed]
    chooser.learn(2, [outcome(name, 16, 1) for name in first[:4]], [])
    for late in (0, 16):  # no longer right, and right again
        assert chooser.learn(3, [outcome(first[0], late, 1)], []) == []
        gone = np.array([chooser.entries.id_of[first[0]]])
        assert chooser.difficulty.given_up(gone).all() and chooser.difficulty.num_alive(gone) == 0


def test_a_source_earns_nothing_by_answers_that_were_begun_for_the_policy() -> None:
    chooser = of(renewal([number(i) for i in range(30)], share=0.5, prompts=2, sources=("go_on",)))
    chooser.learn(1, [outcome(f"n{i}", 16) for i in range(6)], [])
    made = chooser.renewed[0].task.task_id
    begun = outcome(made, 8, 1)
    begun = replace(begun, choice=replace(begun.choice, prefix=(5, 6)))
    chooser.learn(2, [outcome(made, 0, 1), begun], [])
    assert (chooser.renewal.groups["go_on"], chooser.renewal.with_signal["go_on"]) == (1, 0)


def test_generators_are_not_asked_for_levels_beyond_theirs() -> None:
    hard = replace(generate("maths", 10, 5, "train"), level=11, task_id="m")
    chooser = taught([generate("maths", 10, 6, "train"), hard], {"m": 8}, every=99)
    assert Frontier(chooser.difficulty, (0.25, 0.75), chooser.renewal.tasks).level("maths") in range(1, 11)


def test_no_prompt_on_the_held_out_side_is_ever_made() -> None:
    chooser = of(renewal([number(i) for i in range(40)], prompts=40, share=0.9))
    for version in range(1, 5):
        chooser.learn(version, [outcome(f"n{i}", 16, version - 1) for i in range(20)], [])
    assert len(chooser.renewal.made) > 50 and chooser.renewal.refused["held out"] > 0
    assert {split_of(new.task.prompt) for new in chooser.renewal.made.values()} == {"train"}
    prompts = [task.prompt for task in chooser.renewal.tasks.values()]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("passes, level", [({1: 16, 2: 9, 3: 0}, 2), ({1: 16, 2: 16, 3: 15}, 4), ({1: 1, 2: 0}, 1)])
def test_generators_are_asked_for_the_level_at_the_frontier(passes: dict[int, int], level: int) -> None:
    tasks = {at: generate("maths", at, 5, "train") for at in passes}
    chooser = taught(list(tasks.values()), {tasks[at].task_id: count for at, count in passes.items()}, every=99)
    frontier = Frontier(chooser.difficulty, (0.25, 0.75), chooser.renewal.tasks)
    task, parents = frontier.generated(random.Random(0))
    assert task is not None and (task.domain, task.level, parents) == ("maths", level, ())


def test_a_source_is_asked_more_often_the_more_its_prompts_teach() -> None:
    source = renewal([number(i) for i in range(400)], prompts=200, share=0.9, sources=("combine", "go_on"))
    chooser = of(source)
    chooser.learn(1, [outcome(f"n{i}", 16) for i in range(200)], [])
    signal = {"combine": 16, "go_on": 8}  # all right: nothing to learn; half: much
    chooser.learn(2, [outcome(new.task.task_id, signal[new.source], 1) for new in chooser.renewed[:80]], [])
    counts = [sum(new.source == name for new in chooser.renewed) for name in ("combine", "go_on")]
    assert counts[1] > 10 * counts[0]
    metrics = chooser.metrics()
    assert metrics["renewal/go_on_signal"] == 1.0 and metrics["renewal/combine_signal"] == 0.0


def test_a_resumed_curriculum_has_the_same_pool_and_makes_the_same_prompts() -> None:
    def begin() -> Curriculum:
        return of(renewal([number(i) for i in range(40)], prompts=6, share=0.6))

    def go_on(chooser: Curriculum, versions: range) -> list[Any]:
        told = []
        for version in versions:
            turns = chooser.plan(range(16 * version, 16 * version + 16))
            planned = [choice for choices in turns for choice in choices]
            rng = random.Random(version)
            seen = [outcome(choice.entry, rng.choice([0, 8, 16]), version - 1) for choice in planned]
            told.append((planned, chooser.learn(version, seen, planned), chooser.renewed))
        return told

    whole, first, second = begin(), begin(), begin()
    expected = go_on(whole, range(1, 9))
    go_on(first, range(1, 5))
    second.restore(first.state())
    assert go_on(second, range(5, 9)) == expected[4:]
    assert second.state() == whole.state() and any(new for _, _, new in expected[4:])
