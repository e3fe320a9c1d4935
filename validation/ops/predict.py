"""What the curves in hardware/calibration/operators say about measured rows, under the conditions of the benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from perfsim.calibrate.forms import fit_range, form, resident
from perfsim.calibrate.rows import Array, Rows
from perfsim.spec.catalog import accelerator
from perfsim.spec.operators_file import FOLDER, CurveFit, OperatorsFile
from perfsim.spec.problems import validated
from perfsim.spec.yaml import load_yaml

CALIBRATION = Path(__file__).resolve().parents[2] / "hardware" / "calibration"
COLD = 1.5  # times the L2 cache: nothing of the last repetition is left in it


@dataclass(frozen=True)
class Compared:
    """Rows in the range of a curve with their signed relative errors; `held_out` were not fitted."""

    rows: Rows
    errors: Array
    held_out: np.ndarray
    cold: np.ndarray


@cache
def fitted_file(device: str) -> OperatorsFile | None:
    """The curves of a device, None where it has none."""
    path = CALIBRATION / FOLDER / f"{device}.yaml"
    return validated(OperatorsFile, load_yaml(path), where=str(path)) if path.is_file() else None


def fit_of(rows: Rows) -> CurveFit | None:
    """The fit that describes a group of rows."""
    file = fitted_file(rows.device)
    backend = file.backends.get(rows.backend) if file else None
    return getattr(backend, rows.kind).get(rows.format) if backend else None


def compare(rows: Rows) -> Compared | None:
    """Errors of the stored curve on every row in its range; None without a curve."""
    fit = fit_of(rows)
    asked = fit_range(rows)
    if fit is None or not len(asked):
        return None
    chip = accelerator(rows.device)
    coefficients = fit.curve.model_dump()  # type: ignore[attr-defined]
    values = {name: value for name, value in coefficients.items() if value is not None} | fit.conditions
    errors = form(rows).seconds(values, asked, chip) / asked.seconds - 1.0
    return Compared(asked, errors, asked.held_out(), resident(asked, chip) > COLD)
