import pytest

from rl.curriculum import Curriculum, Posterior


def curriculum(**changes):
    settings = dict(kind="thompson", band=(0.25, 0.75), decay=0.9, explore_share=0.0, seed=1) | changes
    cells = {f"{domain}/{level}": domain for domain in ("maths", "code") for level in range(1, 6)}
    return Curriculum(cells, **settings)


def test_posterior_fades_with_the_versions_that_pass():
    posterior = Posterior()
    posterior.observe(passes=6, total=8, version=0, decay=0.5)
    assert (posterior.alpha, posterior.beta) == (7.0, 3.0)
    posterior.observe(passes=0, total=4, version=2, decay=0.5)  # 6 → 6/4, 2 → 2/4
    assert (posterior.alpha, posterior.beta) == (2.5, 5.5)
    assert posterior.mean == pytest.approx(0.3125)


def test_a_late_observation_of_an_old_version_does_not_turn_time_back():
    posterior = Posterior()
    posterior.observe(1, 2, version=5, decay=0.5)
    posterior.observe(1, 2, version=3, decay=0.5)
    assert posterior.version == 5 and posterior.alpha == 3.0


def test_thompson_settles_on_the_cells_within_the_band():
    chosen = curriculum()
    rates = {1: 1.0, 2: 1.0, 3: 0.5, 4: 0.0, 5: 0.0}
    for _ in range(300):
        cell = chosen.choose()
        chosen.observe(cell, 16 * rates[int(cell[-1])], 16, version=0)
    counts = {level: chosen.sampled[f"maths/{level}"] for level in range(1, 6)}
    assert counts[3] > 0.7 * sum(counts.values())


def test_uniform_ignores_the_posteriors():
    chosen = curriculum(kind="uniform")
    for _ in range(1000):
        cell = chosen.choose()
        chosen.observe(cell, 16 if cell.endswith("1") else 0, 16, version=0)
    assert all(70 <= chosen.sampled[cell] <= 130 for cell in chosen.posteriors)


def test_domains_take_turns():
    chosen = curriculum()
    domains = [chosen.choose().split("/")[0] for _ in range(10)]
    assert domains == ["maths", "code"] * 5


def test_the_same_seed_chooses_the_same_cells():
    assert [curriculum().choose() for _ in range(3)] == [curriculum().choose() for _ in range(3)]
    first, second = curriculum(seed=1), curriculum(seed=2)
    assert [first.choose() for _ in range(30)] != [second.choose() for _ in range(30)]
