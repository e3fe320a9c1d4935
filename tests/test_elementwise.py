"""Elementwise kernels of layers: what is counted, which half is fitted, what the packaged coefficients may say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from perfsim.calibrate.elementwise import BOUNDS, SHAPE, entries, errors_of, fit_kernels, main
from perfsim.calibrate.elementwise_rows import (
    LAYERS,
    LINEAR,
    OLD_LAYERS,
    Kernel,
    held_out_half,
    kernel_of,
    kernel_rows,
    linear_arch,
)
from perfsim.calibrate.rows import Array, Rows
from perfsim.spec import catalog
from perfsim.spec.elementwise_file import FittedKernel, load_elementwise
from validation.compare.cli import compare
from validation.ops.predict import CALIBRATION

PACKAGED = [
    pytest.param(device, kernel, id=f"{backend} {device} {family}")
    for backend, devices in load_elementwise(CALIBRATION).backends.items()
    for device, families in devices.items()
    for family, kernel in families.items()
]
TOKENS = np.unique(np.geomspace(1, 32768, 60).round())


def made(device: str, *, launch: float, bandwidth: float, gain: float, share: float, family: str = "norm") -> Rows:
    """Rows of three widths that follow the formula exactly."""
    parts = []
    for width in (8192.0, 32768.0, 86016.0):
        kernel = Kernel("vllm", family, width / 2, width / 2)
        rows = kernel_rows(device, kernel, LAYERS, TOKENS, np.ones(len(TOKENS)))
        values = {"launch": launch, "bandwidth": bandwidth, "gain": gain, "share": share}
        seconds = SHAPE.seconds(values, rows, catalog.accelerator(device))
        parts.append(kernel_rows(device, kernel, LAYERS, TOKENS, seconds))
    columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns}
    return Rows(device, "vllm", "1", "stream", family, LAYERS, columns, np.concatenate([p.seconds for p in parts]),
                np.concatenate([p.shape for p in parts]))  # fmt: skip


def seconds_of(kernel: FittedKernel, device: str, moved: Array) -> Array:
    rows = kernel_rows(device, Kernel("vllm", "norm", 1.0, 0.0), LAYERS, moved, np.ones(len(moved)))
    values = {"launch": kernel.curve.launch, "bandwidth": kernel.curve.bandwidth, **kernel.conditions}
    return SHAPE.seconds(values, rows, catalog.accelerator(device))


def test_a_fit_finds_what_made_the_rows() -> None:
    truth = {"launch": 3e-6, "bandwidth": 0.6, "gain": 1.5, "share": 0.7}
    rows = made("a100-80gb-sxm", **truth)
    fitted = fit_kernels([rows])
    assert fitted.values == pytest.approx(truth, rel=1e-3)
    assert np.abs(errors_of(fitted, rows.where(held_out_half(rows)))).max() < 1e-3
    assert set(fitted.rows.shape).isdisjoint(rows.where(held_out_half(rows)).shape)


def test_what_lies_at_a_bound_has_no_error() -> None:
    fitted = fit_kernels([made("a100-80gb-sxm", launch=3e-6, bandwidth=1.0, gain=1.5, share=0.7)])
    assert fitted.form.fixed["bandwidth"] == 1.0
    assert set(fitted.values) == {"launch", "gain", "share"}
    assert fitted.covariance.shape == (3, 3)


def test_a_device_that_is_left_out_is_predicted_by_the_others_and_its_datasheet() -> None:
    truth = {"launch": 3e-6, "bandwidth": 0.6, "gain": 1.5, "share": 0.7}
    first, second = entries([made("a100-80gb-sxm", **truth), made("h100-80gb-sxm", **{**truth, "launch": 6e-6})])
    assert (first.others, second.others) == (("h100-80gb-sxm",), ("a100-80gb-sxm",))
    # Launches are not on a datasheet: small kernels come out half or twice as long, large ones right.
    assert first.left_out.max() == pytest.approx(1.0, rel=0.15)
    assert second.left_out.min() == pytest.approx(-0.5, rel=0.15)
    assert np.median(np.abs(first.missed)) < 1e-3
    # Every width follows the same formula here, so that the other two tell it.
    assert len(first.width_left_out) == 3 * len(TOKENS)
    assert np.abs(first.width_left_out).max() < 1e-2


def test_copies_of_a_row_are_in_the_same_half_and_halves_are_halves() -> None:
    rows = made("a100-80gb-sxm", launch=3e-6, bandwidth=0.6, gain=1.5, share=0.7)
    out = held_out_half(rows)
    assert 0.35 < out.mean() < 0.65
    twice = rows.where(np.concatenate([np.arange(len(rows)), np.arange(len(rows))[::-1]]))
    assert (held_out_half(twice) == np.concatenate([out, out[::-1]])).all()
    assert (held_out_half(rows.where(out)) == np.ones(out.sum(), dtype=bool)).all()


def test_bytes_are_those_of_the_kernel_that_was_timed() -> None:
    llama, mixtral = catalog.model("llama-3.1-8b-instruct"), catalog.model("mistralai/Mixtral-8x7B-v0.1")
    hidden, width, act = 4096, 14336, 2

    def moved(table: str, op: str, *, arch: object = llama, tp: int = 1) -> Kernel:
        kernel = kernel_of(table, op, arch, tp)  # type: ignore[arg-type]
        assert kernel is not None
        return kernel

    assert moved(LAYERS, "layernorm").width == 4 * hidden * act  # with the residual
    assert moved(OLD_LAYERS, "input_layernorm").width == 2 * hidden * act
    assert moved(LAYERS, "act_fn", tp=2).width == 3 * width / 2 * act
    assert moved(OLD_LAYERS, "act_fn", arch=mixtral, tp=4).width == 3 * width * act  # an expert is whole
    assert moved(LAYERS, "rotary_emb", tp=2).width == 2 * (16 + 4) * 128 * act
    assert moved(LAYERS, "sampler").width == 128256 * 4
    assert kernel_of(LAYERS, "qkv_proj", llama, 1) is None
    assert kernel_of(LAYERS, "moe", mixtral, 1) is None
    phi = linear_arch(heads=32, kv_heads=32, hidden=2560, width=10240, vocab=51200, gated=False)
    same = moved(LINEAR, "input_layernorm", arch=phi)
    assert (same.backend, same.family, same.width) == ("pytorch", "layer_norm", 2 * 2560 * act)
    assert moved(LINEAR, "mlp_act", arch=phi).width == 2 * 10240 * act


@pytest.mark.parametrize(("device", "kernel"), PACKAGED)
def test_packaged_coefficients(device: str, kernel: FittedKernel) -> None:
    coefficients = {"launch": kernel.curve.launch, "bandwidth": kernel.curve.bandwidth, **kernel.conditions}
    assert set(kernel.stderr) <= set(BOUNDS)
    assert [len(row) for row in kernel.covariance] == list(range(1, len(kernel.stderr) + 1))
    for name, (_, low, high) in BOUNDS.items():
        assert low * 0.999 <= coefficients[name] <= high * 1.001
        if name in kernel.stderr:
            assert kernel.stderr[name] > 0
    assert len(kernel.sha256) == 64
    # Rows that were not fitted are predicted; a third of all shapes is the least that a half may be of a few dozen.
    assert kernel.held_out_rows > 0.3 * kernel.rows
    assert kernel.median < 0.12


@pytest.mark.parametrize(("device", "kernel"), PACKAGED)
def test_more_bytes_take_longer_without_a_step_and_no_cache_beats_light(device: str, kernel: FittedKernel) -> None:
    chip, moved = catalog.accelerator(device), np.geomspace(1e2, 1e12, 4000)
    seconds = seconds_of(kernel, device, moved)
    assert (np.diff(seconds) > 0).all()
    assert (seconds[1:] / seconds[:-1] < 1.04).all()  # each size is 0.6% above the one before
    light = moved / chip.memory.read_bandwidth
    beyond = moved > 20 * (chip.l2_bytes or 0.0)
    assert (seconds[beyond] >= light[beyond] * (1 - 1e-4)).all()
    assert (seconds >= light / (1 + BOUNDS["gain"][2])).all()


def test_the_comparison_tells_fitted_shapes_from_others(tmp_path: Path) -> None:
    base = {"hardware": "RTXPRO6000", "model": "Qwen/Qwen3-32B", "tp": 1, "size_meaning": "tokens",
            "activated_experts": None}  # fmt: skip
    rows = [{**base, "op": op, "size": size, "time_us": 20.0} for op in ("layernorm", "act_fn", "o_proj")
            for size in range(8, 1024, 24)]  # fmt: skip
    path = tmp_path / "layers.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    found = compare(path)["metrics"]
    halves = [found[f"time_us, {half}"]["n"] for half in ("fitted half", "kept-out half")]
    assert found["time_us"]["n"] == len(rows)
    assert sum(halves) == len(rows) * 2 // 3
    assert min(halves) > len(rows) // 5


def test_missing_tables_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(tmp_path), "--output", str(tmp_path / "x.yaml")]) == 2
    assert capsys.readouterr().err == f"{tmp_path / LAYERS}.parquet: no such table\n"
    assert not (tmp_path / "x.yaml").exists()
