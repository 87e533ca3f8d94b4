"""Share absorbed, lines and correlations on known answers."""

import math

import numpy as np
import pytest

from copd_megatron.pilot.statistics import fisher, fit, fit_rows, share_absorbed, without_one

NAN = math.nan


def test_line_and_correlation_of_a_textbook_example():
    # Anscombe 1973, the first of his four sets.
    x = [10, 8, 13, 9, 11, 14, 6, 4, 12, 7, 5]
    y = [8.04, 6.95, 7.58, 8.81, 8.33, 9.96, 7.24, 4.26, 10.84, 4.82, 5.68]
    line = fit(x, y)
    assert (line.slope, line.intercept) == (pytest.approx(0.5001, abs=1e-4), pytest.approx(3.0001, abs=1e-4))
    assert (line.r, line.r2, line.n) == (pytest.approx(0.81642, abs=1e-5), pytest.approx(0.66654, abs=1e-5), 11)


@pytest.mark.parametrize("slope", [2.0, -0.25])
def test_points_on_a_line_have_a_correlation_of_one(slope):
    x = [0.1, 0.2, 0.7]
    line = fit(x, [1 + slope * value for value in x])
    assert line.slope == pytest.approx(slope)
    assert line.intercept == pytest.approx(1)
    assert line.r == pytest.approx(math.copysign(1, slope))
    assert abs(line.r) <= 1


def test_points_with_a_missing_side_are_left_out():
    whole = fit([1, 2, 3, 4], [1, 3, 2, 5])
    assert fit([1, 2, NAN, 3, 4, 9], [1, 3, 7, 2, 5, NAN]) == whole
    assert whole.n == 4


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([0.1, 0.1, 0.1], [1, 2, 4]),  # whose mean rounding puts beside 0.1
        ([1, 2, 3, 4], [0.3, 0.3, 0.3, 0.3]),
        ([1, 2], [1, 2]),
        ([1, 2, NAN], [1, 2, 3]),
        ([NAN, NAN, NAN], [1, 2, 3]),
        ([], []),
    ],
    ids=["constant predictor", "constant gain", "two points", "two left", "nothing", "none"],
)
def test_no_line_where_there_is_none(x, y):
    assert fit(x, y) is None


def test_rows_are_fitted_one_by_one():
    x = np.array([[1.0, 2, 3, NAN], [1, 1, 1, 1], [1, 2, 3, 4]])
    y = np.array([[2.0, 4, 6, 1], [1, 2, 3, 4], [4, 3, 2, 1]])
    slope, intercept, r = fit_rows(x, y)
    assert slope == pytest.approx([2, NAN, -1], nan_ok=True)
    assert intercept == pytest.approx([0, NAN, 5], nan_ok=True, abs=1e-12)
    assert r == pytest.approx([1, NAN, -1], nan_ok=True)


def test_correlation_that_rests_on_one_point_is_seen():
    x, y = [0, 1, 2, 3, 100], [1, -1, -1, 1, 50]
    assert fit(x, y).r > 0.99
    low, high = without_one(x, y)
    assert low == pytest.approx(0)
    assert high > 0.99
    assert without_one([*x, NAN], [*y, 3]) == (low, high)
    assert without_one([1, 2, 3], [1, 2, 3]) is None
    assert without_one([], []) is None


def test_fishers_interval():
    # r = 0.5 of 28 pairs: artanh 0.5 = 0.5493, z / √25 = 0.3920.
    assert fisher(0.5, 28) == (pytest.approx(0.1560, abs=1e-4), pytest.approx(0.7358, abs=1e-4))
    assert fisher(-0.5, 28) == tuple(-bound for bound in reversed(fisher(0.5, 28)))
    assert fisher(0.9, 3) is None
    assert fisher(1.0, 10) is None


def test_fishers_interval_holds_its_level():
    draw = np.random.default_rng(0)
    rho, n, held = 0.7, 6, 0
    for _ in range(400):
        x = draw.normal(size=n)
        y = rho * x + math.sqrt(1 - rho**2) * draw.normal(size=n)
        low, high = fisher(fit(x, y).r, n)
        held += low <= rho <= high
    assert 0.92 <= held / 400 <= 0.98


def test_share_absorbed():
    before, after, teacher = np.array([0.4, 0.4, 0.4, 0.6]), np.array([0.4, 0.5, 0.3, 0.7]), np.full(4, 0.6)
    assert share_absorbed(before, after, teacher, 0.02) == pytest.approx([0, 0.5, -0.5, NAN], nan_ok=True)
    assert math.isnan(share_absorbed(np.array(0.585), np.array(0.6), np.array(0.6), 0.02))
    assert share_absorbed(np.array(0.585), np.array(0.6), np.array(0.6), 0.01) == pytest.approx(1)
