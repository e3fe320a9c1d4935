"""`python -m perfsim.calibrate.ops --data DIR`: fits operator curves, writes hardware/calibration/operators/*.yaml.

`--kind collective` fits these alone, within minutes, and leaves every other line of the files as it is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from perfsim.calibrate.fit import Fitted, fit
from perfsim.calibrate.forms import fit_range
from perfsim.calibrate.links import alone, taken_over, written
from perfsim.calibrate.mixed_file import write as write_mixed
from perfsim.calibrate.rows import (
    Kind,
    Rows,
    attention_rows,
    collective_rows,
    gemm_rows,
    mla_rows,
    moe_rows,
    newest,
    stream_rows,
)
from perfsim.calibrate.sections import with_kind
from perfsim.calibrate.transfer import left_out, spread
from perfsim.calibrate.version_file import write as write_versions
from perfsim.errors import InputError
from perfsim.spec.catalog import accelerator

BACKEND = "vllm"  # kernels that stand in for those of engines nobody timed apart
FEW = 600  # rows: a format with fewer in range gets no curve
LIMIT = 0.25  # a curve that misses shapes it has not seen by more, in the median, describes nothing
LEAST: dict[Kind, int] = {"collective": 20, "decode": 400, "prefill": 400}
HEADER = """\
# Operator curves fitted to public measurements; do not edit: `python -m perfsim.calibrate.ops --data DIR` writes this
# file. `python -m validation.ops --data DIR` prints how far the curves miss.
#
# source: aiconfigurator's operator tables (ai-dynamo/aiconfigurator@095f58a, Apache-2.0): kernels of vLLM and
#   TensorRT-LLM, repeated on the same buffers under CUDA graphs. A quarter of the shapes of each device (by hash) was
#   not fitted; `median` and `p90` are absolute relative errors on those, within the range that the curve describes.
# stderr: of each coefficient, clustered by shape; 0 where it lies at a bound. covariance: of the logarithms of the
#   coefficients in the order of stderr, lower triangle. sha256: of the fitted rows. discrepancy: relative standard
#   error of one prediction on rows that were not fitted. left_out: errors when this device is predicted by curves of
#   the others and its datasheet.
# Formulas: perfsim/cost/curves.py. Data that stay in the L2 cache were fitted apart and are not part of a curve.
"""


def all_rows(folder: Path) -> list[Rows]:
    """Every group of measured rows that a curve can describe, in a fixed order."""
    rows = [
        *gemm_rows(folder), *attention_rows(folder, "decode"), *attention_rows(folder, "prefill"), *mla_rows(folder),
        *moe_rows(folder), *collective_rows(folder), *stream_rows(folder),
    ]  # fmt: skip
    return usable(rows)


def usable(rows: list[Rows]) -> list[Rows]:
    """The newest version of each group that has enough rows, in a fixed order."""
    found = [group for group in newest(rows) if len(fit_range(group)) >= LEAST.get(group.kind, FEW)]
    return sorted(found, key=lambda group: (group.device, group.backend, group.kind, group.format))


def held_out_errors(fitted: Fitted, rows: Rows) -> np.ndarray:
    """Relative errors on the shapes that were not fitted, within the range of the curve; on all if there are none."""
    out = rows.held_out()
    asked = fit_range(rows.where(out if out.any() else ~out))
    return fitted.form.seconds(fitted.values, asked, accelerator(rows.device)) / asked.seconds - 1.0


def borrowed(groups: list[Rows]) -> dict[str, dict[Kind, np.ndarray]]:
    """Per device and kind, the relative errors when vLLM's curves of the other devices predict it."""
    errors: dict[str, dict[Kind, list[np.ndarray]]] = {}
    for transfer in left_out([rows for rows in groups if rows.backend == BACKEND], "device"):
        errors.setdefault(transfer.rows.device, {}).setdefault(transfer.rows.kind, []).append(transfer.errors)
    return {device: {kind: np.concatenate(parts) for kind, parts in kinds.items()} for device, kinds in errors.items()}


def document(device: str, fits: list[tuple[Fitted, Rows]], missed: Mapping[Kind, np.ndarray]) -> Iterator[str]:
    """Lines of the file of one device."""
    yield HEADER.rstrip("\n")
    yield f"device: {device}"
    yield "source: ai-dynamo/aiconfigurator@095f58a"
    yield f"default_backend: {BACKEND}"
    yield "left_out:"
    for kind, errors in sorted(missed.items()):
        absolute = np.abs(errors)
        yield (
            f"  {kind}: {{rows: {len(errors)}, median: {np.median(absolute):.4f}, "
            f"p90: {np.quantile(absolute, 0.9):.4f}, discrepancy: {spread(errors):.4f}}}"
        )
    yield "backends:"
    seen: tuple[str, ...] = ()
    for fitted, rows in fits:
        place = (rows.backend, rows.kind)
        for depth, name in enumerate(place):
            if seen[: depth + 1] != place[: depth + 1]:
                yield f"{'  ' * (depth + 1)}{name}:"
        seen = place
        for family in _families(fitted, rows):
            yield f"      {family or rows.format}:"
            yield from _entry(fitted, rows, family)


def _families(fitted: Fitted, rows: Rows) -> list[str]:
    if rows.kind != "collective":
        return [""]
    return written({**fitted.form.fixed, **fitted.values}, rows, fitted.values)


def _entry(fitted: Fitted, rows: Rows, family: str) -> Iterator[str]:
    errors = held_out_errors(fitted, rows)
    curve, absolute = fitted.form.curve(fitted.values, family=family), np.abs(errors)
    prefix = f"{family}." if family else ""
    names = [name for name in fitted.stderr if name.startswith(prefix)]
    kept = [at for at, name in enumerate(fitted.values) if name in names]
    stderr = {name.removeprefix(prefix): fitted.stderr[name] for name in names}
    conditions = {name: value for name, value in fitted.values.items() if name not in fitted.stderr}
    values = {name: value for name, value in curve.model_dump().items() if value is not None}
    triangle = [f"[{', '.join(f'{fitted.covariance[row, col]:.1e}' for col in kept[: at + 1])}]"
                for at, row in enumerate(kept)]  # fmt: skip
    spans = {name: [float(column.min()), float(column.max())] for name, column in fitted.rows.columns.items()}
    indent = " " * 8
    yield f"{indent}curve: {_flow(values)}"
    yield f'{indent}version: "{rows.version}"'
    yield f"{indent}table: {rows.table}"
    yield f"{indent}rows: {len(fitted.rows)}"
    yield f"{indent}sha256: {fitted.rows.digest()}"
    yield f"{indent}median: {np.median(absolute):.4f}"
    yield f"{indent}p90: {np.quantile(absolute, 0.9):.4f}"
    yield f"{indent}held_out_rows: {len(errors) if rows.held_out().any() else 0}"
    yield f"{indent}discrepancy: {spread(errors):.4f}"
    yield f"{indent}conditions: {_flow(conditions)}"
    yield f"{indent}stderr: {_flow(stderr)}"
    yield f"{indent}range: {{{', '.join(f'{name}: [{low:g}, {high:g}]' for name, (low, high) in spans.items())}}}"
    yield f"{indent}covariance: [{', '.join(triangle)}]"


def _flow(values: Mapping[str, float]) -> str:
    return "{" + ", ".join(f"{name}: {value:.4g}" for name, value in values.items()) + "}"


def fitted_groups(groups: list[Rows]) -> list[tuple[Fitted, Rows]]:
    """Fits of all groups, in their order, without those that describe nothing."""
    found: list[tuple[Fitted, Rows]] = []
    known: list[tuple[Rows, dict[str, float]]] = []
    # NCCL's own benchmark comes before engines that run its kernels, several sizes of group before one.
    for rows in sorted(groups, key=lambda rows: (rows.kind == "collective" and alone(rows), rows.backend != "nccl")):
        print(f"{rows.device} {rows.backend} {rows.kind} {rows.format}", file=sys.stderr)
        fitted = fit(rows, accelerator(rows.device), known=taken_over(rows, known))
        known.append((rows, {**fitted.form.fixed, **fitted.values}))
        median = float(np.median(np.abs(held_out_errors(fitted, rows)))) if rows.held_out().any() else 0.0
        if median <= LIMIT:
            found.append((fitted, rows))
    places = {id(rows): place for place, rows in enumerate(groups)}
    return sorted(found, key=lambda pair: places[id(pair[1])])


def main(arguments: list[str] | None = None) -> int:
    """Fit everything, or one kind, and write the files; 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m perfsim.calibrate.ops", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the aic_*.parquet tables")
    parser.add_argument("--output", type=Path, default=Path("hardware/calibration/operators"))
    parser.add_argument("--kind", choices=["collective"], help="fit this kind alone and keep the rest of the files")
    options = parser.parse_args(arguments)
    try:
        groups = all_rows(options.data) if options.kind is None else usable(list(collective_rows(options.data)))
        fits = fitted_groups(groups)
        missed = borrowed(groups)
        for device in sorted({rows.device for rows in groups}):
            own = [pair for pair in fits if pair[1].device == device]
            text = "\n".join(document(device, own, missed.get(device, {}))) + "\n"
            path = options.output / f"{device}.yaml"
            if options.kind is not None:
                text = with_kind(path.read_text(encoding="utf-8"), text, options.kind)
            path.write_text(text, encoding="utf-8")
    except (InputError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    if options.kind is None:
        write_mixed(options.data, options.output)
        write_versions(options.data, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
