"""The base model's corpus: careful answers are there and not dominant, high levels are rare, nothing is held out."""

import itertools
from collections import Counter

from pipeline.corpus import LEVEL_WEIGHTS, careful_share, documents
from rewards.task import split_of

DOCUMENTS = list(itertools.islice(documents(3), 4000))


def test_careful_answers_are_a_minority_that_shrinks_with_the_level():
    openers = Counter(answer.split(":")[0] for _, answer in DOCUMENTS)
    assert set(openers) == {"Steps", "Roughly", "Answer"}
    assert 0.15 < openers["Steps"] / len(DOCUMENTS) < 0.35 and openers["Answer"] > len(DOCUMENTS) / 2
    assert careful_share(10) < careful_share(5) < careful_share(1) < 0.5


def test_the_highest_levels_are_rare():
    assert sum(LEVEL_WEIGHTS[8:]) / sum(LEVEL_WEIGHTS) < 0.05


def test_no_held_out_prompt_is_in_it():
    assert {split_of(prompt) for prompt, _ in DOCUMENTS} == {"train"}


def test_the_same_seed_gives_the_same_corpus():
    assert list(itertools.islice(documents(3), 5)) == DOCUMENTS[:5]
    assert list(itertools.islice(documents(4), 5)) != DOCUMENTS[:5]
