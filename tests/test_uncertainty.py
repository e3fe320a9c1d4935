"""Bands: zero factors, zero width; width in proportion; Monte Carlo agrees; the point is untouched and inside."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from typing import get_args, get_origin

import numpy as np
import pytest

import perfsim as ps
from perfsim.metrics.definitions import HEADLINE
from perfsim.run import estimate, quantify, simulate
from perfsim.spec.calibration import DeviceEfficiency
from perfsim.spec.curves import GemmCurve, OperatorCurves
from perfsim.spec.load import load_scenario
from perfsim.spec.uncertainty import KINDS, Observation
from perfsim.uncertainty.bands import directions, drawn
from perfsim.uncertainty.coefficients import KIND_OF_CURVES, RATES, TIMES, kind_of, slower, slower_device
from perfsim.uncertainty.factors import Factor, Reach, covariance_of, factors_of, shifted
from perfsim.uncertainty.rerun import MOST_REQUESTS, SKIPPED_ABOVE, shortened
from perfsim.uncertainty.spread import Z, in_quadrature, of_draws

NEAR = Reach(8192.0, 4096.0)


def scenario(count: int = 250, rate: float = 2.0, **flags: object) -> ps.Scenario:
    workload = (
        f"{{kind: synthetic, num_requests: {count}, arrivals: {{kind: poisson, rate: {rate}}}, "
        "prompt: {kind: lognormal, sigma: 0.4, mean: 500}, output: {kind: lognormal, sigma: 0.4, mean: 120}}"
    )
    # Small tables of step times: compiling them would take longer than the runs.
    overrides = [f"workload={workload}", "policy.max_num_batched_tokens=1024", "policy.max_num_seqs=128"]
    return load_scenario(None, overrides=overrides, **flags)


def scaled(asked: ps.Scenario, size: float) -> ps.Scenario:
    """The scenario with every spread multiplied by `size`."""
    spreads = asked.calibration.uncertainty
    assert spreads is not None

    def times(spread):
        return spread.model_copy(update={"sigma": spread.sigma * size})

    changes = {name: times(getattr(spreads, name)) for name in ("engine", "deployment", "power", "per_doubling")}
    observed = [run.model_copy(update={"sigma": run.sigma * size}) for run in spreads.observed]
    changes["observed"] = tuple(observed) if size > 0 else ()
    changes |= {name: {key: times(spread) for key, spread in getattr(spreads, name).items()}
                for name in ("kinds", "tails")}  # fmt: skip
    curves = asked.calibration.device.curves
    device = asked.calibration.device.model_copy(
        update={
            "curves": curves.model_copy(update={"discrepancy": {k: v * size for k, v in curves.discrepancy.items()}})
        }
    )
    calibration = asked.calibration.model_copy(
        update={"uncertainty": spreads.model_copy(update=changes), "device": device}
    )
    return asked.model_copy(update={"calibration": calibration})


def log_width(result: ps.Result, path: str) -> float:
    low, high = result.bands[path]
    return math.log(high / low)


SHAPES = frozenset(("idle", "tail"))  # fractions that are no rates


def test_every_time_and_every_rate_is_reached_by_a_factor() -> None:
    """A coefficient that a fit adds has to be given its place, or no factor would reach it."""
    for name in DeviceEfficiency.model_fields:
        assert (kind_of(name) is None) == (name == "curves"), name
    curves = {
        name: get_args(field.annotation)[1]
        for name, field in OperatorCurves.model_fields.items()
        if get_origin(field.annotation) is dict and name != "discrepancy"
    }
    assert set(curves) <= set(KIND_OF_CURVES)
    assert len(curves) >= 4
    for curve in curves.values():
        for name, field in curve.model_fields.items():
            text = f"{field.annotation} {field.metadata}"
            fraction = bool(re.search(r"Le\(le=1\)", text)) and name not in SHAPES
            assert (name in RATES) == fraction, (curve, name)
            assert (name in TIMES) == ("BeforeValidator" in text), (curve, name)


def test_factors_multiply_times_and_never_pass_the_datasheet() -> None:
    device = scenario().calibration.device
    kinds = dict.fromkeys(KINDS, 1.7)
    slow, fast = slower_device(device, kinds), slower_device(device, dict.fromkeys(KINDS, 0.01))
    assert slow.gemm_launch == pytest.approx(1.7 * device.gemm_launch)
    assert slow.gemm_bandwidth == pytest.approx(device.gemm_bandwidth / 1.7)
    assert [at for at, _ in slow.decode_attention] == [at for at, _ in device.decode_attention]
    assert slow.collective_hop == pytest.approx(1.7 * device.collective_hop)
    for name in DeviceEfficiency.model_fields:
        value = getattr(fast, name)
        assert not isinstance(value, float) or 0 < value <= 1, name
    assert slower_device(device, {"moe": 2.0}).gemm_launch == device.gemm_launch
    DeviceEfficiency.model_validate(fast.model_dump())  # still a legal calibration
    curve = GemmCurve(launch=3e-6, ramp=1e-6, bandwidth=0.8, compute=0.7, edge=16.0, row_seconds=1e-9)
    with_curve = device.model_copy(update={"curves": OperatorCurves(gemm={"bf16": curve})})
    moved = slower_device(with_curve, {"gemm": 1.5}).curves.gemm["bf16"]
    assert (moved.launch, moved.ramp, moved.row_seconds) == pytest.approx((4.5e-6, 1.5e-6, 1.5e-9))
    assert (moved.bandwidth, moved.compute, moved.edge) == pytest.approx((0.8 / 1.5, 0.7 / 1.5, 16.0))


def test_the_fastest_draw_is_not_faster_than_light() -> None:
    asked = scenario(60)
    rushed = shifted(asked, dict.fromkeys((factor.name for factor in factors_of(asked, NEAR)[0]), -20.0))
    result = simulate(rushed)  # prices every step; its breakdown is what the kernels take at the datasheet's rates
    plain = simulate(asked)
    assert 0 < result.value("tpot.mean") < plain.value("tpot.mean")
    weights = plain.memory["weights"]
    assert result.value("tpot.mean") > 0.9 * weights / asked.hardware.accelerator.memory.read_bandwidth


def test_host_and_power_factors_reach_only_theirs() -> None:
    calibration = scenario().calibration
    moved = slower(calibration, kinds={}, host=2.0, power=3.0)
    assert moved.engine.step_host == 2 * calibration.engine.step_host
    assert moved.engine.egress == 2 * calibration.engine.egress
    assert moved.engine.sampling_passes == calibration.engine.sampling_passes
    assert moved.power.memory_fraction == 1.0
    assert moved.device == calibration.device


def test_zero_factors_give_zero_width() -> None:
    asked = scaled(scenario(80), 0.0)
    for samples in (None, 3):
        result = quantify(simulate(asked), asked, samples=samples)
        assert result.bands
        for path, band in result.bands.items():
            assert band == pytest.approx([result.value(path)] * 2, rel=1e-12), path


def test_doubled_spreads_double_the_width_where_nothing_saturates() -> None:
    asked = scenario(120, rate=0.2)  # one request at a time: latency follows the factors alone
    widths = []
    for size in (0.02, 0.04):
        some = scaled(asked, size)
        widths.append(log_width(quantify(simulate(some), some), "tpot.mean"))
    assert widths[1] / widths[0] == pytest.approx(2.0, rel=0.02)


def test_the_point_is_unchanged_and_inside_its_band() -> None:
    asked = scenario()
    plain = simulate(asked)
    result = quantify(plain, asked)
    assert replace(result, bands={}, provenance=plain.provenance, warnings=plain.warnings) == plain
    assert set(result.bands) == {path for path in HEADLINE if plain.numbers().get(path) is not None}
    for path, (low, high) in result.bands.items():
        assert low <= result.value(path) <= high, path
    for path in ("ttft.mean", "ttft.p99", "tpot.p50", "itl.mean", "e2e.p95", "energy.joules", "cost.usd"):
        assert result.bands[path][0] < result.value(path) < result.bands[path][1], path
    assert simulate(asked, bands=True) == result


def test_monte_carlo_agrees_with_the_first_order() -> None:
    """Unsaturated and with small spreads. An end of 200 draws errs by about sqrt(.05 * .95 / 200) / (density at the
    quantile, .103) = 0.15 standard deviations, 9% of the half width; three times that is allowed."""
    asked = scaled(scenario(40, rate=0.3), 0.25)
    plain = simulate(asked)
    first, drawn_bands = quantify(plain, asked).bands, quantify(plain, asked, samples=200).bands
    for path in ("tpot.mean", "e2e.mean", "energy.joules_per_output_token"):
        value = plain.value(path)
        for side in (0, 1):
            ours, theirs = math.log(first[path][side] / value), math.log(drawn_bands[path][side] / value)
            assert ours == pytest.approx(theirs, rel=0.27), (path, side)


def test_few_moves_are_enough_for_the_time_per_token() -> None:
    asked = scenario(100, rate=0.3)
    plain = simulate(asked)
    few, more = quantify(plain, asked, alone=1), quantify(plain, asked)
    assert (few.provenance["uncertainty"]["runs"], more.provenance["uncertainty"]["runs"]) == (4, 8)
    assert log_width(few, "tpot.mean") == pytest.approx(log_width(more, "tpot.mean"), rel=0.1)


def test_queues_make_bands_skewed() -> None:
    rate = 0.8 * estimate(scenario()).value("throughput.max_requests_per_s")
    asked = scaled(scenario(600, rate=rate), 0.0)
    spreads = asked.calibration.uncertainty
    assert spreads is not None
    # Of a size of its own, 18% either way, so that the test does not follow the packaged sizes.
    spreads = spreads.model_copy(update={"deployment": spreads.deployment.model_copy(update={"sigma": 0.1})})
    asked = asked.model_copy(update={"calibration": asked.calibration.model_copy(update={"uncertainty": spreads})})
    result = quantify(simulate(asked), asked)
    value, (low, high) = result.value("ttft.mean"), result.bands["ttft.mean"]
    assert math.log(high / value) > 1.5 * math.log(value / low)


def test_order_of_factors_does_not_matter() -> None:
    factors = [Factor("a", "gemm", 0.1, ""), Factor("b", "host", 0.2, ""), Factor("", "deployment", 0.3, "")]
    covariance = np.array([[0.01, -0.01, 0.0], [-0.01, 0.04, 0.0], [0.0, 0.0, 0.09]])
    forwards = drawn(factors, covariance, seed=3, count=5)
    backwards = drawn(factors[::-1], covariance[::-1, ::-1], seed=3, count=5)
    for ours, theirs in zip(forwards, backwards, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-12)
    assert drawn(factors, covariance, seed=4, count=5) != forwards
    alone = drawn(factors[2:], covariance[2:, 2:], seed=3, count=5)
    assert [draw["deployment"] for draw in alone] == pytest.approx([draw["deployment"] for draw in forwards])
    pairs = [({"tpot.mean": 1.2}, {"tpot.mean": 0.9}), ({"tpot.mean": 1.1}, {"tpot.mean": 0.8})]
    point = {"tpot.mean": 1.0}
    assert in_quadrature(point, point, pairs)["tpot.mean"] == pytest.approx(
        in_quadrature(point, point, pairs[::-1])["tpot.mean"], rel=1e-14
    )


def test_draws_have_the_covariance_they_are_given() -> None:
    factors = [Factor("a", "gemm", 0.25, ""), Factor("b", "host", 0.4, "")]
    covariance = np.array([[0.0625, -0.06], [-0.06, 0.16]])
    draws = drawn(factors, covariance, seed=0, count=4000)
    found = np.cov(np.array([[draw["a gemm"], draw["b host"]] for draw in draws]).T)
    # An entry of a covariance of n draws errs by sqrt((c_ij^2 + c_ii c_jj) / n).
    diagonal = np.diagonal(covariance)
    error = np.sqrt((covariance**2 + np.outer(diagonal, diagonal)) / 4000)
    assert (np.abs(found - covariance) < 4 * error).all()


def test_moves_make_up_the_covariance() -> None:
    factors = [Factor("a", kind, 0.1, "") for kind in ("decode_attention", "gemm", "host", "power")]
    names = [factor.name for factor in factors]
    covariance = np.diag([0.04, 0.09, 0.01, 0.25])
    covariance[0, 1] = covariance[1, 0] = -0.05
    share = dict(zip(names, (0.3, 0.6, 0.1, 1.0), strict=True))
    moves = directions(factors, covariance, share, alone=3)
    matrix = np.array([[move.get(name, 0.0) for name in names[:3]] for move in moves])
    assert matrix.T @ matrix == pytest.approx(covariance[:3, :3])
    assert moves[0][names[1]] == pytest.approx(0.3)  # the GEMMs by one standard deviation, and what depends on them
    assert moves[0][names[0]] == pytest.approx(-0.05 / 0.3)
    # With fewer moves the time still has its whole variance.
    gradient = np.array([share[name] for name in names[:3]])
    fewer = np.array(
        [[move.get(name, 0.0) for name in names[:3]] for move in directions(factors, covariance, share, alone=1)]
    )
    assert len(fewer) == 2
    assert ((fewer @ gradient) ** 2).sum() == pytest.approx(gradient @ covariance[:3, :3] @ gradient)


def test_whole_runs_that_were_compared_tie_factors_together() -> None:
    """Against the textbook form of a Gaussian that is given linear observations."""
    asked = scenario()
    shares_of = {"gemm": 0.7, "decode_attention": 0.2, "host": 0.1}
    run = Observation(shares=shares_of, sigma=0.05, source="a measurement")
    spreads = asked.calibration.uncertainty.model_copy(update={"observed": (run, run)})
    tied = asked.model_copy(update={"calibration": asked.calibration.model_copy(update={"uncertainty": spreads})})
    factors = factors_of(tied, NEAR)[0]
    covariance, sources = covariance_of(tied, factors)
    share = np.array([shares_of.get(factor.part, 0.0) for factor in factors])
    precision = np.diag([factor.sigma**-2 for factor in factors]) + 2 * np.outer(share, share) / 0.05**2
    assert covariance == pytest.approx(np.linalg.inv(precision), abs=1e-12)
    assert sources == ("a measurement",)
    assert math.sqrt(share @ covariance @ share) < 0.05 / math.sqrt(2)
    names = [factor.part for factor in factors]
    assert covariance[names.index("gemm"), names.index("decode_attention")] < 0
    free = asked.model_copy(
        update={"calibration": asked.calibration.model_copy(
            update={"uncertainty": spreads.model_copy(update={"observed": ()})})}
    )  # fmt: skip
    widths = [log_width(quantify(simulate(some), some), "tpot.mean") for some in (free, tied)]
    assert widths[1] < widths[0]


def test_quadrature_and_quantiles() -> None:
    point = {"tpot.mean": 2.0, "goodput.fraction": 0.9, "queue_time.p50": 0.0, "ttft.mean": 1.0}
    pairs = [
        ({"tpot.mean": 2 * math.exp(0.3), "goodput.fraction": 0.5, "queue_time.p50": 0.3, "ttft.mean": None},
         {"tpot.mean": 2 * math.exp(-0.1), "goodput.fraction": 1.0, "queue_time.p50": 0.0, "ttft.mean": 0.5}),
        ({"tpot.mean": 2 * math.exp(0.4), "goodput.fraction": 0.6, "queue_time.p50": 0.4, "ttft.mean": 1.0},
         {"tpot.mean": 2.0, "goodput.fraction": 0.9, "queue_time.p50": 0.0, "ttft.mean": 1.0}),
    ]  # fmt: skip
    bands = in_quadrature(point, point, pairs)
    assert bands["tpot.mean"] == pytest.approx([2 * math.exp(-0.1), 2 * math.exp(0.5)])
    assert bands["goodput.fraction"] == pytest.approx([0.4, 1.0])
    assert bands["queue_time.p50"] == pytest.approx([0.0, 0.5])
    assert bands["ttft.mean"] == [pytest.approx(0.5), None]  # unstable: no upper end
    draws = [{"tpot.mean": 2 * math.exp(change)} for change in np.linspace(-1, 1, 101)]
    assert of_draws({"tpot.mean": 2.0}, point, draws)["tpot.mean"] == pytest.approx(
        [2 * math.exp(-0.9), 2 * math.exp(0.9)]
    )
    one_sided = [{"tpot.mean": 2 * math.exp(change)} for change in np.linspace(0.1, 1, 50)]
    assert of_draws({"tpot.mean": 2.0}, point, one_sided)["tpot.mean"][0] == 2.0  # contains the point


def test_a_device_that_borrows_has_wider_bands() -> None:
    """Of what its parts add: the spread of whole runs, which the bands hold in quadrature, is the same for both."""

    def parts(hardware: str) -> float:
        asked = scenario(100, rate=0.3, model="llama-2-7b-hf", hardware=hardware)
        spreads = asked.calibration.uncertainty
        assert spreads is not None
        width = log_width(quantify(simulate(asked), asked), "tpot.mean")
        return math.sqrt(width**2 - (2 * Z * spreads.deployment.sigma) ** 2)

    assert parts("rtx-6000-ada-48gb") > 1.3 * parts("l40s-48gb")


def test_between_nodes_the_spread_is_that_of_the_network() -> None:
    """Two nodes share no links with one: its factors stay, and what joins nodes has a factor of its own."""

    def asked(cluster: str, tp: int) -> ps.Scenario:
        return load_scenario("mooncake-demo", overrides=[f"hardware={cluster}", f"parallel.tp={tp}"])

    reach = Reach(8192, 8192)
    inside, across = (
        {factor.name: factor.sigma for factor in factors_of(asked("dgx-h100-superpod", tp), reach)[0]} for tp in (8, 16)
    )
    assert across.keys() - inside.keys() == {"h100-80gb-sxm network"}
    network = across.pop("h100-80gb-sxm network")
    assert across == inside
    assert network > 3 * across["h100-80gb-sxm collective"]


def test_bands_between_nodes_are_as_wide_as_what_is_known_of_the_network() -> None:
    asked = scenario(20, rate=0.3, model="llama-3.1-70b-instruct", hardware="dgx-h100-superpod")
    asked = asked.replace(**{"parallel.tp": 16})
    curves = asked.calibration.device.curves.model_copy(update={"discrepancy": dict.fromkeys(KINDS, 0.05)})
    device = asked.calibration.device.model_copy(update={"curves": curves})
    known = asked.model_copy(update={"calibration": asked.calibration.model_copy(update={"device": device})})
    unknown = quantify(simulate(asked), asked)
    assert "h100-80gb-sxm network" in unknown.provenance["uncertainty"]["factors"]
    assert log_width(unknown, "tpot.mean") > 1.2 * log_width(quantify(simulate(known), known), "tpot.mean")


def test_work_outside_the_range_widens_and_says_so() -> None:
    asked = scenario()
    near, quiet = factors_of(asked, NEAR)
    far, notes = factors_of(asked, Reach(8192.0, 4.0 * 131072))
    sigma, wider = ({factor.name: factor.sigma for factor in found} for found in (near, far))
    grown = {name for name in sigma if wider[name] > sigma[name]}
    assert not quiet
    assert {name.split()[-1] for name in grown} == {"prefill_attention", "decode_attention"}
    assert len(notes) == 2
    assert all("outside the calibrated range" in note and "524,288" in note for note in notes)
    long = scenario(3).replace(**{"workload.prompt": {"kind": "fixed", "tokens": 40000}})
    assert any("prefill attention was measured" in text for text in quantify(simulate(long), long).warnings)


def test_groups_on_other_devices_have_factors_of_their_own() -> None:
    deployment = ("deployment={groups: [{name: a, count: 1}, {name: b, count: 1, hardware: a100-80gb-sxm}], "
                  "router: {kind: round_robin}}")  # fmt: skip
    asked = scenario(60)
    asked = load_scenario(
        None, overrides=[f"workload={json.dumps(asked.workload.model_dump(mode='json'))}", deployment]
    )
    names = {factor.name for factor in factors_of(asked, NEAR)[0]}
    assert {"h100-80gb-sxm gemm", "a100-80gb-sxm gemm", "vllm 0.15 host", "deployment"} <= names
    moved = shifted(asked, {"a100-80gb-sxm gemm": 0.5})
    assert moved.calibration.device == asked.calibration.device
    before, after = (some.deployment.groups[1].calibration.device for some in (asked, moved))
    assert after.gemm_launch == pytest.approx(math.exp(0.5) * before.gemm_launch)
    assert quantify(simulate(asked), asked).bands["tpot.mean"][0] > 0


def test_long_runs_are_cut_or_skipped_and_say_so() -> None:
    asked = scenario(400)
    plain = simulate(asked)
    assert shortened(asked, plain) is asked
    many = replace(plain, simulation={**plain.simulation, "requests": 3 * MOST_REQUESTS})
    assert shortened(asked, many).workload.num_requests == MOST_REQUESTS
    busy = replace(plain, simulation={**plain.simulation, "segments": 240_000})
    short = shortened(asked, busy)
    assert short.workload.num_requests == 100
    result = quantify(busy, asked)
    assert result.provenance["uncertainty"]["requests"] == "100 of 400"
    assert "first requests" in result.provenance["uncertainty"]["note"]
    assert result.bands["tpot.mean"][0] < result.value("tpot.mean") < result.bands["tpot.mean"][1]
    huge = replace(plain, simulation={**plain.simulation, "requests": SKIPPED_ABOVE + 1})
    skipped = quantify(huge, asked)
    assert skipped.bands == {}
    assert "not quantified: more than 100,000 requests" in skipped.provenance["uncertainty"]


def test_closed_form_has_bands_and_no_upper_end_where_it_may_be_unstable() -> None:
    calm = estimate(scenario(), bands=True)
    assert calm.bands["ttft.mean"][0] < calm.value("ttft.mean") < calm.bands["ttft.mean"][1]
    assert calm.bands["throughput.max_requests_per_s"][0] < calm.value("throughput.max_requests_per_s")
    rate = 0.97 * calm.value("throughput.max_requests_per_s")
    near = estimate(scenario(rate=rate), bands=True)
    assert near.value("ttft.mean") is not None
    assert near.bands["ttft.mean"][1] is None
    json.dumps(near.to_dict(), allow_nan=False)


def test_two_processes_draw_the_same_bands() -> None:
    flags = ["default", "--set", "workload.num_requests=60", "--format", "json"]
    for extra in ([], ["--samples", "4"]):
        texts = []
        for salt in ("1", "2"):
            command = [sys.executable, "-m", "perfsim", "simulate", *flags, *extra]
            done = subprocess.run(command, check=True, capture_output=True, env={"PYTHONHASHSEED": salt, "PATH": ""})
            content = json.loads(done.stdout)
            texts.append((content["bands"], content["provenance"]))
        assert texts[0] == texts[1]
        assert texts[0][0]["ttft.p95"][0] < texts[0][0]["ttft.p95"][1]


def test_a_band_is_one_and_two_thirds_standard_deviations() -> None:
    assert pytest.approx(1.6448536) == Z
