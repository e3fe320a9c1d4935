"""How well curves carry over: predict one device, or one architecture, from curves fitted to the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from perfsim.calibrate.fit import Fitted, fit_together, sample
from perfsim.calibrate.forms import Form, fit_range, form
from perfsim.calibrate.links import bounds_of, link_kind
from perfsim.calibrate.rows import Array, Rows
from perfsim.spec.catalog import accelerator

# Generations of streaming multiprocessors: kernels are written for one of them.
ARCHITECTURE = {
    "a100-80gb-sxm": "ampere", "l40s-48gb": "ada", "h100-80gb-sxm": "hopper", "h200-141gb-sxm": "hopper",
    "b200-180gb-sxm": "blackwell", "gb200-186gb": "blackwell", "rtx-pro-6000-blackwell-96gb": "rtx-blackwell",
}  # fmt: skip
POOLED = 700  # rows per device


@dataclass(frozen=True)
class Transfer:
    """Rows of a device that was left out, and what the curves of the others say about them."""

    rows: Rows
    predicted: Array
    fitted_on: tuple[str, ...]

    @property
    def errors(self) -> Array:
        """Relative errors, signed."""
        result: Array = self.predicted / self.rows.seconds - 1.0
        return result


def left_out(groups: list[Rows], by: Literal["device", "architecture"]) -> Iterator[Transfer]:
    """Every group, predicted by one curve that was fitted to the same kind, format and backend on other devices.

    Those of its own architecture make that curve, or all together where there are none, each with its own datasheet;
    of collectives, those whose GPUs are joined by the same kind of links, every architecture with the same weight.
    Groups without any other device are skipped, and those whose launches were timed with the host's: they say more
    about that host.
    """
    groups = [rows for rows in groups if "host" not in form(rows).bounds]
    for rows in groups:
        others = [
            other
            for other in groups
            if (other.kind, other.format, other.backend) == (rows.kind, rows.format, rows.backend)
            and (other.device if by == "device" else ARCHITECTURE[other.device])
            != (rows.device if by == "device" else ARCHITECTURE[rows.device])
        ]
        near = [other for other in others if ARCHITECTURE[other.device] == ARCHITECTURE[rows.device]]
        if rows.kind == "collective":
            near = near or [other for other in others if link_kind(other.device) == link_kind(rows.device)]
        if others:
            yield _predicted(rows, near or others)


def _predicted(rows: Rows, others: list[Rows]) -> Transfer:
    chosen = [sample(fit_range(other), POOLED) for other in others]
    if rows.kind == "collective":
        # Launches differ by architecture more than by anything else, so that each one weighs the same.
        count = Counter(ARCHITECTURE[other.device] for other in others)
        chosen = [sample(other, len(other) // count[ARCHITECTURE[other.device]]) for other in chosen]
    # Families of algorithms that only the others have must have a curve, or their rows bend those of the rest.
    shape = Form(rows.kind, *bounds_of([rows, *others])) if rows.kind == "collective" else form(rows)
    fitted: Fitted = fit_together(chosen, [accelerator(other.device) for other in others], shape)
    asked = fit_range(rows)
    predicted = fitted.form.seconds(fitted.values, asked, accelerator(rows.device))
    return Transfer(asked, predicted, tuple(sorted(other.device for other in others)))


def spread(errors: Array) -> float:
    """The relative standard error that two thirds of `errors` stay within: robust against a few odd rows."""
    return float(np.quantile(np.abs(np.log1p(np.maximum(errors, -0.99))), 0.6827))
