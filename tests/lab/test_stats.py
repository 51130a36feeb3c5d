import pytest
from scipy import stats as reference

from gradreg.lab.stats import BETTER, UNDECIDED, WORSE, Interval, mean_interval, one_row, paired_difference, verdict

VALUES, BASELINE = [0.91, 0.94, 0.90, 0.97, 0.93], [0.90, 0.92, 0.91, 0.94, 0.90]


def test_the_interval_is_that_of_the_t_test():
    interval = mean_interval(VALUES)
    expected = reference.ttest_1samp(VALUES, 0).confidence_interval(0.95)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
    assert interval.mean == pytest.approx(sum(VALUES) / 5)
    assert interval.half_width == pytest.approx(interval.high - interval.mean)


def test_the_difference_is_that_of_the_paired_t_test():
    difference = paired_difference(VALUES, BASELINE)
    expected = reference.ttest_rel(VALUES, BASELINE).confidence_interval(0.95)
    assert (difference.low, difference.high) == pytest.approx((expected.low, expected.high))


def test_equal_runs_have_an_empty_interval_and_no_verdict():
    assert paired_difference(VALUES, VALUES) == Interval(0, 0, 0)
    assert verdict(paired_difference(VALUES, VALUES)) == UNDECIDED


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0.1, 0.3, BETTER), (-0.3, -0.1, WORSE), (-0.1, 0.3, UNDECIDED), (0, 0.1, UNDECIDED)]
)
def test_verdict(low, high, expected):
    assert verdict(Interval((low + high) / 2, low, high)) == expected


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.11, 0.3, BETTER),
        (-0.3, -0.11, WORSE),
        (0.1, 0.3, UNDECIDED),
        (-0.3, -0.05, UNDECIDED),
        (-0.2, 0.2, UNDECIDED),
    ],
)
def test_a_verdict_needs_more_than_its_margin(low, high, expected):
    assert verdict(Interval((low + high) / 2, low, high), margin=0.1) == expected


def test_one_row_is_that_of_the_fewest_and_nothing_where_it_is_not_known():
    assert one_row([4, None, 2, float("nan")]) == 0.5
    assert one_row([None, 0]) == one_row([]) == 0.0


@pytest.mark.parametrize("call", [lambda: mean_interval([1.0]), lambda: paired_difference([1.0, 2.0], [1.0])])
def test_too_few_values_are_refused(call):
    with pytest.raises(ValueError, match="got"):
        call()
