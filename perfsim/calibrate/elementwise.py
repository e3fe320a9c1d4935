"""`python -m perfsim.calibrate.elementwise --data DIR`: fits norms, activations and other elementwise kernels.

Writes hardware/calibration/elementwise.yaml: per software, device and family a launch, a share of the bandwidth of HBM,
how much faster the L2 cache serves what it holds, and up to which share of it that is so. The formula is that of all
streaming kernels (`perfsim.calibrate.forms`), smooth and monotone in bytes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from perfsim.calibrate.bounds import US, Bounds
from perfsim.calibrate.elementwise_rows import TABLES, elementwise_rows, held_out_half
from perfsim.calibrate.fit import SAMPLE, Fitted, fit_together, sample
from perfsim.calibrate.forms import Form
from perfsim.calibrate.rows import Array, Rows
from perfsim.calibrate.transfer import POOLED, spread
from perfsim.errors import InputError
from perfsim.spec.catalog import accelerator
from perfsim.spec.elementwise_file import FILE

# Start, lowest and highest value. Several kernels that a host launches take up to 100 us. The fastest L2 cache that
# these rows determine, an RTX PRO 6000's, moves five times the bytes of its memory. Kernels that write in place hold
# half of what they move, so that twice the cache may stay there.
BOUNDS: Bounds = {
    "launch": (3 * US, 0.3 * US, 100 * US), "bandwidth": (0.7, 0.01, 1.0), "gain": (0.5, 0.01, 5.0),
    "share": (0.8, 0.05, 2.0),
}  # fmt: skip
OTHER_STARTS = ({"launch": 10 * US, "bandwidth": 0.3, "gain": 3.0, "share": 0.3}, {"bandwidth": 0.95, "gain": 3.0})
AT_BOUND = 1e-2  # of a coefficient: nearer to a bound, it is at it
HEADER = """\
# Elementwise kernels of engines' layers; do not edit: `python -m perfsim.calibrate.elementwise --data DIR` writes this
# file. seconds = launch + bytes / (bandwidth x that of HBM) x (1 - gain / (1 + gain) / (1 + (bytes / (share x L2))^4)):
# what the L2 cache holds (up to `share` of it) moves 1 + gain times as fast: the kernel before has just written it.
#
# backends: software, which differs by table (perfsim/calibrate/elementwise_rows.py). One set of coefficients per device
#   and family: embeddings and LayerNorm of two tables are PyTorch's and fitted together. `launch` holds the host's
#   where kernels were launched eagerly (unfused, vidur, pytorch). bandwidth counts the bytes of one fused kernel, so
#   that unfused ones have a small share.
# Half of the shapes (bytes per token, tokens), by hash, was not fitted; `median`, `p90` and `discrepancy` are of these.
# stderr, covariance: as in operators/*.yaml; what has no stderr lies at its bound. Where no row outgrows the L2 cache,
#   bandwidth and gain are known by their product alone. sha256: of the fitted rows.
# width_left_out: errors when each width (bytes per token, so: model and shards) is predicted by a fit to the others.
# left_out: errors on all rows of the device when coefficients of the other devices and its datasheet predict it.
"""


class Streams(Form):
    """The form of all families; a search that begins once takes the L2 cache for the HBM."""

    def starts(self) -> list[dict[str, float]]:
        """Where the search begins."""
        first = {name: start for name, (start, _, _) in self.bounds.items()}
        others = ({name: value for name, value in other.items() if name in first} for other in OTHER_STARTS)
        return [first, *({**first, **other} for other in others if other)]


SHAPE = Streams("stream", BOUNDS, {"column": 0.0})


@dataclass(frozen=True)
class Entry:
    """Coefficients of one software, device and family, errors on its other half and when its device is left out."""

    fitted: Fitted
    missed: Array
    width_left_out: Array
    left_out: Array
    others: tuple[str, ...]


def fit_kernels(groups: list[Rows], most: int = SAMPLE) -> Fitted:
    """Coefficients for the rows that are not held out, on all devices; those at a bound are fixed there."""
    chosen = [sample(rows.where(~held_out_half(rows)), most) for rows in groups]
    chips = [accelerator(rows.device) for rows in groups]
    found = fit_together(chosen, chips, SHAPE)
    ends = {name: bound for name, (_, *both) in BOUNDS.items() for bound in both
            if abs(found.values[name] / bound - 1.0) < AT_BOUND}  # fmt: skip
    if not ends:
        return found
    free = {name: bound for name, bound in BOUNDS.items() if name not in ends}
    return fit_together(chosen, chips, replace(SHAPE, bounds=free, fixed={**SHAPE.fixed, **ends}))


def errors_of(fitted: Fitted, rows: Rows) -> Array:
    """Relative errors, signed."""
    result: Array = fitted.form.seconds(fitted.values, rows, accelerator(rows.device)) / rows.seconds - 1.0
    return result


def entries(groups: list[Rows]) -> list[Entry]:
    """Fits of all groups, in their order."""
    found = []
    for rows in groups:
        print(f"{rows.backend} {rows.device} {rows.format}", file=sys.stderr)
        fitted = fit_kernels([rows])
        others = [other for other in groups
                  if (other.backend, other.format) == (rows.backend, rows.format) and other is not rows]  # fmt: skip
        left = errors_of(fit_kernels(others, POOLED), rows) if others else np.array([])
        missed = errors_of(fitted, rows.where(held_out_half(rows)))
        found.append(Entry(fitted, missed, each_width_left_out(rows), left, tuple(sorted(o.device for o in others))))
    return found


def each_width_left_out(rows: Rows) -> Array:
    """Relative errors on every width, by a fit to the others of the same device; empty where there is one alone."""
    width = rows.columns["width"]
    kept = [(rows.where(width != own), rows.where(width == own)) for own in np.unique(width)]
    errors = [errors_of(fit_kernels([rest], POOLED), own) for rest, own in kept if len(rest)]
    return np.concatenate([np.array([]), *errors])


def document(found: list[Entry]) -> Iterator[str]:
    """Lines of the file."""
    yield HEADER.rstrip("\n")
    yield "source: casys-kaist/LLMServingSim@5daddb2 (MIT), microsoft/vidur@7d47513 (MIT)"
    yield "backends:"
    seen: tuple[str, ...] = ()
    for entry in found:
        rows = entry.fitted.rows
        place = (rows.backend, rows.device)
        for depth, name in enumerate(place):
            if seen[: depth + 1] != place[: depth + 1]:
                yield f"{'  ' * (depth + 1)}{name}:"
        seen = place
        yield f"      {rows.format}:"
        yield from (f"        {line}" for line in _lines(entry))


def _lines(entry: Entry) -> Iterator[str]:
    fitted, rows = entry.fitted, entry.fitted.rows
    values = {**fitted.form.fixed, **fitted.values}
    deviation = np.sqrt(np.maximum(np.diag(fitted.covariance), 0.0))
    stderr = {name: value * float(d) for (name, value), d in zip(fitted.values.items(), deviation, strict=True)}
    triangle = [f"[{', '.join(f'{value:.1e}' for value in fitted.covariance[at, : at + 1])}]"
                for at in range(len(fitted.values))]  # fmt: skip
    spans = [f"{name}: [{column.min():g}, {column.max():g}]" for name, column in rows.columns.items()]
    yield f"curve: {_flow({name: values[name] for name in ('launch', 'bandwidth')})}"
    yield f'version: "{rows.version}"'
    yield f'table: "{rows.table}"'
    yield f"rows: {len(rows)}"
    yield f"sha256: {rows.digest()}"
    yield f"median: {np.median(np.abs(entry.missed)):.4f}"
    yield f"p90: {np.quantile(np.abs(entry.missed), 0.9):.4f}"
    yield f"held_out_rows: {len(entry.missed)}"
    yield f"discrepancy: {spread(entry.missed):.4f}"
    yield f"conditions: {_flow({name: values[name] for name in ('gain', 'share')})}"
    yield f"stderr: {_flow(stderr)}"
    yield f"range: {{{', '.join(spans)}}}"
    yield f"covariance: [{', '.join(triangle)}]"
    if len(entry.width_left_out):
        yield f"width_left_out: {{{_summary(entry.width_left_out)}}}"
    if entry.others:
        yield f"left_out: {{{_summary(entry.left_out)}, fitted_on: [{', '.join(entry.others)}]}}"


def _summary(errors: Array) -> str:
    absolute = np.abs(errors)
    return f"rows: {len(absolute)}, median: {np.median(absolute):.4f}, p90: {np.quantile(absolute, 0.9):.4f}"


def _flow(values: Mapping[str, float]) -> str:
    return "{" + ", ".join(f"{name}: {value:.4g}" for name, value in values.items()) + "}"


def main(arguments: list[str] | None = None) -> int:
    """Fit and write the file; 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m perfsim.calibrate.elementwise", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help=f"folder of {', '.join(TABLES)} (.parquet)")
    parser.add_argument("--output", type=Path, default=Path("hardware/calibration") / FILE)
    options = parser.parse_args(arguments)
    try:
        text = "\n".join(document(entries(elementwise_rows(options.data)))) + "\n"
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    options.output.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
