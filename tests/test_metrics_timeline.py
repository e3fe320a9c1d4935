"""The bounded time series: nothing lost, idle time empty, independent of how the run is cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfsim.metrics.timeline import Timeline

# (idle time before, duration, amount): zero durations and zero gaps included.
intervals = st.lists(
    st.tuples(st.sampled_from([0.0, 0.0, 0.3, 70.0]), st.sampled_from([0.0, 0.02, 0.5, 33.3]), st.floats(0, 1e6)),
    min_size=1,
    max_size=80,
)


def arrays(rows: list[tuple[float, float, float]], start: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    table = np.array(rows)
    ends = start + np.cumsum(table[:, 0] + table[:, 1])
    return ends - table[:, 1], ends, table[:, 2][None, :]


def filled(
    rows: list[tuple[float, float, float]], *, chunk: int = 10**9, bins: int = 400, start: float = 0.0
) -> Timeline:
    timeline = Timeline(("x",), bins=bins)
    begin, end, amounts = arrays(rows, start)
    for at in range(0, len(rows), chunk):
        timeline.add(begin[at : at + chunk], end[at : at + chunk], amounts[:, at : at + chunk])
    return timeline


@given(intervals, st.integers(1, 9), st.sampled_from([0.0, 5.0, 1.7e9]))
def test_amounts_are_conserved_and_bins_bounded(
    rows: list[tuple[float, float, float]], chunk: int, start: float
) -> None:
    timeline = filled(rows, chunk=chunk, bins=16, start=start)
    total = sum(row[2] for row in rows)
    assert timeline.totals()["x"] == pytest.approx(total, rel=1e-9, abs=1e-9)
    rates, horizon = timeline.rates()["x"], timeline.end_s - timeline.start_s
    assert rates.size <= 16
    assert np.all(rates >= 0)
    if horizon > 0:
        widths = np.full(rates.size, timeline.width_s)
        widths[-1] = horizon - (rates.size - 1) * timeline.width_s
        assert float((rates * widths).sum()) == pytest.approx(total, rel=1e-9, abs=1e-9)
        assert rates.size > 8 or timeline.width_s == 2.0**-20


@given(intervals, st.integers(1, 9))
def test_chunks_do_not_matter(rows: list[tuple[float, float, float]], chunk: int) -> None:
    whole, parts = filled(rows), filled(rows, chunk=chunk)
    assert parts.width_s == whole.width_s
    assert parts.rates()["x"] == pytest.approx(whole.rates()["x"], rel=1e-9, abs=1e-6)


def test_bins_hold_what_an_integral_by_hand_gives() -> None:
    # 8 s in 4 bins of 2 s: 10 over [0, 4), nothing over [4, 5), 6 over [5, 8).
    timeline = filled([(0.0, 4.0, 10.0), (1.0, 3.0, 6.0)], bins=4)
    assert timeline.width_s == 2.0
    assert timeline.rates()["x"].tolist() == pytest.approx([2.5, 2.5, 1.0, 2.0])


def test_the_last_bin_is_divided_by_what_the_run_covers_of_it() -> None:
    timeline = filled([(0.0, 5.0, 50.0)], bins=4)
    assert timeline.width_s == 2.0
    assert timeline.rates()["x"].tolist() == pytest.approx([10.0, 10.0, 10.0])


def test_idle_time_is_exactly_zero() -> None:
    rates = filled([(0.0, 1.0, 7.0), (2000.0, 1.0, 9.0)], chunk=1).rates()["x"]
    assert rates[0] > 0
    assert rates[-1] > 0
    assert not rates[1:-1].any()


def test_time_running_backwards_is_refused() -> None:
    timeline = filled([(0.0, 1.0, 1.0)])
    with pytest.raises(ValueError, match="overlap"):
        timeline.add(np.array([0.5]), np.array([1.5]), np.ones((1, 1)))
    with pytest.raises(ValueError, match="overlap"):
        timeline.add(np.array([2.0, 2.5]), np.array([3.0, 3.5]), np.ones((1, 2)))


def test_bins_must_pair() -> None:
    with pytest.raises(ValueError, match="even"):
        Timeline(("x",), bins=5)
