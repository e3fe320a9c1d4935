"""Kernels of older engine versions: which version stands for another, how a curve is moved, and what scenarios get."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from perfsim.calibrate import layer_rows, version_file
from perfsim.calibrate.rows import Rows, named
from perfsim.calibrate.versions import COLD, moved, one_shape_left_out, prior_errors
from perfsim.errors import InputError
from perfsim.spec.catalog import accelerator
from perfsim.spec.engine_version import age, standing_for
from perfsim.spec.load import find_calibration, load_scenario
from perfsim.spec.operators_file import FittedGemm, OperatorsFile
from perfsim.spec.problems import validated
from perfsim.spec.save import scenario_yaml
from perfsim.spec.yaml import load_yaml

CARD = "rtx-pro-6000-blackwell-96gb"
FOLDER = Path(__file__).resolve().parents[1] / "hardware" / "calibration" / "operators"
FILE = validated(OperatorsFile, load_yaml(FOLDER / f"{CARD}.yaml"), where=CARD)
PRIOR, OLDER = FILE.backends["vllm"].gemm["bf16"], FILE.versions["vllm"]["0.19.0"].gemm["bf16"]

versions = st.lists(st.integers(0, 30), min_size=1, max_size=3).map(lambda numbers: ".".join(map(str, numbers)))
several = st.lists(versions, min_size=1, max_size=6, unique_by=age)


@given(versions, versions, several, st.randoms())
def test_the_newest_that_is_not_newer_stands_for_a_version(first, second, known, random) -> None:
    found = standing_for(first, known)
    older = [version for version in known if age(version) <= age(first)]
    assert found in known
    assert found == (max(older, key=age) if older else min(known, key=age))
    assert standing_for(None, known) == max(known, key=age)
    shuffled = list(known)
    random.shuffle(shuffled)
    assert standing_for(first, shuffled) == found
    low, high = sorted((first, second), key=age)
    assert age(standing_for(low, known)) <= age(standing_for(high, known))
    assert all(standing_for(version, known) == version for version in known)


def test_versions_are_compared_number_by_number() -> None:
    assert age("0.5.9") < age("0.5.14") < age("v1.0") == age("1.0.0") == age("1") < age("1.3.0rc20")
    assert age("1.3.0rc20") == age("1.3.0+cu130") == age("1.3")


@pytest.mark.parametrize("version", ["0.12.0", "0.19", "0.19.0", "v0.19.1", "0.23.9+cu130"])
def test_a_scenario_gets_the_kernels_of_its_engines_version(version: str) -> None:
    newest = find_calibration(accelerator=CARD, engine="vllm").device.curves
    found = find_calibration(accelerator=CARD, engine="vllm", version=version).device.curves
    assert found.gemm == {**newest.gemm, "bf16": OLDER.curve}
    assert newest.gemm["bf16"] == PRIOR.curve
    assert (found.decode, found.prefill, found.mixed, found.collective) == (
        newest.decode, newest.prefill, newest.mixed, newest.collective,
    )  # fmt: skip


@pytest.mark.parametrize("version", ["0.24.0", "0.24", "0.30.1", "1.0"])
def test_without_a_version_or_with_a_newer_one_kernels_are_the_newest(version: str) -> None:
    newest = find_calibration(accelerator=CARD, engine="vllm").device
    assert find_calibration(accelerator=CARD, engine="vllm", version=version).device == newest


@pytest.mark.parametrize(("device", "engine"), [("rtx-4090-24gb", "vllm"), ("h100-80gb-sxm", "vllm"), (CARD, "trtllm")])
def test_where_one_version_was_timed_it_stands_for_all(device: str, engine: str) -> None:
    newest = find_calibration(accelerator=device, engine=engine).device
    assert find_calibration(accelerator=device, engine=engine, version="0.19.0").device == newest


def test_another_engines_version_does_not_choose_among_vllms_kernels() -> None:
    found = find_calibration(accelerator=CARD, engine="sglang", version="0.5.9").device.curves
    assert found.gemm == find_calibration(accelerator=CARD, engine="sglang").device.curves.gemm


def test_a_saved_scenario_keeps_its_version_and_a_new_engine_forgets_it(tmp_path: Path) -> None:
    plain = load_scenario("default", hardware=CARD)
    scenario = load_scenario("default", hardware=CARD, overrides=["engine_version=0.19.0"])
    assert scenario.hash != plain.hash
    saved = tmp_path / "scenario.yaml"
    saved.write_text(scenario_yaml(scenario, directory=tmp_path))
    assert "engine_version: 0.19.0" in saved.read_text()
    assert "calibration:" not in saved.read_text()
    assert load_scenario(saved) == scenario
    assert scenario.replace(seed=7).calibration == scenario.calibration
    assert load_scenario(saved, overrides=["engine_version=0.24.0"]).calibration.device == plain.calibration.device
    assert load_scenario(saved, engine="trtllm").calibration.engine_version is None


def test_groups_follow_the_scenarios_version_or_have_their_own(tmp_path: Path) -> None:
    groups = "deployment.groups=[{name: a, count: 1}, {name: b, count: 1, engine_version: 0.24.0}, "
    groups += f"{{name: c, count: 1, hardware: {CARD}}}]"
    scenario = load_scenario("default", hardware=CARD, overrides=["engine_version=0.19.0", groups])
    curves = [group.calibration.device.curves.gemm["bf16"] for group in scenario.deployment.groups if group.calibration]
    assert curves == [OLDER.curve, PRIOR.curve, OLDER.curve]
    saved = tmp_path / "scenario.yaml"
    saved.write_text(scenario_yaml(scenario, directory=tmp_path))
    assert "calibration:" not in saved.read_text()
    assert load_scenario(saved) == scenario


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ({"vlm": {"0.19.0": {}}}, "versions of 'vlm', which is no backend of this file"),
        ({"vllm": {"0.18.0": {"gemm": {"bf16": OLDER.model_dump()}}}}, "0.18.0 holds a curve of another version"),
        ({"vllm": {"old": {}}}, "expected a version such as '0.19.0', got 'old'"),
    ],
)
def test_malformed_versions_of_a_file_are_one_line(versions: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        validated(OperatorsFile, {**FILE.model_dump(), "versions": versions}, where="file.yaml")
    assert "\n" not in str(caught.value)


def test_the_packaged_curve_beats_its_prior_on_shapes_left_out() -> None:
    assert OLDER.prior is not None
    assert (OLDER.prior.version, OLDER.prior.sha256) == (PRIOR.version, PRIOR.sha256)
    assert OLDER.median < 0.8 * OLDER.prior.median
    assert OLDER.p90 < 0.9 * OLDER.prior.p90


def products(changes: dict[str, float]) -> Rows:
    """Rows of six shapes on the prior's curve with some coefficients changed."""
    sizes = [1.0, 8.0, 32.0, 96.0, 200.0, 400.0, 1000.0, 2000.0]
    shapes = [(4096.0, 4096.0), (6144.0, 4096.0), (28672.0, 4096.0), (4096.0, 14336.0), (10240.0, 5120.0),
              (128256.0, 4096.0)]  # fmt: skip
    m, n, k = (np.array(column) for column in zip(*((size, *shape) for shape in shapes for size in sizes), strict=True))
    rows = Rows(CARD, "vllm", "0.19.0", "gemm", "bf16", "t", {"m": m, "n": n, "k": k}, np.ones(len(m)), named(n, k))
    changed = PRIOR.model_copy(update={"curve": PRIOR.curve.model_copy(update=changes)})
    seconds = 1.0 + prior_errors(rows, changed, accelerator(CARD))
    return Rows(**{**rows.__dict__, "seconds": seconds})


def test_a_curve_is_moved_to_the_rows_that_it_made() -> None:
    chip = accelerator(CARD)
    rows = products({"bandwidth": 0.75, "launch": 3e-6, "edge": 40.0})
    before = np.abs(prior_errors(rows, PRIOR, chip))
    found = moved(rows, PRIOR, chip)
    assert np.median(before) > 0.08
    assert np.median(np.abs(found.seconds(rows, chip) / rows.seconds - 1.0)) < 0.01
    assert found.values["bandwidth"] == pytest.approx(0.75, rel=0.03)
    assert np.median(np.abs(one_shape_left_out(rows, PRIOR, chip))) < 0.02
    assert (np.linalg.eigvalsh(found.covariance) > -1e-9).all()


def test_rows_of_the_prior_leave_it_where_it_is_and_a_sure_prior_does_not_move() -> None:
    chip = accelerator(CARD)
    same = moved(products({}), PRIOR, chip)
    other = moved(products({"bandwidth": 0.7}), PRIOR, chip)
    assert np.allclose(same.seconds(products({}), chip), products({}).seconds, rtol=2e-3)
    sure = PRIOR.model_copy(update={"covariance": tuple(tuple(0.0 for _ in row) for row in PRIOR.covariance)})
    held = moved(products({"bandwidth": 0.7}), sure, chip, between=1e-6)
    assert held.values["bandwidth"] == pytest.approx(PRIOR.curve.bandwidth, rel=1e-4)
    assert other.values["bandwidth"] < 0.75


def test_one_row_moves_a_curve_less_than_many() -> None:
    chip, rows = accelerator(CARD), products({"bandwidth": 0.7})
    large = np.flatnonzero(rows.columns["n"] > 1e5)
    one, many = moved(rows.where(large[:1]), PRIOR, chip), moved(rows, PRIOR, chip)
    assert PRIOR.curve.bandwidth > one.values["bandwidth"] > many.values["bandwidth"]
    assert one.stderr["bandwidth"] > many.stderr["bandwidth"]


def table(folder: Path, **changes: object) -> None:
    """A profiler's table: the head of Llama-3.1-8B, a product, and products of a layer that the L2 cache holds."""
    llama, small = "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-30B-A3B-Instruct-2507"
    rows = [(llama, "lm_head", 1, 700.0), (llama, "lm_head", 2, 5.0), (llama, "qkv_proj", 16, 36.0),
            (llama, "act_fn", 16, 3.0), (small, "qkv_proj", 16, 15.0)]  # fmt: skip
    content = [{"hardware": hardware, "model": model, "tp": 1, "op": op, "size": size, "time_us": time, **changes}
               for hardware in ("RTXPRO6000", "RTX4090") for model, op, size, time in rows]  # fmt: skip
    parquet.write_table(pa.Table.from_pylist(content), folder / "llmservingsim_layers.parquet")


def test_rows_that_the_cache_served_are_left_out(tmp_path: Path) -> None:
    table(tmp_path)
    rows = next(layer_rows.product_rows(tmp_path))
    found = {name: list(values) for name, values in rows.columns.items()}
    # Not the head that took less time than its bytes from HBM, nor the layer of 38 MB.
    assert found == {"m": [1.0, 16.0], "n": [128256.0, 6144.0], "k": [4096.0, 4096.0]}
    assert list(rows.seconds) == pytest.approx([700e-6, 36e-6])


def test_bad_tables_end_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert version_file.main(["--data", str(tmp_path)]) == 2
    assert "no such table" in capsys.readouterr().err
    table(tmp_path, hardware="GPU")
    with pytest.raises(InputError, match="no products of RTXPRO6000"):
        next(layer_rows.product_rows(tmp_path))


def test_the_section_replaces_itself() -> None:
    text = "# head\ndevice: x\nbackends:\n  vllm:\n    gemm: {}\n"
    once = version_file.with_section(text, ["versions:", "  vllm: {}"])
    assert once.startswith("# head\n# versions:")
    assert once.endswith("    gemm: {}\nversions:\n  vllm: {}\n")
    assert version_file.with_section(once, ["versions:", "  vllm: {}"]) == once


def test_the_moved_curve_keeps_what_is_not_fitted() -> None:
    assert isinstance(OLDER, FittedGemm)
    assert OLDER.curve.tallest == PRIOR.curve.tallest
    assert set(OLDER.stderr) == set(PRIOR.stderr)
    assert not set(COLD) & set(OLDER.conditions)
