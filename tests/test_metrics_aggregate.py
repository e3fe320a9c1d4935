"""Metrics of a whole run against brute force over the same records."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from metrics_data import BLOCK_SIZE, EGRESS_S, KV_BLOCKS, Columns, aggregate, synthetic_result, toy_run

from perfsim.metrics.aggregate import Aggregate, Aggregated
from perfsim.spec.policy import SLO

STATS = ("mean", "p50", "p90", "p95", "p99")


@pytest.fixture(scope="module")
def run() -> tuple[Columns, Columns]:
    return toy_run(400, rate=6.0)


@pytest.fixture(scope="module")
def found(run: tuple[Columns, Columns]) -> Aggregated:
    return aggregate(*run).finish()


def latencies(requests: Columns) -> dict[str, np.ndarray]:
    output, several = requests["output_tokens"], requests["output_tokens"] > 1
    ttft = requests["first_token_s"] + EGRESS_S - requests["arrival_s"]
    e2e = requests["finish_s"] + EGRESS_S - requests["arrival_s"]
    return {
        "ttft": ttft,
        "engine_ttft": requests["first_token_s"] - requests["queued_s"],
        "tpot": ((e2e - ttft)[several] / (output[several] - 1)),
        "e2e": e2e,
        "queue_time": requests["scheduled_s"] - requests["queued_s"],
    }


def every_gap(segments: Columns) -> np.ndarray:
    rows = zip(*(segments[name] for name in ("steps", "first_s", "slope_s", "gap_sequences")), strict=True)
    return np.concatenate([np.repeat(first + slope * np.arange(n), int(seen)) for n, first, slope, seen in rows])


def test_latencies_equal_numpy(run: tuple[Columns, Columns], found: Aggregated) -> None:
    samples = {**latencies(run[0]), "itl": every_gap(run[1])}
    for name, values in samples.items():
        summary = found.metrics[name]
        assert summary["mean"] == pytest.approx(values.mean(), rel=1e-12)
        for stat in STATS[1:]:
            assert summary[stat] == pytest.approx(np.percentile(values, float(stat[1:])), rel=1e-12), (name, stat)
        assert summary["max"] == pytest.approx(values.max(), rel=1e-12)


def test_gaps_add_up_to_the_time_between_first_and_last_tokens(run: tuple[Columns, Columns], found: Aggregated) -> None:
    requests, gaps = run[0], every_gap(run[1])
    assert gaps.size == (requests["output_tokens"] - 1).sum()
    between = (requests["finish_s"] - requests["first_token_s"]).sum()
    assert found.metrics["itl"]["mean"] * gaps.size == pytest.approx(between, rel=1e-9)


def test_throughput_divides_by_the_makespan_of_the_clients(run: tuple[Columns, Columns], found: Aggregated) -> None:
    requests = run[0]
    span = requests["finish_s"].max() + EGRESS_S - requests["arrival_s"].min()
    rates = found.metrics["throughput"]
    assert found.makespan_s == pytest.approx(span)
    assert rates["requests_per_s"] == pytest.approx(400 / span)
    assert rates["output_tokens_per_s"] == pytest.approx(requests["output_tokens"].sum() / span)
    assert rates["prompt_tokens_per_s"] == pytest.approx(requests["prompt_tokens"].sum() / span)


def test_timeline_integrates_to_the_same_tokens(run: tuple[Columns, Columns], found: Aggregated) -> None:
    requests, line = run[0], found.timeline
    widths = np.full(len(line["running"]), line["bin_s"])
    widths[-1] = line["duration_s"] - (widths.size - 1) * line["bin_s"]
    assert widths.size <= 400
    tokens = float((np.array(line["output_tokens_per_s"]) * widths).sum())
    assert tokens == pytest.approx(requests["output_tokens"].sum(), rel=1e-5)
    computed = (requests["prompt_tokens"] - requests["cached_tokens"]).sum()
    prefill = float((np.array(line["prefill_tokens_per_s"]) * widths).sum())
    assert prefill == pytest.approx(computed, rel=1e-5)


def test_running_sequences_over_time_equal_the_time_requests_ran(run: tuple[Columns, Columns]) -> None:
    requests, segments = run
    law = aggregate(requests, {**segments, "waiting": np.zeros_like(segments["waiting"])}).finish().littles_law
    assert law is not None
    ran = (requests["finish_s"] - requests["scheduled_s"]).sum()
    assert law.from_segments == pytest.approx(law.from_requests * ran / law.request_seconds, rel=1e-9)


def test_littles_law_holds_and_notices_a_lost_request(run: tuple[Columns, Columns], found: Aggregated) -> None:
    law = found.littles_law
    assert law is not None
    assert law.request_seconds == pytest.approx((run[0]["finish_s"] - run[0]["queued_s"]).sum())
    assert law.holds()
    half = {name: column[::2] for name, column in run[0].items()}
    broken = aggregate(half, run[1]).finish().littles_law
    assert broken is not None
    assert not broken.holds()


def test_occupancy_and_batch_equal_sums_over_steps(run: tuple[Columns, Columns], found: Aggregated) -> None:
    segments = run[1]
    steps, running = segments["steps"], segments["running"]
    assert found.metrics["batch"]["mean_sequences"] == pytest.approx((running * steps).sum() / steps.sum())
    assert found.metrics["batch"]["max_sequences"] == running.max()
    assert found.metrics["queue"]["max_waiting"] == segments["waiting"].max()
    assert found.metrics["kv_cache"]["occupancy_peak"] == segments["kv_blocks"].max() / KV_BLOCKS
    lasting = steps * segments["first_s"] + segments["slope_s"] * steps * (steps - 1) / 2
    held = segments["kv_blocks"] - segments["decode_sequences"] * (steps - 1) / 2 / BLOCK_SIZE
    horizon = segments["start_s"][-1] + lasting[-1] - segments["start_s"][0]
    mean = (np.maximum(held, 0) * lasting).sum() / horizon / KV_BLOCKS
    assert found.metrics["kv_cache"]["occupancy_mean"] == pytest.approx(mean)
    assert found.simulation == {"requests": 400, "steps": steps.sum(), "segments": steps.size}
    assert found.metrics["prefix_cache"]["hit_rate"] == pytest.approx(
        run[0]["cached_tokens"].sum() / run[0]["prompt_tokens"].sum()
    )


@pytest.mark.parametrize("chunk", [1, 37])
def test_streaming_equals_one_shot(run: tuple[Columns, Columns], found: Aggregated, chunk: int) -> None:
    parts = aggregate(*run, chunk=chunk).finish()
    assert parts.simulation == found.simulation
    for name in ("ttft", "engine_ttft", "tpot", "itl", "e2e", "queue_time"):
        assert parts.metrics[name] == found.metrics[name]
        assert parts.curves[name] == found.curves[name]
    assert parts.metrics["counts"] == found.metrics["counts"]
    assert parts.metrics["goodput"] == found.metrics["goodput"]
    for name in ("running", "waiting", "kv_blocks", "output_tokens_per_s", "prefill_tokens_per_s"):
        assert parts.timeline[name] == pytest.approx(found.timeline[name], rel=1e-5, abs=1e-6)


def test_bins_take_over_beyond_the_limits(run: tuple[Columns, Columns], found: Aggregated) -> None:
    binned = aggregate(*run, chunk=50, exact_limit=100, pair_limit=100).finish()
    assert set(binned.metrics["percentile_method"].values()) == {"0.1% logarithmic bins"}
    assert set(found.metrics["percentile_method"].values()) == {"exact"}
    for name in ("ttft", "engine_ttft", "tpot", "itl", "e2e"):
        for stat in STATS:
            assert binned.metrics[name][stat] == pytest.approx(found.metrics[name][stat], rel=5.001e-4)


def test_goodput_counts_requests_within_every_tightest_bound(run: tuple[Columns, Columns]) -> None:
    requests = run[0]
    values = latencies(requests)
    tpot = np.zeros(400)
    tpot[requests["output_tokens"] > 1] = values["tpot"]
    bounds = {name: float(np.percentile(values[name], 80)) for name in ("ttft", "tpot", "e2e")}
    slo = SLO(ttft={"p99": 99.0, "p50": bounds["ttft"]}, tpot={"p95": bounds["tpot"]}, e2e={"mean": bounds["e2e"]},
              itl={"p50": 1e-9})  # fmt: skip
    good = (values["ttft"] <= bounds["ttft"]) & (tpot <= bounds["tpot"]) & (values["e2e"] <= bounds["e2e"])
    total = aggregate(*run, slo=slo)
    total.add_rejected({"longer than max_model_len": 3, "longer than the KV pool": 2})
    metrics = total.finish().metrics
    assert 0 < good.sum() < 400
    assert metrics["goodput"]["requests"] == good.sum()
    assert metrics["goodput"]["fraction"] == pytest.approx(good.sum() / 405)
    assert metrics["goodput"]["requests_per_s"] == pytest.approx(good.sum() / metrics["makespan_s"])
    assert metrics["counts"]["rejected"] == 5
    assert metrics["counts"]["requests"] == 405


def test_verdicts_compare_the_named_percentile_with_its_bound(found: Aggregated, run: tuple[Columns, Columns]) -> None:
    p90 = found.metrics["ttft"]["p90"]
    metrics = aggregate(*run, slo=SLO(ttft={"p90": p90, "p50": 1e-6}, itl={"p99": 1e3})).finish().metrics
    verdicts = {(v["metric"], v["stat"]): v for v in metrics["slo"]["verdicts"]}
    assert verdicts["ttft", "p90"] == {
        "metric": "ttft",
        "stat": "p90",
        "bound_s": p90,
        "measured_s": p90,
        "holds": True,
    }
    assert verdicts["ttft", "p50"]["holds"] is False
    assert verdicts["itl", "p99"]["holds"] is True
    assert metrics["slo"]["holds"] is False


def test_no_slo_gives_no_goodput(run: tuple[Columns, Columns]) -> None:
    metrics = aggregate(*run, slo=SLO()).finish().metrics
    assert metrics["goodput"] == {"requests": None, "fraction": None, "requests_per_s": None}
    assert metrics["slo"] == {"holds": None, "verdicts": []}


def test_exceptional_gaps_join_the_itl(run: tuple[Columns, Columns]) -> None:
    total = aggregate(*run)
    total.add_gaps(np.array([50.0, 60.0]), np.array([1.0, 2.0]))
    samples = np.concatenate((every_gap(run[1]), [50.0, 60.0, 60.0]))
    itl = total.finish().metrics["itl"]
    assert itl["max"] == 60.0
    assert itl["mean"] == pytest.approx(samples.mean())
    assert itl["p99"] == pytest.approx(np.percentile(samples, 99), rel=1e-12)


def test_one_token_outputs_have_no_tpot() -> None:
    requests, segments = toy_run(50, rate=5.0)
    single = {**requests, "output_tokens": np.ones(50, dtype=int), "finish_s": requests["first_token_s"]}
    silent = {**segments, "gap_sequences": np.zeros_like(segments["gap_sequences"])}
    metrics = aggregate(single, silent, slo=SLO(tpot={"p50": 1e-6})).finish().metrics
    assert set(metrics["tpot"].values()) == set(metrics["itl"].values()) == {None}
    assert metrics["e2e"] == metrics["ttft"]
    assert metrics["goodput"]["fraction"] == 1.0  # nothing broke a promise about TPOT
    assert metrics["slo"]["verdicts"][0]["holds"] is None
    mixed = {**requests, "output_tokens": np.where(np.arange(50) < 10, 1, requests["output_tokens"])}
    several = mixed["output_tokens"] > 1
    tpot = (mixed["finish_s"] - mixed["first_token_s"])[several] / (mixed["output_tokens"][several] - 1)
    assert aggregate(mixed, segments).finish().metrics["tpot"]["mean"] == pytest.approx(tpot.mean())


def test_a_run_that_rejects_everything_is_all_null() -> None:
    total = Aggregate(slo=SLO(ttft={"p95": 1.0}), egress=0.0, kv_blocks=10, block_size=16)
    total.add_rejected({"longer than max_model_len": 4})
    found = total.finish()
    assert found.makespan_s is None
    assert found.littles_law is None
    for name in ("ttft", "engine_ttft", "tpot", "itl", "e2e", "throughput", "prefix_cache"):
        assert set(found.metrics[name].values()) == {None}
    assert found.metrics["goodput"] == {"requests": 0, "fraction": 0.0, "requests_per_s": None}
    assert found.metrics["rejected_for"] == {"longer than max_model_len": 4}
    assert found.timeline["running"] == []
    assert found.simulation == {"requests": 4, "steps": 0, "segments": 0}


def test_json_has_the_promised_paths(run: tuple[Columns, Columns]) -> None:
    tree: dict[str, Any] = json.loads(synthetic_result(aggregate(*run)).to_json())
    assert tree["schema_version"] == 1
    for name in ("ttft", "engine_ttft", "tpot", "itl", "e2e"):
        for stat in STATS:
            assert isinstance(tree["metrics"][name][stat], float), (name, stat)
    for name in ("requests_per_s", "output_tokens_per_s"):
        assert tree["metrics"]["throughput"][name] > 0
    assert tree["simulation"].keys() == {"requests", "steps", "segments"}
    assert len(tree["curves"]["probability"]) == len(tree["curves"]["ttft"])
