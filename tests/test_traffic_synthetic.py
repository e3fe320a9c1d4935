"""Laws of drawn traffic: determinism, independence of chunk size and of other distributions, and the right moments."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from perfsim import traffic
from perfsim.errors import InputError
from perfsim.spec.workload import (
    Arrivals,
    ClosedLoop,
    ConstantArrivals,
    FixedLength,
    GammaArrivals,
    GeometricLength,
    Length,
    LognormalLength,
    PoissonArrivals,
    QuantisedArrivals,
    SharedPrefix,
    SyntheticWorkload,
    UniformLength,
)
from perfsim.traffic.chunk import RequestChunk
from perfsim.traffic.synthetic import draw_lengths, synthetic_chunks

COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens", "prefix_id", "prefix_tokens")

rates = st.floats(0.01, 1e4)
open_arrivals = st.one_of(
    rates.map(lambda rate: PoissonArrivals(rate=rate)),
    rates.map(lambda rate: ConstantArrivals(rate=rate)),
    st.builds(lambda rate, cv: GammaArrivals(rate=rate, cv=cv), rates, st.floats(0.05, 10)),
    st.builds(lambda rate, quantum: QuantisedArrivals(rate=rate, quantum=quantum), rates, st.floats(1e-3, 10)),
)
lengths = st.one_of(
    st.integers(1, 10_000).map(lambda tokens: FixedLength(tokens=tokens)),
    st.tuples(st.integers(1, 5000), st.integers(0, 5000)).map(lambda t: UniformLength(low=t[0], high=t[0] + t[1])),
    st.builds(lambda mean, sigma: LognormalLength(mean=mean, sigma=sigma), st.floats(1, 1e5), st.floats(0, 3)),
    st.floats(1, 1e4).map(lambda mean: GeometricLength(mean=mean)),
)
prefixes = st.one_of(
    st.none(),
    st.builds(
        lambda number, tokens, order: SharedPrefix(num_prefixes=number, tokens=tokens, order=order),
        st.integers(1, 300),
        st.integers(1, 3000),
        st.sampled_from(["rotation", "random"]),
    ),
)
workloads = st.builds(
    lambda count, arrivals, prompt, output, prefix: SyntheticWorkload(
        num_requests=count, arrivals=arrivals, prompt=prompt, output=output, shared_prefix=prefix
    ),
    st.integers(1, 3000),
    open_arrivals,
    lengths,
    lengths,
    prefixes,
)


def workload(
    count: int = 1000,
    *,
    arrivals: Arrivals = PoissonArrivals(rate=5),
    prompt: Length = LognormalLength(mean=999),
    output: Length = LognormalLength(mean=199),
    prefix: SharedPrefix | None = None,
) -> SyntheticWorkload:
    return SyntheticWorkload(num_requests=count, arrivals=arrivals, prompt=prompt, output=output, shared_prefix=prefix)


def joined(chunks: list[RequestChunk]) -> dict[str, bytes]:
    """Each column of a stream as bytes: equality of bytes is the strongest equality there is."""
    columns = {}
    for name in COLUMNS:
        parts = [getattr(chunk, name) for chunk in chunks]
        columns[name] = b"" if parts[0] is None else np.concatenate(parts).tobytes()
    return columns


@given(workloads, st.integers(0, 2**63 - 1), st.sampled_from([1000, 65_536]), st.integers(1, 700))
@settings(max_examples=60, deadline=None)
def test_same_seed_same_bytes_whatever_the_chunk_size(spec, seed, large, small):
    one = list(synthetic_chunks(spec, seed=seed, chunk_requests=large))
    other = list(synthetic_chunks(spec, seed=seed, chunk_requests=small))
    assert joined(one) == joined(other)
    assert sum(map(len, one)) == spec.num_requests
    assert max(map(len, one)) <= large


def test_chunks_of_1000_and_65536_agree_over_several_large_chunks():
    spec = workload(140_000, arrivals=GammaArrivals(rate=5, cv=3), prefix=SharedPrefix(num_prefixes=7, tokens=64))
    large = list(traffic.stream(spec, seed=3))
    assert [len(chunk) for chunk in large] == [65_536, 65_536, 140_000 - 2 * 65_536]
    assert joined(large) == joined(list(synthetic_chunks(spec, seed=3, chunk_requests=1000)))


@given(workloads, st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_every_request_is_legal_and_arrivals_are_in_order(spec, seed):
    chunks = list(synthetic_chunks(spec, seed=seed, chunk_requests=256))
    arrival = np.concatenate([chunk.arrival_s for chunk in chunks])
    assert arrival[0] >= 0
    assert (np.diff(arrival) >= 0).all()
    for chunk in chunks:
        assert chunk.prompt_tokens.min() >= 1
        assert chunk.output_tokens.min() >= 1
        if spec.shared_prefix is not None:
            assert (chunk.prompt_tokens >= chunk.prefix_tokens).all()
            assert chunk.prefix_id.min() >= 0
            assert chunk.prefix_id.max() < spec.shared_prefix.num_prefixes


def test_different_seeds_differ():
    one, other = (next(traffic.stream(workload(), seed=seed)) for seed in (0, 1))
    for name in COLUMNS[:3]:
        assert (getattr(one, name) != getattr(other, name)).any()


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        ({"arrivals": GammaArrivals(rate=1, cv=4)}, ("prompt_tokens", "output_tokens", "prefix_id")),
        ({"prompt": UniformLength(low=100, high=900)}, ("arrival_s", "output_tokens", "prefix_id")),
        ({"output": GeometricLength(mean=50)}, ("arrival_s", "prompt_tokens", "prefix_id")),
        ({"prefix": None}, ("arrival_s", "output_tokens")),
    ],
)
def test_changing_one_distribution_leaves_the_other_draws(changed, same):
    base = {"prefix": SharedPrefix(num_prefixes=50, tokens=10, order="random")}
    one = joined(list(traffic.stream(workload(**base), seed=9)))
    other = joined(list(traffic.stream(workload(**{**base, **changed}), seed=9)))
    for name in same:
        assert one[name] == other[name]
    assert one != other


@pytest.mark.parametrize(
    ("arrivals", "cv"),
    [
        (PoissonArrivals(rate=20), 1.0),
        (GammaArrivals(rate=20, cv=3), 3.0),
        (GammaArrivals(rate=20, cv=0.25), 0.25),
        (ConstantArrivals(rate=20), 0.0),
        (QuantisedArrivals(rate=20, quantum=1e-6), 1.0),
    ],
)
def test_arrival_rate_and_burstiness(arrivals, cv):
    count = 40_000
    chunk = next(traffic.stream(workload(count, arrivals=arrivals), seed=5))
    gaps = np.diff(chunk.arrival_s)
    # The mean of n gaps has standard error cv/sqrt(n); four of them.
    assert gaps.mean() * 20 == pytest.approx(1, abs=4 * cv / math.sqrt(count) + 1e-9)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.06, abs=1e-6)


def test_constant_arrivals_are_exact_multiples_from_zero():
    chunk = next(traffic.stream(workload(100, arrivals=ConstantArrivals(rate=7)), seed=0))
    assert chunk.arrival_s.tolist() == [i / 7 for i in range(100)]


@given(st.floats(1e-3, 100), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_quantised_arrivals_are_poisson_rounded_down(quantum, seed):
    exact = next(traffic.stream(workload(500, arrivals=PoissonArrivals(rate=5)), seed=seed)).arrival_s
    spec = workload(500, arrivals=QuantisedArrivals(rate=5, quantum=quantum))
    rounded = next(traffic.stream(spec, seed=seed)).arrival_s
    steps = np.rint(rounded / quantum)
    assert np.array_equal(rounded, steps * quantum)
    assert (rounded <= exact * (1 + 1e-12)).all()
    assert (exact - rounded < quantum * (1 + 1e-9)).all()


@pytest.mark.parametrize(
    ("length", "mean", "deviation"),
    [
        (FixedLength(tokens=123), 123.0, 0.0),
        (UniformLength(low=10, high=30), 20.0, math.sqrt((21**2 - 1) / 12)),
        (LognormalLength(mean=999, sigma=1), 999.0, 999 * math.sqrt(math.e - 1)),
        (GeometricLength(mean=200), 200.0, math.sqrt(200 * 199)),
        (GeometricLength(mean=1), 1.0, 0.0),
        (LognormalLength(mean=500, sigma=0), 500.0, 0.0),
    ],
)
def test_mean_lengths(length, mean, deviation):
    count = 50_000
    drawn = draw_lengths(length, count=count, rng=np.random.default_rng(1))
    assert drawn.dtype == np.int64
    assert drawn.mean() == pytest.approx(mean, abs=4 * deviation / math.sqrt(count) + 1e-9)


def test_uniform_includes_both_ends_and_lognormal_respects_its_bounds():
    rng = np.random.default_rng(2)
    uniform = draw_lengths(UniformLength(low=3, high=6), count=2000, rng=rng)
    assert sorted(set(uniform.tolist())) == [3, 4, 5, 6]
    clipped = draw_lengths(LognormalLength(mean=5, sigma=3, max=40), count=5000, rng=rng)
    assert clipped.min() == 1
    assert clipped.max() == 40


def test_shared_prefixes_rotate_or_are_drawn():
    rotation = SharedPrefix(num_prefixes=3, tokens=100)
    chunks = list(synthetic_chunks(workload(8, prefix=rotation), seed=0, chunk_requests=5))
    assert np.concatenate([chunk.prefix_id for chunk in chunks]).tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert (chunks[0].prefix_tokens == 100).all()
    random = SharedPrefix(num_prefixes=3, tokens=100, order="random")
    counts = np.bincount(next(traffic.stream(workload(9000, prefix=random), seed=0)).prefix_id)
    assert counts == pytest.approx(3000, abs=4 * math.sqrt(9000 * 2 / 9))


def test_closed_loop_has_no_times_but_clients():
    spec = workload(500, arrivals=ClosedLoop(concurrency=8, think_time=0.5))
    source = traffic.closed_loop_source(spec, seed=4)
    assert (source.concurrency, source.think_time_s) == (8, 0.5)
    chunk = next(source.chunks)
    assert len(chunk) == 500
    assert not chunk.arrival_s.any()
    # The lengths are those of the open loop with the same seed.
    assert np.array_equal(chunk.prompt_tokens, next(traffic.stream(workload(500), seed=4)).prompt_tokens)


def test_open_and_closed_loop_are_not_confused():
    with pytest.raises(ValueError, match="closed_loop_source"):
        traffic.stream(workload(arrivals=ClosedLoop(concurrency=1)), seed=0)
    with pytest.raises(ValueError, match="use stream"):
        traffic.closed_loop_source(workload(), seed=0)


@pytest.mark.parametrize(
    "arrivals",
    [
        PoissonArrivals(rate=1e-300),
        PoissonArrivals(rate=5e-324),
        ConstantArrivals(rate=1e-320),
        GammaArrivals(rate=1e-200, cv=100),
        QuantisedArrivals(rate=1e-12, quantum=1),
    ],
)
def test_a_rate_near_zero_is_reported(arrivals):
    with pytest.raises(InputError, match=r"workload\.arrivals\.rate = .*request \d+ would arrive after 1e\+09 s"):
        list(traffic.stream(workload(arrivals=arrivals), seed=0))


@pytest.mark.parametrize("bad", [{"kind": "gamma", "rate": 1, "cv": 0}, {"kind": "quantised", "rate": 1, "quantum": 0}])
def test_degenerate_processes_are_rejected_by_the_spec(bad):
    with pytest.raises(ValidationError, match="greater than or equal"):
        SyntheticWorkload.model_validate(
            {"num_requests": 1, "arrivals": bad, "prompt": FixedLength(tokens=1), "output": FixedLength(tokens=1)}
        )
