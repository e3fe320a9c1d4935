"""`python -m perfsim.calibrate.mixed_file --data DIR`: writes what was fitted to mixed steps beside the other curves.

Files of GPUs that run the same kernel get a section `mixed`; the RTX 4090, which no other table has, a file of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from perfsim.calibrate.fit import fit
from perfsim.calibrate.mixed import (
    CARD,
    DEVICE,
    SAME_KERNEL,
    SOURCE,
    TABLE,
    VERSION,
    decode_rows,
    fit_compute,
    fit_mixed,
)
from perfsim.calibrate.rows import Array
from perfsim.calibrate.transfer import spread
from perfsim.calibrate.unequal import fit_last
from perfsim.errors import InputError
from perfsim.spec.base import Spec
from perfsim.spec.catalog import accelerator
from perfsim.spec.curves import DecodeCurve, PrefillCurve
from perfsim.spec.operators_file import BackendCurves, OperatorsFile
from perfsim.spec.problems import validated
from perfsim.spec.yaml import load_yaml

OUTPUT = Path("hardware/calibration/operators")
NEAREST = "l40s-48gb"  # GPU of the same architecture as the RTX 4090, whose prefill curve is scaled to it
SECTION = "    mixed:"
NOTE = f"# mixed: steps with prompt chunks on an RTX PRO 6000 under vLLM {VERSION} ({SOURCE})."
HEADER = f"""\
# Attention of the RTX 4090; do not edit: `python -m perfsim.calibrate.mixed_file --data DIR` writes this file.
#
# source: steps of one layer of Llama-3.1-8B under vLLM {VERSION} ({SOURCE});
#   half of the shapes of mixed steps and a quarter of those of decodes held out by hash. decode was fitted to decodes
#   alone; prefill is the curve of the L40S with `compute` fitted to mixed steps; mixed is that of the RTX PRO 6000,
#   with errors on this card, none of whose rows it was fitted to. Formulas: perfsim/cost/curves.py, mixed.py.
#   Everything else about this card is in first-guess.yaml.
device: {CARD}
source: {SOURCE.partition(",")[0]}
default_backend: vllm
backends:
  vllm:"""


class Entry(NamedTuple):
    """What a file says about one curve; `errors` are relative and of rows that were not fitted."""

    curve: Spec
    rows: int
    digest: str
    errors: Array
    stderr: Mapping[str, float]
    covariance: Array
    conditions: Mapping[str, float]
    ranges: Mapping[str, tuple[float, float]]
    table: str = TABLE
    version: str = VERSION

    def lines(self, kind: str) -> Iterator[str]:
        """The entry of 16-bit K and V."""
        absolute, size = np.abs(self.errors), len(self.covariance)
        triangle = [
            f"[{', '.join(f'{value:.1e}' for value in self.covariance[row, : row + 1])}]" for row in range(size)
        ]
        values = {name: value for name, value in self.curve.model_dump().items() if value is not None}
        yield f"    {kind}:"
        yield "      bf16:"
        for line in (
            f"curve: {_flow(values)}", f'version: "{self.version}"', f"table: {self.table}", f"rows: {self.rows}",
            f"sha256: {self.digest}", f"median: {np.median(absolute):.4f}", f"p90: {np.quantile(absolute, 0.9):.4f}",
            f"held_out_rows: {len(self.errors)}", f"discrepancy: {spread(self.errors):.4f}",
            f"conditions: {_flow(self.conditions)}", f"stderr: {_flow(self.stderr)}",
            f"range: {{{', '.join(f'{name}: [{low:g}, {high:g}]' for name, (low, high) in self.ranges.items())}}}",
            f"covariance: [{', '.join(triangle)}]",
        ):  # fmt: skip
            yield f"        {line}"


def _flow(values: Mapping[str, float]) -> str:
    return "{" + ", ".join(f"{name}: {value:.4g}" for name, value in values.items()) + "}"


def with_section(text: str, lines: list[str]) -> str:
    """A file of curves with `lines` as the section `mixed` of vLLM, in place of the one that it may have."""
    kept: list[str] = []
    inside = False
    for line in text.splitlines():
        inside = line == SECTION or (inside and line.startswith("      "))
        if not inside and line != NOTE:
            kept.append(line)
    at = kept.index("  vllm:") + 1
    kept[at:at] = lines
    kept.insert(next(index for index, line in enumerate(kept) if not line.startswith("#")), NOTE)
    return "\n".join(kept) + "\n"


def write(folder: Path, output: Path) -> None:
    """Fit mixed steps on the curves in `output` and write the results there."""
    kernels = {device: _curves(output, device) for device in (DEVICE, NEAREST)}
    found = fit_mixed(folder, *kernels[DEVICE])
    last, variance, median, p90, digest = fit_last(folder, found.curve, *kernels[DEVICE], DEVICE)
    curve = found.curve.model_copy(update={"last": last})
    # Fitted to another table, so that `last` has no covariance with the others; the digest is of both tables' rows.
    digest = hashlib.sha256(f"{found.digest} {digest}".encode()).hexdigest()
    size = len(found.covariance)
    together = np.zeros((size + 1, size + 1))
    together[:size, :size], together[size, size] = found.covariance, variance
    stderr = {**found.stderr, "last": last * variance**0.5}
    unequal = {"unequal_median": median, "unequal_p90": p90}
    entry = Entry(curve, found.rows, digest, found.errors, stderr, together, unequal, found.ranges)
    for device in sorted(SAME_KERNEL):
        path = output / f"{device}.yaml"
        path.write_text(with_section(path.read_text(encoding="utf-8"), list(entry.lines("mixed"))), encoding="utf-8")
    rows = decode_rows(folder)
    alone = fit(rows, accelerator(CARD))
    out = rows.where(rows.held_out())
    missed = alone.form.seconds(alone.values, out, accelerator(CARD)) / out.seconds - 1.0
    decode = alone.form.curve(alone.values)
    if not isinstance(decode, DecodeCurve):
        raise TypeError("the form of decodes gave another curve")
    kept = [at for at, name in enumerate(alone.values) if name in alone.stderr]
    spans = {name: (float(column.min()), float(column.max())) for name, column in alone.rows.columns.items()}
    conditions = {name: value for name, value in alone.values.items() if name not in alone.stderr}
    scaled = fit_compute(folder, curve, decode, kernels[NEAREST][1])
    sections = {
        "decode": Entry(decode, len(alone.rows), alone.rows.digest(), missed, alone.stderr,
                        alone.covariance[np.ix_(kept, kept)], conditions, spans),
        "prefill": Entry(scaled.curve, scaled.rows, scaled.digest, scaled.errors, scaled.stderr, scaled.covariance, {},
                         scaled.ranges),
        "mixed": entry._replace(errors=scaled.errors),
    }  # fmt: skip
    lines = [line for kind, section in sections.items() for line in section.lines(kind)]
    (output / f"{CARD}.yaml").write_text("\n".join([HEADER, *lines]) + "\n", encoding="utf-8")


def _curves(output: Path, device: str) -> tuple[DecodeCurve, PrefillCurve]:
    path = output / f"{device}.yaml"
    curves: BackendCurves = validated(OperatorsFile, load_yaml(path), where=str(path)).backends["vllm"]
    return curves.decode["bf16"].curve, curves.prefill["bf16"].curve


def main(arguments: list[str] | None = None) -> int:
    """Fit and write; 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m perfsim.calibrate.mixed_file", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help=f"folder of {TABLE}.parquet")
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
