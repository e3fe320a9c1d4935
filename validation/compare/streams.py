"""Elementwise kernels of layer tables as those were timed: by whose kernels they were, from the L2 cache, eagerly.

The coefficients are in `hardware/calibration/elementwise.yaml`, fitted by `perfsim.calibrate.elementwise` to half of
the shapes; which half a row is in is known here, too, so that errors of the other half can be told apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from perfsim.calibrate.elementwise import SHAPE
from perfsim.calibrate.elementwise_rows import Kernel, held_out_half, kernel_rows
from perfsim.spec.elementwise_file import ElementwiseFile, load_elementwise
from validation.compare import facts
from validation.compare.lowered import Floats
from validation.ops.predict import CALIBRATION


@dataclass(frozen=True)
class Timed:
    """Seconds of kernels, and which of their shapes no fit has seen."""

    seconds: Floats
    kept_out: NDArray[np.bool_]


@cache
def conditions() -> ElementwiseFile:
    """The packaged coefficients."""
    return load_elementwise(CALIBRATION)


def stream_seconds(kernel: Kernel, accelerator: str, tokens: Floats) -> Timed | None:
    """What a kernel's benchmark would have timed on a device; None where nothing was fitted."""
    found = conditions().backends.get(kernel.backend, {}).get(accelerator, {}).get(kernel.family)
    if found is None:
        return None
    rows = kernel_rows(accelerator, kernel, found.table, tokens, np.full(len(tokens), np.nan))
    values = {"launch": found.curve.launch, "bandwidth": found.curve.bandwidth, **found.conditions}
    return Timed(SHAPE.seconds(values, rows, facts.accelerator(accelerator)), held_out_half(rows))
