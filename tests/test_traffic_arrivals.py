"""Laws of arrival processes whose rate varies: mean rates, variability, and independence of how they are asked."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from perfsim.errors import InputError
from perfsim.spec.arrivals import BurstyArrivals, CurveArrivals, DiurnalArrivals, PoissonArrivals
from perfsim.traffic.arrivals import ArrivalClock, mean_rate, peak_rate

rates = st.floats(0.1, 100)
diurnal = st.builds(
    lambda rate, amplitude, period, phase: DiurnalArrivals(rate=rate, amplitude=amplitude, period=period, phase=phase),
    rates, st.floats(0, 1), st.floats(0.5, 1e4), st.floats(0, 1e4),
)  # fmt: skip
bursty = st.builds(
    lambda base, burst, calm, storm: BurstyArrivals(
        base_rate=base, burst_rate=burst, base_duration=calm, burst_duration=storm
    ),
    st.sampled_from([0.0, 0.5, 3.0]), rates, st.floats(0.1, 100), st.floats(0.1, 10),
)  # fmt: skip


@st.composite
def curves(draw):
    count = draw(st.integers(1, 6))
    gaps = draw(st.lists(st.floats(0.1, 50), min_size=count, max_size=count))
    heights = draw(st.lists(st.sampled_from([0.0, 0.5, 2.0, 30.0]), min_size=count, max_size=count))
    period = draw(st.sampled_from([None, 7.0]))
    heights[-1] = heights[-1] or 1.0
    times = np.concatenate(([0.0], np.cumsum(gaps)[:-1]))
    return CurveArrivals(
        points=tuple(zip(times.tolist(), heights, strict=True)), shape=draw(st.sampled_from(["step", "linear"])),
        period=None if period is None else float(times[-1]) + period,
    )  # fmt: skip


processes = st.one_of(diurnal, bursty, curves())


def rng(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def arrivals(process, count: int, *, seed: int = 1) -> np.ndarray:
    return ArrivalClock(process, rng=rng(seed)).take(count)


@settings(max_examples=80, deadline=None)
@given(processes, st.integers(0, 1000), st.lists(st.integers(0, 200), max_size=8))
def test_arrivals_do_not_depend_on_how_many_are_taken_at_a_time(process, seed, parts):
    clock = ArrivalClock(process, rng=rng(seed))
    times = np.concatenate([clock.take(n) for n in [*parts, 100]])
    whole = arrivals(process, sum(parts) + 100, seed=seed)
    assert times.tobytes() == whole.tobytes()
    assert (np.diff(times) >= 0).all()
    assert times[0] > 0


@settings(max_examples=60, deadline=None)
@given(st.one_of(diurnal, curves()), st.integers(0, 1000))
def test_the_integral_of_the_rate_up_to_each_arrival_is_the_sum_of_unit_gaps(process, seed):
    times = arrivals(process, 300, seed=seed)
    sums = np.cumsum(rng(seed).standard_exponential(300))
    integral = np.array([_integral(process, t) for t in times])
    np.testing.assert_allclose(integral, sums, rtol=1e-6, atol=1e-6)


def _integral(process, until: float) -> float:
    """The cumulated rate, from the definition: a Riemann sum with midpoints for curves, calculus for the sine."""
    if isinstance(process, DiurnalArrivals):
        turn = 2 * math.pi / process.period
        swing = math.cos(turn * process.phase) - math.cos(turn * (until + process.phase))
        return process.rate * (until + process.amplitude / turn * swing)
    total = 0.0
    if process.period is not None:
        whole = math.floor(until / process.period)
        total, until = whole * _one_pass(process, process.period), until - whole * process.period
    return total + _one_pass(process, until)


def _one_pass(process, until: float) -> float:
    times = [time for time, _ in process.points]
    heights = [rate for _, rate in process.points]
    after = heights[0] if process.period is not None else heights[-1]
    ends, following = [*times[1:], process.period or math.inf], [*heights[1:], after]
    total = 0.0
    for start, end, low, high in zip(times, ends, heights, following, strict=True):
        length = min(until, end) - start
        if length <= 0:
            break
        slope = (high - low) / (end - start) if process.shape == "linear" and math.isfinite(end) else 0.0
        total += length * (low + slope * length / 2)
    return total


# Over N arrivals of a process with index of dispersion I the measured rate errs by rate * sqrt(I / N) (one standard
# deviation, central limit theorem): four of them, 99.99%.
@pytest.mark.parametrize(
    ("process", "rate", "dispersion"),
    [
        (DiurnalArrivals(rate=20, amplitude=0.8, period=50), 20, 1.0),
        (CurveArrivals(points=((0, 5), (10, 40), (15, 0)), period=20), 12.5, 1.0),
        (CurveArrivals(points=((0, 5), (10, 45)), shape="linear", period=20), 25, 1.0),
        (BurstyArrivals(base_rate=5, burst_rate=80, base_duration=8, burst_duration=2), 20, 185.96),
    ],
    ids=lambda value: getattr(value, "kind", None),
)
def test_the_mean_rate_is_the_long_run_average(process, rate, dispersion):
    assert mean_rate(process) == pytest.approx(rate)
    count = 400_000
    measured = count / arrivals(process, count)[-1]
    assert measured == pytest.approx(rate, rel=4 * math.sqrt(dispersion / count) + 1e-3)


def test_a_diurnal_rate_peaks_where_the_phase_says():
    period = 100.0
    process = DiurnalArrivals(rate=50, amplitude=0.9, period=period, phase=period / 4)  # starts at the peak
    times = arrivals(process, 500_000) % period
    counts, _ = np.histogram(times, bins=20, range=(0, period))
    middles = (np.arange(20) + 0.5) * period / 20
    expected = 500_000 / 20 * (1 + 0.9 * np.cos(2 * np.pi * middles / period) * np.sinc(1 / 20))
    assert (
        np.abs((counts - expected) / np.sqrt(expected)).max() < 4.5
    )  # 20 bins, 5 standard deviations: never by chance


@pytest.mark.parametrize("window", [0.5, 5.0, 50.0])
def test_bursty_counts_have_the_dispersion_of_the_two_state_mmpp(window):
    """Index of dispersion for counts of MMPP(2), started in equilibrium:

    I(t) = 1 + 2 (a - b)^2 p q / ((p + q)^2 (a q + b p)) * (1 - (1 - e^-(p+q)t) / ((p + q) t))

    with rates a, b and transition rates p (out of a), q (out of b). Source: Heffes and Lucantoni, IEEE JSAC 4(6), 1986;
    it follows from Var N = E L + Var L with the covariance pi_a pi_b (a - b)^2 e^-(p+q)s of the rate.
    """
    process = BurstyArrivals(base_rate=5, burst_rate=80, base_duration=8, burst_duration=2)
    a, b, p, q = 5.0, 80.0, 1 / 8, 1 / 2
    s = (p + q) * window
    expected = 1 + 2 * (a - b) ** 2 * p * q / ((p + q) ** 2 * (a * q + b * p)) * (1 - (1 - math.exp(-s)) / s)
    times = arrivals(process, 2_000_000, seed=5)
    counts = np.bincount((times / window).astype(np.int64))[:-1]
    # Windows within a cycle of 10 s are correlated: batches of 1,000 s are not, and give the standard error.
    batches = counts[: len(counts) // 40 * 40].reshape(40, -1)
    indices = ((batches - counts.mean()) ** 2).mean(axis=1) / counts.mean()
    error = indices.std(ddof=1) / math.sqrt(40)
    assert indices.mean() == pytest.approx(expected, abs=4 * error)
    assert error < 0.1 * expected


def test_the_burst_state_starts_with_its_share():
    process = BurstyArrivals(base_rate=0, burst_rate=1e4, base_duration=30, burst_duration=10)
    first = np.array([arrivals(process, 1, seed=seed)[0] for seed in range(2000)])
    share = (first < 0.01).mean()  # in a burst the first request comes within 0.1 ms
    assert share == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 2000))


def test_a_rate_of_zero_has_no_arrivals():
    process = CurveArrivals(points=((0, 10), (5, 0), (15, 10)), period=20)
    times = arrivals(process, 20_000) % 20
    assert not ((times > 5) & (times < 15)).any()


def test_peak_rates():
    assert peak_rate(DiurnalArrivals(rate=10, amplitude=0.5)) == 15
    assert peak_rate(BurstyArrivals(base_rate=1, burst_rate=9, base_duration=1, burst_duration=1)) == 9
    assert peak_rate(CurveArrivals(points=((0, 3), (1, 7), (2, 1)))) == 7
    assert peak_rate(PoissonArrivals(rate=3)) is None


def test_arrivals_beyond_the_end_of_time_are_refused():
    with pytest.raises(InputError, match="would arrive after"):
        arrivals(DiurnalArrivals(rate=1e-7, amplitude=0.5), 1000)
    with pytest.raises(InputError, match="would arrive after"):
        arrivals(CurveArrivals(points=((0, 1e-7),)), 1000)


@pytest.mark.parametrize(
    ("points", "period", "message"),
    [
        (((1, 2),), None, "first point must be at 0"),
        (((0, 2), (5, 1), (5, 3)), None, "must increase"),
        (((0, 2), (5, 0)), None, "must not be 0"),
        (((0, 0), (5, 0)), 10, "above 0"),
        (((0, 2), (5, 1)), 5, "longer than the last point"),
    ],
)
def test_bad_curves_are_refused(points, period, message):
    with pytest.raises(ValidationError, match=message):
        CurveArrivals(points=points, period=period)


def test_bursts_that_pass_unseen_are_refused():
    with pytest.raises(ValidationError, match="requests per base and burst period"):
        BurstyArrivals(base_rate=0, burst_rate=1e-3, base_duration=1e-3, burst_duration=1e-3)
