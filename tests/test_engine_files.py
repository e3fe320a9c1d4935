"""Overheads fitted to runs: the fit finds what made the runs, and files of it replace a profile's own values."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from perfsim.errors import InputError
from perfsim.spec.calibration_file import load_calibration
from perfsim.spec.engines_file import ENGINES_FOLDER, EngineFile
from perfsim.spec.load import find_calibration
from perfsim.spec.problems import validated
from perfsim.spec.yaml import load_yaml
from validation.compare.table import Table
from validation.engines.fit import Linear, fit
from validation.engines.runs import Runs

CALIBRATION = Path(__file__).resolve().parents[1] / "hardware" / "calibration"
FILES = sorted((CALIBRATION / ENGINES_FOLDER).glob("*.yaml"))


def runs_of(truth: np.ndarray, *, noise: float, outliers: int) -> tuple[Runs, Linear]:
    """Runs of four models whose time per token follows two overheads, seen from other values of them."""
    rng = np.random.default_rng(5)
    count = 80
    slope = np.stack([np.ones(count), rng.uniform(0.0, 0.05, count)], axis=1)
    start = np.array([0.0, 60.0])
    base = rng.uniform(5.0, 30.0, count) + slope @ start
    measured = (base + slope @ (truth - start)) * np.exp(noise * rng.standard_normal(count))
    measured[:outliers] *= 3.0
    engine, metric = np.full(count, "vllm"), np.full(count, "tpot")
    group = np.array([f"model {index % 4}" for index in range(count)])
    runs = Runs(Table(Path("none"), None), [], measured, engine, group, metric, {}, {})
    names = (("vllm", "step_host"), ("vllm", "sampling_passes"))
    return runs, Linear(names, start, np.array([0.1, 20.0]), base, slope, np.full(count, True))


def test_the_fit_finds_what_made_the_runs() -> None:
    truth = np.array([0.8, 100.0])
    found = fit(*runs_of(truth, noise=0.0, outliers=0))
    np.testing.assert_allclose(found.values, truth, rtol=1e-3)
    assert np.abs(found.errors).max() < 1e-3 > np.abs(found.left_out).max()


def test_few_odd_runs_do_not_bend_it_and_its_errors_cover_the_truth() -> None:
    truth = np.array([0.8, 100.0])
    found = fit(*runs_of(truth, noise=0.02, outliers=4))
    spread = np.sqrt(np.diag(found.covariance))
    assert np.all(np.abs(found.values - truth) < 4 * spread)
    assert np.median(np.abs(found.left_out)) < 0.03


def test_no_overhead_is_negative() -> None:
    found = fit(*runs_of(np.array([-0.5, 20.0]), noise=0.0, outliers=0))
    assert found.values[0] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_say_what_they_were_fitted_to(path: Path) -> None:
    content = validated(EngineFile, load_yaml(path), where=str(path))
    assert content.engine == path.stem
    assert len(content.sha256) == 64
    assert [len(row) for row in content.covariance] == list(range(1, len(content.coefficients) + 1))
    profile = find_calibration(accelerator="h100-80gb-sxm", engine=path.stem).engine
    for name, fitted in content.coefficients.items():
        assert getattr(profile, name) == fitted.value


def test_a_coefficient_that_no_profile_has_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "calibration"
    shutil.copytree(CALIBRATION, folder)
    broken = FILES[0].read_text(encoding="utf-8").replace("step_host:", "step_hosts:")
    (folder / ENGINES_FOLDER / FILES[0].name).write_text(broken, encoding="utf-8")
    with pytest.raises(InputError, match=r"step_hosts.*step_host"):
        load_calibration(folder / "first-guess.yaml", accelerator="h100-80gb-sxm", engine=FILES[0].stem)
