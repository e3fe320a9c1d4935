"""What whole measured runs say about the spreads of `hardware/calibration/uncertainty.yaml`, and how far bands hold.

    python -m validation.spread --table FILE.parquet [--where COLUMN=VALUE]... [--every N]

The table is one of serving runs (as `validation.compare` takes it). Its rows fall into groups of one model on one
device, and the groups into two halves by the SHA-256 of their names. On the first half, the spread that a prediction
lacks is worked out: the one that, in quadrature with the band as it is, less what the file already says, holds 90% of
the rows. On the second half, and on the first for comparison, it prints the coverage and the width of bands as they
are and with that spread. Nothing of the second half goes into a size.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from perfsim.spec import catalog
from perfsim.spec.foreign_file import load_foreign
from perfsim.spec.uncertainty import UncertaintyFile
from perfsim.spec.yaml import load_yaml
from perfsim.uncertainty.spread import Z
from validation.compare import facts
from validation.compare.facts import InexpressibleError
from validation.compare.kinds import kind_of
from validation.compare.outcome import Values
from validation.compare.plans import ENGINES
from validation.compare.table import Table, read_table, where

Floats = NDArray[np.float64]
ENGINE_COLUMNS = ("backend", "framework")
MODEL_COLUMNS, DEVICE_COLUMNS = ("model_path", "model"), ("system", "hardware")
CLOSED = frozenset({"backend", "framework"})  # tables with one of these columns are of closed loops
FEWEST = 8  # rows of a half that a spread is worked out from
COVERED = 0.9


@dataclass(frozen=True, slots=True)
class Misses:
    """Rows of one NAME: `error` = ln(measured / predicted), and how far its band reaches to the side of the error.

    `band` is in standard deviations, `own` what the file has for whole runs already. `first` marks the half that sizes
    are worked out on.
    """

    error: Floats
    band: Floats
    own: float
    first: NDArray[np.bool_]

    def lacking(self) -> Floats:
        """Standard deviation that each row would need beside what is known of its parts."""
        rest = np.maximum(0.0, self.band**2 - self.own**2)
        return np.sqrt(np.maximum(0.0, (self.error / Z) ** 2 - rest))

    def size(self) -> float:
        """The spread that holds 90% of the first half."""
        return float(np.quantile(self.lacking()[self.first], COVERED))

    def coverage(self, half: NDArray[np.bool_], size: float | None = None) -> tuple[float, float]:
        """(share inside, median width relative to the prediction) of a half, with another spread of whole runs."""
        band = self.band if size is None else np.sqrt(np.maximum(0.0, self.band**2 - self.own**2) + size**2)
        inside = np.abs(self.error) <= Z * band
        return float(inside[half].mean()), float(np.median(2.0 * np.sinh(Z * band[half])))


def column(table: Table, names: Sequence[str]) -> list[str]:
    """The texts of the first of these columns that the table has; empty ones where it has none of them."""
    found = next((name for name in names if name in table.names), None)
    return ["" if value is None else str(value) for value in table.texts(found)] if found else [""] * len(table)


def halves(table: Table) -> NDArray[np.bool_]:
    """Whether the group of each row, its model on its device, belongs to the half that sizes are worked out on."""
    groups = zip(column(table, MODEL_COLUMNS), column(table, DEVICE_COLUMNS), strict=True)
    return np.array([hashlib.sha256(f"{model}\0{device}".encode()).digest()[0] % 2 == 0 for model, device in groups])


def misses(values: Values, *, own: float, first: NDArray[np.bool_]) -> Misses:
    """Of the pairs that have a band."""
    kept = values.take(values.usable & np.isfinite(values.low) & np.isfinite(values.high) & (values.predicted > 0))
    error = np.log(kept.measured / kept.predicted)
    with np.errstate(divide="ignore"):
        band = np.where(error > 0, np.log(kept.high / kept.predicted), np.log(kept.predicted / kept.low)) / Z
    return Misses(error, band, own, first[kept.rows])


def known(spreads: UncertaintyFile, engine: str, name: str, *, closed: bool) -> float:
    """What the file already has for a NAME beside the factors of its parts; one size for both sides."""
    own = spreads.engines.get(engine)
    if closed and "ttft" in name:
        loop = (own and own.closed_loop) or spreads.closed_loop
        return max(loop.longer, loop.shorter)
    if not closed and name.endswith(("p99_ms", ":p99")):
        tail = next((spreads.tails[key] for key in spreads.tails if key in name), None)
        return tail.sigma if tail else 0.0
    return float(((own and own.deployment) or spreads.deployment).sigma)


def report(table: Table) -> Iterator[str]:
    """The lines of every engine, make of device and NAME."""
    folders = (root / "hardware" / "calibration" for root in catalog.data_directories())
    path = next(folder / "uncertainty.yaml" for folder in folders if (folder / "uncertainty.yaml").is_file())
    spreads = UncertaintyFile.model_validate(load_yaml(path))
    laws = load_foreign(path.parent)
    others = {*spreads.foreign.devices, *(name for law in laws.stacks.values() for name in law.devices)}
    table, outcome = kind_of(table).compare(table)
    closed = bool(CLOSED & set(table.names))
    engines = np.array([ENGINES.get(name, "vllm") for name in column(table, ENGINE_COLUMNS)])
    foreign = np.array([_is_foreign(name, others) for name in column(table, DEVICE_COLUMNS)])
    first = halves(table)
    yield f"{'engine':9}{'NAME':22}{'rows':>6}{'half':>6}{'size':>7}{'mean':>8} | coverage, width as is and with size"
    for engine, other in sorted({*zip(engines.tolist(), foreign.tolist(), strict=True)}):
        for name, values in outcome.values.items():
            at = (engines[values.rows] == engine) & (foreign[values.rows] == other)
            found = misses(values.take(at), own=known(spreads, engine, name, closed=closed), first=first)
            label = f"{engine}{'*' if other else ''}"
            if len(found.error):
                yield from _lines(label, name, found)


def _lines(engine: str, name: str, found: Misses) -> Iterator[str]:
    size = found.size() if found.first.sum() >= FEWEST else float("nan")
    for half, title in ((found.first, "first"), (~found.first, "other")):
        if not half.any():
            continue
        (share, width), with_size = found.coverage(half), found.coverage(half, size)
        longer = np.quantile(found.error[half], 0.95)
        shorter = np.quantile(found.error[half], 0.05)
        yield (
            f"{engine:9}{name:22}{half.sum():>6}{title:>6}{size:>7.3f}{found.error[half].mean():>+8.3f} | {share:>4.0%}"
            f" {width:>6.1%}, {with_size[0]:>4.0%} {with_size[1]:>6.1%} | 5-95% {shorter:+.2f} {longer:+.2f}"
        )


def _is_foreign(device: str, others: Collection[str]) -> bool:
    try:
        return facts.device(device) in others
    except InexpressibleError:
        return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m validation.spread", description=__doc__.partition("\n")[0])
    parser.add_argument("--table", type=Path, required=True, metavar="FILE.parquet")
    parser.add_argument("--where", action="append", default=[], metavar="COLUMN=VALUE")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="take every N-th row only, which is quicker")
    options = parser.parse_args(arguments)
    table = where(read_table(options.table), options.where)
    table = table.keep(np.arange(len(table)) % options.every == 0)
    for line in report(table):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
