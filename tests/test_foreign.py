"""Curves carried to other makers' devices: few factors, no faster than light, bands where nothing was measured."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from batches import batch_shape
from hypothesis import given, settings
from hypothesis import strategies as st

from perfsim.cost.collective import collective_estimate
from perfsim.cost.roofline import op_estimate
from perfsim.cost.speed_of_light import collective_seconds, op_seconds
from perfsim.cost.topology import fabric
from perfsim.errors import InputError
from perfsim.ops.op import Op
from perfsim.ops.transformer import lower
from perfsim.run import simulate
from perfsim.spec import catalog
from perfsim.spec.calibration import Calibration, DeviceEfficiency
from perfsim.spec.calibration_file import load_calibration
from perfsim.spec.foreign_file import FOREIGN, StackLaw, carried, load_foreign
from perfsim.spec.load import find_calibration, load_scenario
from perfsim.spec.yaml import load_yaml
from validation.engines.foreign import (
    BANDWIDTHS,
    FILE,
    LAUNCHES,
    Stacks,
    Surface,
    Sweep,
    fit,
    missed,
    rms,
)

CALIBRATION = Path(__file__).resolve().parents[1] / "hardware" / "calibration"
COEFFICIENTS = CALIBRATION / "first-guess.yaml"
LAW = load_foreign(CALIBRATION).stacks["rocm"]
factors = st.floats(0.3, 6.0)


@cache
def lent(accelerator: str) -> Calibration:
    return load_calibration(COEFFICIENTS, accelerator=accelerator, engine="sglang", foreign=False)


def times(device: DeviceEfficiency, accelerator: str) -> tuple[np.ndarray, np.ndarray]:
    """(seconds, speed of light) of all parts of a step of prompts and decodes on eight GPUs."""
    node, model = catalog.node(accelerator), catalog.model("deepseek-ai--DeepSeek-V3")
    step = batch_shape(model, [5000] * 32, [(1000, 500)])
    found, bounds = [], []
    for work in lower(model, step, tp=8, expert_popularity=0.8):
        if isinstance(work, Op):
            found.append(op_estimate(work, node.accelerator, device, lent(accelerator).power).seconds)
            bounds.append(op_seconds(work, node.accelerator))
        else:
            found.append(collective_estimate(work, fabric(node), device).seconds)
            bounds.append(collective_seconds(work, fabric(node)))
    return np.array(found, dtype=float), np.array(bounds, dtype=float)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(LAW.devices)), factors, factors, factors)
def test_no_factors_beat_the_speed_of_light(name: str, launch: float, bandwidth: float, compute: float) -> None:
    device = carried(lent(name).device, launch=launch, bandwidth=bandwidth, compute=compute)
    seconds, bounds = times(device, name)
    assert np.all(seconds >= bounds * (1 - 1e-12))


@settings(max_examples=40, deadline=None)
@given(factors, factors, factors, st.sampled_from(["launch", "bandwidth", "compute"]), st.floats(1.0, 3.0))
def test_more_of_any_factor_is_never_faster(
    launch: float, bandwidth: float, compute: float, which: str, more: float
) -> None:
    name = "mi300x-192gb"
    before = {"launch": launch, "bandwidth": bandwidth, "compute": compute}
    after = {**before, which: before[which] / more if which == "compute" else before[which] * more}
    first, second = (times(carried(lent(name).device, **each), name)[0] for each in (before, after))
    assert np.all(second >= first * (1 - 1e-12))


def test_factors_of_one_change_nothing_but_the_source() -> None:
    own = lent("mi300x-192gb").device
    same = carried(own, launch=1.0, bandwidth=1.0, compute=1.0)
    assert same.model_copy(update={"curves": same.curves.model_copy(update={"source": own.curves.source})}) == own
    assert same.curves.source.startswith(own.curves.source)


def test_the_law_reaches_its_devices_and_no_others() -> None:
    found = find_calibration(accelerator="mi300x-192gb", engine="sglang").device
    curve, before = found.curves.moe["fp8_block"], lent("mi300x-192gb").device.curves.moe["fp8_block"]
    assert curve.launch == before.launch * LAW.launch.value
    assert curve.bandwidth == before.bandwidth / LAW.bandwidth.value
    assert curve.compute == pytest.approx(before.compute * 0.514 / 0.803)
    assert found.collective_hop == lent("mi300x-192gb").device.collective_hop * LAW.launch.value
    assert found.collective_bandwidth == lent("mi300x-192gb").device.collective_bandwidth  # of links
    for other in ("gaudi3-128gb", "mi250x-128gb", "h800-80gb-sxm", "h100-80gb-sxm"):
        assert find_calibration(accelerator=other, engine="sglang").device == lent(other).device


def test_a_version_that_was_seen_has_its_own_fixed_times() -> None:
    def launch(version: str | None, engine: str = "sglang") -> float:
        found = find_calibration(accelerator="mi300x-192gb", engine=engine, version=version).device.curves
        before = load_calibration(COEFFICIENTS, accelerator="mi300x-192gb", engine=engine, foreign=False).device.curves
        return found.moe["fp8_block"].launch / before.moe["fp8_block"].launch

    seen = {each.engine_version: each.launch for each in LAW.versions.values() if each.engine_version}
    assert len(seen) == 2
    for version, factor in seen.items():
        assert launch(version) == launch(f"v{version}-rocm700-mi30x") == pytest.approx(factor)
    for other in (None, "0.5.10", "0.5.1", "1.0"):
        assert launch(other) == pytest.approx(LAW.launch.value)
    assert launch("0.5.9", engine="vllm") == pytest.approx(LAW.launch.value)


def test_bands_widen_with_what_was_not_measured() -> None:
    def spread(accelerator: str, engine: str = "sglang", version: str | None = None) -> float:
        found = find_calibration(accelerator=accelerator, engine=engine, version=version).uncertainty
        assert found is not None
        return found.deployment.sigma

    assert spread("mi300x-192gb") == pytest.approx(LAW.discrepancy)
    assert spread("h100-80gb-sxm") < spread("mi300x-192gb") < spread("mi355x-288gb") < spread("gaudi3-128gb")
    assert spread("mi300x-192gb", "vllm") > spread("mi300x-192gb")
    assert spread("h100-80gb-sxm") <= spread("mi300x-192gb", version="0.5.9") < spread("mi300x-192gb")


def test_the_file_says_what_it_was_fitted_to() -> None:
    stack = Stacks.model_validate(load_yaml(FILE)).stacks["rocm"]
    assert LAW.lender == stack.lender.name
    assert {name: device.compute for name, device in LAW.devices.items()} == pytest.approx(
        {device.name: stack.compute(device.name) for device in stack.devices}, abs=1e-4
    )
    assert len(LAW.sha256) == 64
    assert [len(row) for row in LAW.covariance] == [1, 2]
    assert LAW.covariance[1][1] == pytest.approx(LAW.bandwidth.stderr**2, rel=0.02)
    logarithms = np.log([version.launch for version in LAW.versions.values()])
    assert np.log(LAW.launch.value) == pytest.approx(logarithms.mean(), abs=1e-3)
    assert pytest.approx(logarithms.std(ddof=1), abs=1e-3) == LAW.between
    assert LAW.left_out["lengths_own_version"].mean < LAW.left_out["version"].mean
    assert LAW.range["isl"] == (1024, 1024)


def edited(folder: Path, old: str, new: str) -> Path:
    shutil.copytree(CALIBRATION, folder)
    text = (folder / FOREIGN).read_text(encoding="utf-8")
    assert old in text
    (folder / FOREIGN).write_text(text.replace(old, new), encoding="utf-8")
    return folder / COEFFICIENTS.name


def test_the_hash_of_a_scenario_covers_the_law(tmp_path: Path) -> None:
    path = edited(tmp_path / "calibration", f"launch: {{value: {LAW.launch.value:.4f}", "launch: {value: 1.9")
    other = load_calibration(path, accelerator="mi300x-192gb", engine="sglang")
    scenario = load_scenario(None, overrides=["hardware=mi300x-8x", "engine=sglang"])
    assert scenario.model_copy(update={"calibration": other}).hash != scenario.hash


def test_a_law_that_is_none_is_refused(tmp_path: Path) -> None:
    path = edited(tmp_path / "calibration", "    bandwidth: {value:", "    bandwith: {value:")
    with pytest.raises(InputError, match="bandwith"):
        load_calibration(path, accelerator="mi300x-192gb", engine="sglang")


def made_up(
    launch: list[float], bandwidth: float, *, noise: float = 0.0, kept_out: float = 0.0
) -> tuple[Sweep, Surface]:
    """Runs of three versions whose time is a fixed part and a streamed one, in other shares for each question."""
    share = np.array([0.2, 0.4, 0.7, 0.3, 0.6])
    grid = np.log(share[:, None, None] * np.array(LAUNCHES)[None, :, None]
                  + (1 - share)[:, None, None] * np.array(BANDWIDTHS)[None, None, :])  # fmt: skip
    asked, version = (each.ravel() for each in np.meshgrid(np.arange(5), np.arange(3)))
    rng = np.random.default_rng(3)
    measured = np.log(share[asked] * np.array(launch)[version] + (1 - share[asked]) * bandwidth)
    fitted = asked != 4
    measured = measured + noise * rng.standard_normal(len(asked)) + np.where(fitted, 0.0, kept_out)
    shape = np.array(["1/1", "1/1", "1/8", "1/8", "8/1"])[asked]
    return Sweep((), (), measured, asked, version, shape, fitted, ()), Surface(grid)


def test_the_fit_finds_what_made_the_runs() -> None:
    sweep, at = made_up([1.2, 2.0, 3.0], 1.5)
    found = fit(sweep, at)
    assert np.exp(found.law.bandwidth) == pytest.approx(1.5, rel=0.01)
    np.testing.assert_allclose(np.exp(found.law.versions), [1.2, 2.0, 3.0], rtol=0.02)
    assert np.exp(found.law.launch) == pytest.approx(7.2 ** (1 / 3), rel=0.02)
    assert np.nanmax(np.abs(found.errors["kept_out_own_version"])) < 0.01
    assert rms(sweep, found.errors["version"]) > 0.1 > np.nanmax(np.abs(found.errors["lengths_own_version"]))


def test_rows_that_are_kept_out_move_nothing() -> None:
    sweep, at = made_up([1.2, 2.0, 3.0], 1.5, noise=0.02)
    other, _ = made_up([1.2, 2.0, 3.0], 1.5, noise=0.02, kept_out=0.5)
    first, second = fit(sweep, at), fit(other, at)
    assert first.law.bandwidth == second.law.bandwidth
    np.testing.assert_array_equal(first.law.versions, second.law.versions)
    np.testing.assert_array_equal(first.covariance, second.covariance)
    moved = second.errors["kept_out"] - first.errors["kept_out"]
    np.testing.assert_allclose(moved[~other.fitted], -0.5)


def test_a_version_that_is_not_known_gets_the_mean_of_all() -> None:
    sweep, at = made_up([1.2, 2.0, 3.0], 1.5)
    law = fit(sweep, at).law
    unknown = missed(sweep, at, law)
    own = missed(sweep, at, law, own=True)
    assert np.all(unknown[sweep.version == 0] > own[sweep.version == 0])
    assert np.all(unknown[sweep.version == 2] < own[sweep.version == 2])


def test_results_say_how_curves_were_carried() -> None:
    scenario = load_scenario(None, overrides=["hardware=mi300x-8x", "engine=sglang", "workload.num_requests=20"])
    text = next(text for text in simulate(scenario).warnings if "stand in" in text)
    assert f"those of h100-80gb-sxm, fixed times x {LAW.launch.value:.2f}, bandwidth / " in text


def test_the_law_is_one_of_its_lender_only() -> None:
    laws = load_foreign(CALIBRATION)
    assert isinstance(laws.law("mi300x-192gb", lender="h100-80gb-sxm"), StackLaw)
    assert laws.law("mi300x-192gb", lender="b200-180gb-sxm") is None
    assert load_foreign(CALIBRATION / "operators").stacks == {}
