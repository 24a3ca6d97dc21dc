"""Each sampler by what it is told, and what all of them must keep to."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.samplers import Candidates, Pools, Thompson, Uniform

BAND = (0.25, 0.75)
SAMPLERS = [Uniform, lambda: Pools(BAND), lambda: Thompson(BAND)]


def candidates(rates, evidence=1000.0, endless=False, tried=1):
    """Entries whose pass rates are known as well as `evidence` answers tell."""
    rates = np.asarray(rates, float)
    return Candidates(
        ids=np.arange(len(rates)), alpha=1 + evidence * rates, beta=1 + evidence * (1 - rates),
        tried=np.full(len(rates), tried), endless=endless,
    )  # fmt: skip


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("sampler", SAMPLERS)
@settings(max_examples=30)
@given(rows=st.integers(1, 40), count=st.integers(0, 60), endless=st.booleans(), seed=st.integers(0, 99))
def test_as_many_rows_as_wanted_and_no_prompt_twice_while_there_are_others(sampler, rows, count, endless, seed):
    given_ = candidates(rng(seed).random(rows), evidence=5.0, endless=endless)
    chosen = sampler().choose(given_, count, rng(seed))
    assert len(chosen) == count and set(chosen) <= set(range(rows))
    if not endless:
        often = np.bincount(chosen, minlength=rows)
        assert often.max(initial=0) - often.min() <= 1, "one was drawn again before all were drawn"
    again = sampler().choose(given_, count, rng(seed))
    assert np.array_equal(chosen, again), "the same numbers choose the same"


def test_uniform_takes_all_alike():
    for endless in (False, True):
        chosen = [
            i for seed in range(2000) for i in Uniform().choose(candidates([0, 0.5, 1], endless=endless), 1, rng(seed))
        ]
        assert np.bincount(chosen).min() > 590


def test_thompson_takes_what_lies_inside_the_band_then_what_is_nearest():
    sampler = Thompson(BAND)
    rates = [0.0, 0.1, 0.3, 0.5, 0.7, 0.85, 1.0]
    chosen = sampler.choose(candidates(rates, evidence=1e9), 5, rng())
    assert set(chosen[:3]) == {2, 3, 4} and list(chosen[3:]) == [5, 1]
    assert sampler.metrics() == {"inside_share": 3 / 5}
    firsts = {sampler.choose(candidates(rates, evidence=1e9), 1, rng(seed))[0] for seed in range(50)}
    assert firsts == {2, 3, 4}, "inside the band none is preferred"


def test_thompson_tries_what_it_does_not_know():
    """What three answers say leaves room for a rate inside the band; what a thousand say does not."""
    unknown = candidates([0.9] * 2, evidence=3.0)
    unknown.alpha[1], unknown.beta[1] = 900.0, 100.0
    chosen = [Thompson(BAND).choose(unknown, 1, rng(seed))[0] for seed in range(300)]
    assert chosen.count(0) > 200  # one draw of Beta(3.7, 1.3) is below 0.9 in three of four


def test_thompson_draws_endless_entries_anew_for_every_place():
    chosen = Thompson(BAND).choose(candidates([0.5, 0.99], evidence=1e6, endless=True), 6, rng())
    assert list(chosen) == [0] * 6


def test_pools_draw_by_their_weights():
    rates = [0.1] * 10 + [0.5] * 10 + [0.9] * 10
    sampler = Pools(BAND)
    for seed in range(4000):
        sampler.choose(candidates(rates, endless=True), 1, rng(seed))
    shares = sampler.metrics()
    assert shares["inside_share"] == pytest.approx(1 / 1.4, abs=0.03)
    assert shares["hard_share"] == pytest.approx(0.2 / 1.4, abs=0.03)
    first = [Pools(BAND).choose(candidates(rates), 1, rng(seed))[0] // 10 for seed in range(4000)]
    assert np.bincount(first)[1] / 4000 == pytest.approx(1 / 1.4, abs=0.03)


def test_pools_count_what_was_never_tried_as_inside():
    untried = candidates([0.5, 0.9], tried=0)
    sampler = Pools(BAND)
    sampler.choose(untried, 2, rng())
    assert sampler.metrics()["inside_share"] == 1.0
    edges = candidates([0.25, 0.75], evidence=1e12)  # both ends belong to the band
    low, high = edges.alpha / (edges.alpha + edges.beta)
    sampler = Pools((low, high))
    sampler.choose(edges, 2, rng())
    assert sampler.metrics()["inside_share"] == 1.0


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_that_was_written_down_goes_on(sampler):
    one, other = sampler(), sampler()
    one.choose(candidates(rng(3).random(30), evidence=4.0), 9, rng())
    other.restore(json.loads(json.dumps(one.state())))
    assert other.metrics() == one.metrics() and other.state() == one.state()
