"""The committed slice of measured operator rows: `python -m validation.ops.slice --data DIR` cuts it anew."""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import numpy as np

from perfsim.calibrate.fit import sample
from perfsim.calibrate.forms import fit_range
from perfsim.calibrate.ops import all_rows
from perfsim.calibrate.rows import Kind, Rows

MEASURED = Path(__file__).resolve().parents[1] / "measured"
KINDS: tuple[Kind, ...] = ("gemm", "decode", "prefill", "moe", "collective", "stream")
KEYS = ("device", "backend", "version", "format", "table")
EACH = 24  # rows of each device, backend and format, half of them held out


def path_of(kind: Kind) -> Path:
    """Where the rows of one kind lie."""
    return MEASURED / f"operators-{kind}.csv"


def slice_rows() -> list[Rows]:
    """The committed rows, in the groups that the whole tables have."""
    groups: list[Rows] = []
    for kind in KINDS:
        with path_of(kind).open(encoding="utf-8", newline="") as file:
            found: dict[tuple[str, ...], list[dict[str, str]]] = {}
            for line in csv.DictReader(file):
                found.setdefault(tuple(line[key] for key in KEYS), []).append(line)
        for (device, backend, version, stored, table), lines in found.items():
            names = [name for name in lines[0] if name not in (*KEYS, "shape", "seconds")]
            columns = {name: np.array([float(line[name]) for line in lines]) for name in names}
            seconds = np.array([float(line["seconds"]) for line in lines])
            shape = np.array([line["shape"] for line in lines])
            groups.append(Rows(device, backend, version, kind, stored, table, columns, seconds, shape))
    return groups


def cut(groups: list[Rows]) -> None:
    """Write a few rows of every group."""
    for kind in KINDS:
        with path_of(kind).open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            same = [rows for rows in groups if rows.kind == kind]
            names = list(same[0].columns)
            writer.writerow([*KEYS, "shape", *names, "seconds"])
            for rows in same:
                asked = fit_range(rows)
                out = asked.held_out()
                for part in (sample(asked.where(out), EACH // 2), sample(asked.where(~out), EACH // 2)):
                    key = [getattr(rows, name) for name in KEYS]
                    for at in range(len(part)):
                        values = [f"{part.columns[name][at]:g}" for name in names]
                        writer.writerow([*key, part.shape[at], *values, f"{part.seconds[at]:.6g}"])


def main(arguments: list[str] | None = None) -> int:
    """Cut the slice from the whole tables."""
    parser = argparse.ArgumentParser(prog="python -m validation.ops.slice", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the aic_*.parquet tables")
    cut(all_rows(parser.parse_args(arguments).data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
