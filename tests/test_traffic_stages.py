"""A load test in stages: exponential gaps that fill each stage, and a pause for the answers between them."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest

from perfsim.errors import InputError
from perfsim.run import simulate
from perfsim.spec.arrivals import StagedArrivals
from perfsim.spec.load import Draft
from perfsim.traffic.arrivals import ArrivalClock, mean_rate, peak_rate

PROCESS = StagedArrivals(stages=((5.0, 40.0), (20.0, 10.5)), pause=2.5)


def times(process: StagedArrivals, sizes: list[int], seed: int = 3) -> np.ndarray:
    clock = ArrivalClock(process, rng=np.random.default_rng(seed))
    return np.concatenate([clock.take(size) for size in sizes])


def test_every_stage_is_filled_exactly():
    found = times(PROCESS, [410])
    assert PROCESS.counts == (200, 210)
    assert found[199] == pytest.approx(40.0)
    assert found[200] > 40.0
    assert found[409] == pytest.approx(50.5)
    assert (np.diff(found) >= 0).all()


def test_gaps_are_exponential_and_independent_of_the_chunks():
    process = StagedArrivals(stages=((10.0, 2000.0),))
    gaps = np.diff(times(process, [20_000]))
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, abs=0.03)
    assert (times(PROCESS, [410]) == times(PROCESS, [1, 7, 192, 0, 210])).all()


def test_rates():
    assert mean_rate(PROCESS) == pytest.approx(410 / 50.5)
    assert peak_rate(PROCESS) == 20.0


def test_more_requests_than_the_stages_send_are_refused():
    with pytest.raises(InputError, match="at most the 410 requests"):
        times(PROCESS, [411])
    with pytest.raises(ValueError, match="sends nothing"):
        StagedArrivals(stages=((0.1, 2.0),))


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_stage_waits_for_the_answers_to_the_one_before(replicas, tmp_path):
    scenario = Draft(
        {
            "model": "llama-3.1-8b-instruct", "hardware": "h100-80gb-sxm",
            "deployment": {"groups": [{"name": "own", "count": replicas}]},
            "workload": {
                "kind": "synthetic", "num_requests": 90,
                "arrivals": {"kind": "stages", "stages": [[3, 10], [10, 6]], "pause": "1.5s"},
                "prompt": {"kind": "fixed", "tokens": 400}, "output": {"kind": "fixed", "tokens": 300},
            },
        },
        source="test",
    ).resolve()  # fmt: skip
    path = tmp_path / "requests.parquet"
    simulate(scenario, requests_path=path)
    rows = pq.read_table(path).sort_by("request_index").to_pydict()
    answered = max(arrival + e2e for arrival, e2e in zip(rows["arrival_s"][:30], rows["e2e_s"][:30], strict=True))
    assert rows["arrival_s"][29] == pytest.approx(10.0)
    # the first gap of the second stage follows the pause
    assert answered + 1.5 <= rows["arrival_s"][30] <= answered + 3.0
    assert rows["arrival_s"][89] == pytest.approx(answered + 1.5 + 6.0)
