"""What the curves in hardware/calibration/operators say about measured rows, under the conditions of the benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from perfsim.calibrate.forms import fit_range, form, resident
from perfsim.calibrate.links import families_of
from perfsim.calibrate.rows import Array, Kind, Rows
from perfsim.spec.catalog import accelerator
from perfsim.spec.load import find_calibration
from perfsim.spec.operators_file import FOLDER, CurveFit, OperatorsFile
from perfsim.spec.problems import validated
from perfsim.spec.yaml import load_yaml

CALIBRATION = Path(__file__).resolve().parents[2] / "hardware" / "calibration"
COLD = 1.5  # times the L2 cache: nothing of the last repetition is left in it
# Whose benchmark resembles a device's most, where it is not the device whose curves it borrows: eager launches waited
# for the CPU, which is the same Grace in both superchips (facts of hardware/accelerators; B200s stand beside x86).
SAME_HOST = {"gb300-288gb": "gb200-186gb"}


@dataclass(frozen=True)
class Compared:
    """Rows in the range of a curve with their signed relative errors; `held_out` were not fitted."""

    rows: Rows
    errors: Array
    held_out: np.ndarray
    cold: np.ndarray


@cache
def fitted_file(device: str) -> OperatorsFile | None:
    """The curves of a device; None where it has none."""
    path = CALIBRATION / FOLDER / f"{device}.yaml"
    return validated(OperatorsFile, load_yaml(path), where=str(path)) if path.is_file() else None


def coefficients(rows: Rows) -> dict[str, float] | None:
    """What describes a group of rows: a curve and the conditions it was measured under, or one curve per family."""
    file = fitted_file(rows.device)
    backend = file.backends.get(rows.backend) if file else None
    if backend is None:
        return None
    if rows.kind == "collective":
        nccl = file.backends["nccl"].collective if file and "nccl" in file.backends else {}
        known = {**nccl, **backend.collective}  # engines run NCCL's kernels beside their own
        families = {name: known[name] for name in families_of(rows) if name in known}
        return {f"{name}.{key}": value for name, fit in families.items() for key, value in fit.curve} or None
    fit: CurveFit | None = getattr(backend, rows.kind).get(rows.format)
    if fit is None:
        return None
    curve = fit.curve.model_dump()
    return {name: value for name, value in curve.items() if value is not None} | fit.conditions


def benchmark_seconds(kind: Kind, stored: str, columns: dict[str, Array], *, device: str, backend: str) -> Array | None:
    """What the curve of a device and engine says, repeated on the same buffers like the benchmarks' launches are.

    `columns` are those of the readers in `perfsim.calibrate.rows`. A device that no benchmark ran on has the curve and
    the conditions of its nearest relative on its own datasheet: both change little inside a family, and without an
    eager launch's host time a small product would be 30 times too fast. None where nothing was fitted, or to rows that
    were not repeated.
    """
    size = len(next(iter(columns.values())))
    for owner in (device,) if fitted_file(device) else _relatives(device):
        rows = Rows(owner, backend, "", kind, stored, "", columns, np.ones(size), np.full(size, ""))
        values = coefficients(rows) if size else None
        if values is not None and "gain" in values:
            return form(rows).seconds(values, rows, accelerator(device))
    return None


@cache
def relative(device: str) -> str:
    """The device with fitted curves that stands for one without."""
    return _relatives(device)[0]


@cache
def _relatives(device: str) -> tuple[str, ...]:
    lender = find_calibration(accelerator=device, engine="vllm").borrowed_from or device
    return (SAME_HOST[device], lender) if device in SAME_HOST else (lender,)


def compare(rows: Rows) -> Compared | None:
    """Errors of the stored curve on every row in its range; None without a curve."""
    values = coefficients(rows)
    asked = fit_range(rows)
    if values is None or not len(asked):
        return None
    chip = accelerator(rows.device)
    errors = form(rows).seconds(values, asked, chip) / asked.seconds - 1.0
    return Compared(asked, errors, asked.held_out(), resident(asked, chip) > COLD)
