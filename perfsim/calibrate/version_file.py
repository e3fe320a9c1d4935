"""`python -m perfsim.calibrate.version_file --data DIR`: writes curves of other engine versions beside the newest ones.

Files of operators get a section `versions` for products that a profiler timed in an older version. A device without a
curve of any version keeps none: few shapes do not make one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from perfsim.calibrate.forms import fit_range
from perfsim.calibrate.layer_rows import SOURCE, TABLE, VERSION, product_rows
from perfsim.calibrate.mixed_file import OUTPUT, Entry
from perfsim.calibrate.rows import Array, Rows, gemm_rows, newest
from perfsim.calibrate.versions import BETWEEN_VERSIONS, Moved, moved, one_shape_left_out, prior_errors
from perfsim.errors import InputError
from perfsim.spec.catalog import accelerator
from perfsim.spec.operators_file import FittedGemm, OperatorsFile
from perfsim.spec.problems import validated
from perfsim.spec.yaml import load_yaml

SECTION = "versions:"
NOTE = f"""\
# versions: kernels of older engine versions ({SOURCE}). `prior` is the curve that was
#   moved to their rows; `median`, `p90` and `discrepancy` are of shapes, each left out of a fit to the others."""


def write(folder: Path, output: Path) -> None:
    """Move every curve in `output` of which `folder` has rows of another version, and write what comes out."""
    timed = {(rows.device, rows.backend, rows.format): rows for rows in newest(list(gemm_rows(folder)))}
    for rows in product_rows(folder):
        path = output / f"{rows.device}.yaml"
        if not path.is_file():
            raise InputError(f"{path}: no such file; `python -m perfsim.calibrate.ops` writes it")
        content = validated(OperatorsFile, load_yaml(path), where=str(path))
        backend = content.backends.get(rows.backend)
        prior = None if backend is None else backend.gemm.get(rows.format)
        if prior is not None:
            of_prior = timed[rows.device, rows.backend, rows.format]
            lines = [SECTION, f"  {rows.backend}:", f'    "{rows.version}":', *_entry(rows, prior, of_prior)]
            path.write_text(with_section(path.read_text(encoding="utf-8"), lines), encoding="utf-8")


def with_section(text: str, lines: list[str]) -> str:
    """A file of curves that ends with `lines`, in place of the section that it may have; its note ends the header."""
    kept: list[str] = []
    inside = False
    for line in text.splitlines():
        inside = line == SECTION or (inside and line.startswith(" "))
        if not inside and line not in NOTE.splitlines():
            kept.append(line)
    head = next(index for index, line in enumerate(kept) if not line.startswith("#"))
    return "\n".join([*kept[:head], *NOTE.splitlines(), *kept[head:], *lines]) + "\n"


def _entry(rows: Rows, prior: FittedGemm, of_prior: Rows) -> Iterator[str]:
    chip = accelerator(rows.device)
    found = moved(rows, prior, chip)
    spans = {name: (float(column.min()), float(column.max())) for name, column in rows.columns.items()}
    entry = Entry(
        found.form.curve(found.values), len(rows), rows.digest(), one_shape_left_out(rows, prior, chip), found.stderr,
        found.covariance, {}, spans, table=TABLE, version=VERSION,
    )  # fmt: skip
    yield from (f"  {line}" for line in entry.lines("gemm"))
    before = np.abs(prior_errors(rows, prior, chip))
    yield (
        f'          prior: {{version: "{prior.version}", sha256: {prior.sha256}, between_versions: {BETWEEN_VERSIONS},'
        f" median: {np.median(before):.4f}, p90: {np.quantile(before, 0.9):.4f},"
        f" moved_median: {np.median(np.abs(_on_prior_rows(found, prior, of_prior))):.4f}}}"
    )


def _on_prior_rows(found: Moved, prior: FittedGemm, of_prior: Rows) -> Array:
    """Relative errors of the moved curve on shapes of the prior's version that its fit held out, in that benchmark."""
    asked = fit_range(of_prior.where(of_prior.held_out()))
    predicted = found.form.seconds({**found.values, **prior.conditions}, asked, accelerator(asked.device))
    return predicted / asked.seconds - 1.0


def main(arguments: list[str] | None = None) -> int:
    """Fit and write; 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m perfsim.calibrate.version_file", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help=f"folder of {TABLE}.parquet and aic_gemm.parquet")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    try:
        write(options.data, options.output)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
