"""Fitted curves as they are packaged: complete provenance, sensible fallbacks, and errors that the slice confirms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from perfsim.cost.roofline import coefficients
from perfsim.ops.op import Op
from perfsim.spec import catalog
from perfsim.spec.curves import NETWORK
from perfsim.spec.load import find_calibration
from perfsim.spec.operators_file import BackendCurves, OperatorsFile
from perfsim.spec.problems import validated
from perfsim.spec.yaml import load_yaml
from validation.ops.predict import compare
from validation.ops.slice import KINDS, slice_rows

FOLDER = Path(__file__).resolve().parents[1] / "hardware" / "calibration" / "operators"
FILES = sorted(FOLDER.rglob("*.yaml"))
COMPARED = [(rows, compare(rows)) for rows in slice_rows()]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_curve_says_what_it_was_fitted_to(path: Path) -> None:
    content = validated(OperatorsFile, load_yaml(path), where=str(path))
    assert content.device == path.stem in catalog.list_accelerators()
    assert content.default_backend in content.backends
    older = [curves for versions in content.versions.values() for curves in versions.values()]
    for backend in [*content.backends.values(), *older]:
        for kind in BackendCurves.model_fields:
            for fitted in getattr(backend, kind).values():
                assert len(fitted.sha256) == 64
                assert set(fitted.stderr) <= set(type(fitted.curve).model_fields)
                assert [len(row) for row in fitted.covariance] == list(range(1, len(fitted.stderr) + 1))
                assert all(low <= high for low, high in fitted.range.values())
                assert 0 < fitted.median <= 0.25
                assert not set(fitted.conditions) & set(type(fitted.curve).model_fields)


def test_engines_and_devices_without_rows_borrow_and_say_so() -> None:
    own = find_calibration(accelerator="h100-80gb-sxm", engine="vllm").device.curves
    assert own.source.startswith("vllm ")
    assert own.source.endswith(" kernels on h100-80gb-sxm")
    other = find_calibration(accelerator="h100-80gb-sxm", engine="trtllm").device.curves
    assert other.source.startswith("trtllm ")
    assert other.gemm["bf16"] != own.gemm["bf16"]
    assert other.collective["all_gather"] == own.collective["all_gather"]  # NCCL's, whatever the engine
    assert other.collective["custom_all_reduce"] != own.collective["custom_all_reduce"]
    borrowed = find_calibration(accelerator="h800-80gb-sxm", engine="vllm").device.curves
    assert (borrowed.gemm, borrowed.source) == (own.gemm, own.source)
    assert set(borrowed.collective) <= {NETWORK}  # links inside a node are the node's
    assert all(borrowed.discrepancy[kind] >= spread for kind, spread in own.discrepancy.items() if kind != "collective")
    assert borrowed.discrepancy["prefill"] > own.discrepancy["prefill"]
    assert find_calibration(accelerator="gb200-186gb", engine="vllm").device.curves.source.endswith("gb200-186gb")


def test_elementwise_kernels_take_a_measured_launch_and_bandwidth() -> None:
    own = find_calibration(accelerator="h100-80gb-sxm", engine="vllm").device
    curve = own.curves.stream["quantise"]
    op = Op("elementwise", "norm", 1, 0.0, 1e6, 1e6, "fp32")
    assert coefficients(op, own) == (curve.launch, 1.0, curve.bandwidth)
    guessed = find_calibration(accelerator="a100-80gb-sxm", engine="vllm").device
    assert coefficients(op, guessed) == (guessed.elementwise_launch, 1.0, guessed.elementwise_bandwidth)


@pytest.mark.parametrize("kind", KINDS)
def test_the_slice_confirms_the_errors_on_rows_that_were_not_fitted(kind: str) -> None:
    errors = [found.errors[found.held_out] for rows, found in COMPARED if rows.kind == kind and found is not None]
    assert len(errors) >= 7
    assert np.median(np.abs(np.concatenate(errors))) < 0.1


def test_curves_are_not_far_from_any_device() -> None:
    for rows, found in COMPARED:
        if found is not None:
            assert np.median(np.abs(found.errors)) < 0.4, (rows.device, rows.backend, rows.kind, rows.format)
