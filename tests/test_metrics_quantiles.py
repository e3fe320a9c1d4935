"""Percentiles of weighted multisets: equal to NumPy's while exact, within 0.05% once binned."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfsim.metrics import steps
from perfsim.metrics.quantiles import Distribution

PROBABILITIES = np.array([0.0, 0.01, 0.5, 0.9, 0.95, 0.99, 1.0])
durations = st.floats(min_value=1e-7, max_value=1e6)
pairs = st.lists(st.tuples(durations, st.integers(1, 50)), min_size=1, max_size=60)
segments = st.lists(
    st.tuples(st.integers(1, 30), st.floats(1e-4, 1.0), st.sampled_from([0.0, 1e-6, 1e-3]), st.integers(0, 9)),
    min_size=1,
    max_size=20,
)


def filled(rows: list[tuple[float, int]], *, limit: int, chunk: int = 10**9) -> Distribution:
    values, weights = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    distribution = Distribution(limit=limit)
    for at in range(0, len(rows), chunk):
        distribution.add(values[at : at + chunk], weights[at : at + chunk])
    return distribution


def segment_columns(rows: list[tuple[int, float, float, int]]) -> dict[str, np.ndarray]:
    names = ("steps", "first_s", "slope_s", "gap_sequences")
    return dict(zip(names, np.array(rows, dtype=np.float64).T, strict=True))


def expanded(rows: list[tuple[int, float, float, int]]) -> np.ndarray:
    gaps = [first + index * slope for count, first, slope, seen in rows for index in range(count) for _ in range(seen)]
    return np.array(gaps)


@given(pairs, st.integers(1, 20))
def test_weighted_percentiles_equal_numpy_on_the_multiset_written_out(
    rows: list[tuple[float, int]], chunk: int
) -> None:
    distribution = filled(rows, limit=1000, chunk=chunk)
    samples = np.repeat([row[0] for row in rows], [row[1] for row in rows])
    assert not distribution.binned
    assert distribution.count == samples.size
    assert distribution.quantiles(PROBABILITIES).tolist() == np.percentile(samples, 100 * PROBABILITIES).tolist()
    assert distribution.summary()["mean"] == pytest.approx(samples.mean(), rel=1e-12)


@given(st.lists(durations, min_size=1, max_size=200))
def test_unweighted_percentiles_equal_numpy(values: list[float]) -> None:
    distribution = Distribution(limit=1000)
    distribution.add(np.array(values))
    summary = distribution.summary()
    for stat, percent in (("p50", 50), ("p90", 90), ("p95", 95), ("p99", 99)):
        assert summary[stat] == np.percentile(values, percent)
    assert summary["max"] == max(values)


@given(pairs)
def test_bins_err_by_at_most_their_half_width(rows: list[tuple[float, int]]) -> None:
    exact, binned = filled(rows, limit=1000), filled(rows, limit=0)
    assert binned.binned
    assert binned.quantiles(PROBABILITIES) == pytest.approx(exact.quantiles(PROBABILITIES), rel=5.001e-4)
    assert binned.summary()["mean"] == pytest.approx(exact.summary()["mean"], rel=1e-12)


def test_the_bound_on_the_error_is_nearly_reached() -> None:
    """If it were not, the bins would be finer than documented and the test above would prove little."""
    values = np.geomspace(1e-3, 1e3, 20_001)
    binned = Distribution(limit=0)
    binned.add(values)
    errors = np.abs(binned.quantiles(np.linspace(0, 1, values.size)) / values - 1)
    assert 4e-4 < errors.max() <= 5.001e-4


def test_values_outside_the_bins_stay_within_what_was_seen() -> None:
    values = np.array([0.0, 0.0, 1e-12, 1.0, 3e9, 4e9])
    binned = Distribution(limit=0)
    binned.add(values)
    found = binned.quantiles(np.linspace(0, 1, 6))
    assert found[0] == 0.0
    assert found[3] == pytest.approx(1.0, rel=5.001e-4)
    assert found[-1] == 4e9
    assert np.all(np.diff(found) >= 0)


def test_repeated_values_stay_exact_beyond_the_limit() -> None:
    distribution = Distribution(limit=100)
    for _ in range(20):
        distribution.add(np.tile([0.25, 0.5, 1.0], 30))
    assert not distribution.binned
    assert distribution.quantiles(np.array([0.0, 0.5, 1.0])).tolist() == [0.25, 0.5, 1.0]


def test_distinct_values_go_to_bins_beyond_the_limit() -> None:
    distribution = Distribution(limit=100)
    distribution.add(np.linspace(1.0, 2.0, 100))
    assert not distribution.binned
    distribution.add(np.linspace(2.0, 3.0, 100))
    assert distribution.binned
    assert distribution.count == 200


def test_nothing_has_no_percentiles() -> None:
    assert set(Distribution(limit=1).summary().values()) == {None}
    with pytest.raises(ValueError, match="no values"):
        Distribution(limit=1).quantiles(PROBABILITIES)


@given(segments)
def test_gaps_of_segments_equal_numpy_on_every_step_written_out(rows: list[tuple[int, float, float, int]]) -> None:
    gaps, samples = Distribution(limit=10_000), expanded(rows)
    steps.add_gaps(gaps, segment_columns(rows))
    assert gaps.count == samples.size
    if samples.size:
        assert gaps.quantiles(PROBABILITIES).tolist() == np.percentile(samples, 100 * PROBABILITIES).tolist()


@settings(deadline=None)
@given(segments)
def test_binned_gaps_are_within_the_bound(rows: list[tuple[int, float, float, int]]) -> None:
    gaps, samples = Distribution(limit=0), expanded(rows)
    gaps.add(np.array([0.5]))  # so that it counts in bins before the first segment
    steps.add_gaps(gaps, segment_columns(rows))
    expected = np.percentile([*samples, 0.5], 100 * PROBABILITIES)
    assert gaps.quantiles(PROBABILITIES) == pytest.approx(expected, rel=5.001e-4)
    assert gaps.count == samples.size + 1
    assert gaps.summary()["mean"] == pytest.approx(np.mean([*samples, 0.5]), rel=1e-12)


def test_a_long_segment_is_written_out_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "_BLOCK", 7)
    rows = [(5, 0.1, 1e-3, 2), (40, 0.2, 1e-3, 3), (2, 0.3, 1e-3, 1), (1, 0.4, 0.0, 1)]
    gaps, samples = Distribution(limit=1000), expanded(rows)
    steps.add_gaps(gaps, segment_columns(rows))
    every = np.linspace(0, 1, 50)
    assert gaps.count == samples.size
    assert gaps.quantiles(every).tolist() == np.quantile(samples, every).tolist()
