"""Limits and what follows from passing them, by hand."""

import math

import pytest

from rl.health import (
    DEAD_STEPS,
    DEFAULT_LIMITS,
    FEWEST_GROUPS,
    PATIENCE,
    HealthMonitor,
    Limit,
    dead,
    is_looping,
    without_signal,
)

FINE = {"truncated_share": 0.1, "signal_share": 0.5, "mask_share": 0.0, "grad_norm": 1.0, "weights_moved": True,
        "pass_rate": 0.4, "groups": 16}  # fmt: skip


def actions(monitor, *values, name="x"):
    return [[finding.action for finding in monitor.observe(FINE | {name: value})] for value in values]


def test_a_warning_is_given_once_for_each_time_that_a_number_goes_wrong():
    monitor = HealthMonitor({"x": Limit(warn=1.0, stop=5.0)})
    assert actions(monitor, 0.5, 2.0, 3.0, 0.5, 2.0) == [[], ["warn"], [], [], ["warn"]]


def test_a_stop_needs_patience_and_a_recovery_resets_it():
    monitor = HealthMonitor({"x": Limit(warn=1.0, stop=5.0)})
    assert actions(monitor, 9.0, 9.0, 0.0, 9.0, 9.0, 9.0)[-4:] == [[], ["warn"], ["warn"], ["stop"]]
    assert PATIENCE == 3


def test_what_fresh_weights_may_mend_is_first_given_them_once():
    monitor = HealthMonitor({"x": Limit(stop=5.0, resync=True)})
    assert actions(monitor, 9.0, 9.0, 9.0) == [["resync"], ["warn"], ["stop"]]
    assert "is given the weights again" in HealthMonitor(monitor.limits).observe(FINE | {"x": 9.0})[0].text


def test_lower_limits_and_numbers_that_are_none():
    monitor = HealthMonitor({"x": Limit(warn=0.3, stop=0.1, below=True)})
    assert actions(monitor, 0.5, 0.2, None, 0.05) == [[], ["warn"], [], ["warn"]]
    for value in (math.nan, math.inf):
        assert actions(HealthMonitor(monitor.limits), value) == [["stop"]]


def test_a_step_without_a_metric_is_not_judged_by_it():
    assert HealthMonitor(DEFAULT_LIMITS).observe(FINE) == []


def test_a_monitor_that_is_shown_the_steps_before_a_resume_judges_as_one_that_saw_them():
    """The first steps alone are asked whether anything is learnt at all; later ones may carry no signal."""
    dull = FINE | {"signal_share": 0.0, "pass_rate": 0.0}
    steps = [FINE] * 7 + [dull] * DEAD_STEPS
    whole, resumed = HealthMonitor(DEFAULT_LIMITS), HealthMonitor(DEFAULT_LIMITS)
    expected = [whole.observe(step) for step in steps]
    for step in steps[:7]:
        resumed.observe(step)
    assert [resumed.observe(step) for step in steps[7:]] == expected[7:]
    assert not any(finding.action == "stop" for findings in expected for finding in findings)


def test_steps_of_few_groups_are_judged_for_signal_together():
    """Slots that stay empty on purpose leave many a step without signal: no news, as long as others have it."""
    monitor = HealthMonitor({"signal_share": Limit(warn=0.1, below=True)})
    small = FINE | {"groups": 4}
    none, some = small | {"signal_share": 0.0}, small | {"signal_share": 0.5}
    assert [monitor.observe(step) for step in [none, none, some] * 10] == [[]] * 30, "one in six on average"
    # Judged are thirteen steps, 52 groups. Of the last of the thirty before, the 1st, 4th, 7th, … from the end had two
    # groups with signal: seven more without leave six of them, two such steps, four groups of 52.
    said = [len(monitor.observe(none)) for _ in range(20)]
    assert said == [0] * 6 + [1] + [0] * 13


def test_a_run_of_few_groups_is_given_enough_of_them_before_it_is_called_dead():
    monitor = HealthMonitor({})
    hopeless = FINE | {"groups": 4, "signal_share": 0.0, "pass_rate": 0.0}
    steps = math.ceil(FEWEST_GROUPS / 4)
    assert [monitor.observe(hopeless) for _ in range(steps - 1)] == [[]] * (steps - 1) and steps > DEAD_STEPS
    assert [finding.action for finding in monitor.observe(hopeless)] == ["stop"]
    patient = HealthMonitor({})
    once = [hopeless] * (steps - 1) + [FINE | {"groups": 4}]
    assert [patient.observe(step) for step in once] == [[]] * steps, "it came, late"


def test_an_answer_that_says_the_same_thing_again_and_again():
    assert is_looping([5, 6, 7, 7, 7, 7]) and is_looping([1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3])
    assert not is_looping([7, 7, 7]) and not is_looping([1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 4]) and not is_looping([])


@pytest.mark.parametrize(
    ("step", "told"),
    [
        ({"truncated_share": 1.0}, "raise max_answer_tokens"),
        ({"signal_share": 0.0, "pass_rate": 0.0}, "easier tasks"),
        ({"signal_share": 0.0, "pass_rate": 1.0}, "harder tasks"),
        ({"mask_share": 1.0}, "masks every token"),
        ({"grad_norm": 0.0}, "the gradient is zero"),
        ({"weights_moved": False}, "do not change"),
    ],
)
def test_a_run_that_cannot_learn_is_stopped_after_its_first_steps(step, told):
    monitor = HealthMonitor({})
    assert [monitor.observe(FINE | step) for _ in range(DEAD_STEPS - 1)] == [[]] * (DEAD_STEPS - 1)
    (finding,) = monitor.observe(FINE | step)
    assert finding.action == "stop" and told in finding.text
    assert monitor.observe(FINE | step) == [], "later steps may be like that"
    if "weights_moved" not in step:  # one such step among others proves nothing
        assert dead([FINE, FINE | step, FINE]) == without_signal([FINE, FINE | step, FINE]) == ""


def test_steps_without_signal_move_nothing_and_that_is_no_fault():
    empty = FINE | {"groups": 4, "signal_share": 0.0, "grad_norm": 0.0, "weights_moved": False}
    assert dead([empty] * DEAD_STEPS) == ""
    assert "the gradient is zero" in dead([empty] * 2 + [FINE | {"grad_norm": 0.0}] * 3)
