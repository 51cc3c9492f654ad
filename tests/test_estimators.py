"""Medians, percentiles and batch classes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from slosched.core.scheduler.estimators import ExecTable, WindowEstimator


def test_the_profile_speaks_until_samples_push_it_out() -> None:
    estimator = WindowEstimator(100, window=10, seed_weight=4)
    assert (estimator.expected_ns, estimator.margin_ns) == (100, 100)
    estimator.add(50)
    assert estimator.expected_ns == 100, "one sample does not wipe the profile out"
    for _ in range(5):
        estimator.add(50)
    assert estimator.expected_ns == 50
    for _ in range(4):
        estimator.add(50)
    assert estimator.margin_ns == 50, "the seeds have left the window"


def test_one_outlier_moves_neither_answer_much() -> None:
    estimator = WindowEstimator(100, window=100)
    for _ in range(99):
        estimator.add(100)
    estimator.add(10_000)
    assert (estimator.expected_ns, estimator.margin_ns) == (100, 100)


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=300))
def test_order_statistics_of_the_window(samples: list[int]) -> None:
    estimator = WindowEstimator(7, window=32, percentile=0.9, seed_weight=2)
    for sample in samples:
        estimator.add(sample)
    window = sorted(([7, 7, *samples])[-32:])
    assert estimator.expected_ns == window[len(window) // 2]
    assert estimator.margin_ns == window[min(len(window) - 1, int(0.9 * len(window)))]
    assert estimator.margin_ns >= estimator.expected_ns


def test_a_table_finds_the_class_that_holds_a_count() -> None:
    table = ExecTable({4: 50, 1: 10, 2: 20})
    assert [table.class_for(n) for n in (1, 2, 3, 4, 9)] == [1, 2, 4, 4, 4]
    table.add(2, 30)
    assert table.single.expected_ns == 10
