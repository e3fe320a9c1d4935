"""Leave one device, or one architecture, out: a table of kinds against what was left out.

`leave_out(groups, by=...)` is what `validation/report` calls; `python -m validation.ops --data DIR --architecture` and
`--device` print it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from perfsim.calibrate.ops import BACKEND
from perfsim.calibrate.rows import Rows
from perfsim.calibrate.transfer import ARCHITECTURE, left_out, spread

By = Literal["device", "architecture"]


@dataclass(frozen=True)
class LeftOutKind:
    """Relative errors of one kind on a device or architecture that its curves never saw.

    `median` and `p90` are of absolute errors, `bias` is the median signed one; `fitted_on` names the devices whose rows
    made the curves.
    """

    name: str
    kind: str
    rows: int
    median: float
    p90: float
    bias: float
    discrepancy: float
    fitted_on: tuple[str, ...]


def leave_out(groups: Sequence[Rows], *, by: By, seen: dict[str, list[np.ndarray]] | None = None) -> list[LeftOutKind]:
    """Per kind and device (or architecture), how far curves of the others miss it, sorted by both.

    `groups` as `perfsim.calibrate.ops.all_rows(folder)` reads them, or `validation.ops.slice.slice_rows()`; only vLLM's
    kernels are used, which most devices have. Every row in the range of a curve weighs the same. Takes minutes on the
    whole tables: each group is fitted anew. `seen` gets the signed errors of all rows by kind.
    """
    errors: dict[tuple[str, str], list[np.ndarray]] = {}
    fitted_on: dict[tuple[str, str], set[str]] = {}
    for found in left_out([rows for rows in groups if rows.backend == BACKEND], by):
        device = found.rows.device
        key = (found.rows.kind, device if by == "device" else ARCHITECTURE[device])
        errors.setdefault(key, []).append(found.errors)
        if seen is not None:
            seen.setdefault(found.rows.kind, []).append(found.errors)
        fitted_on.setdefault(key, set()).update(found.fitted_on)
    table = []
    for (kind, name), parts in sorted(errors.items()):
        joined = np.concatenate(parts)
        absolute = np.abs(joined)
        table.append(
            LeftOutKind(
                name, kind, len(joined), float(np.median(absolute)), float(np.quantile(absolute, 0.9)),
                float(np.median(joined)), spread(joined), tuple(sorted(fitted_on[kind, name])),
            )
        )  # fmt: skip
    return table


def show(table: Sequence[LeftOutKind], *, by: By) -> None:
    """Print one line per kind with the median error, in percent, for every device or architecture."""
    names = sorted({cell.name for cell in table})
    print(f"leave one {by} out, median absolute error (bias), %:")
    print(f"{'':12}" + "".join(f"{name[:16]:>18}" for name in names))
    for kind in sorted({cell.kind for cell in table}):
        cells = {cell.name: cell for cell in table if cell.kind == kind}
        texts = [
            f"{100 * cells[name].median:.0f} ({100 * cells[name].bias:+.0f})" if name in cells else "-"
            for name in names
        ]  # fmt: skip
        print(f"{kind:12}" + "".join(f"{text:>18}" for text in texts))
