"""The command line of the comparison.

    python -m validation.compare --table FILE.parquet [--where COLUMN=VALUE]... [--format json] [--no-bands]

The kind of table is read off its columns, so that other tables with the same columns work. Shares are fractions, not
percent: with e = predicted / measured - 1, `mape_mean`, `mape_median` and `mape_p90` are statistics of |e| and `bias`
is the mean of e (positive: predicted too large). `groups` has every column of at most 50 values, those with measured
values too, and `metric` whatever it has; of single requests, columns that have one value in each run. Its values are
texts: 1 for 1.0 as well, true and false, and `null` for a missing one. Exit status 2 with one line on stderr for bad
input.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from perfsim.errors import InputError, PerfsimError, nearest
from validation.compare.columns import typed
from validation.compare.kinds import kind_of
from validation.compare.outcome import report
from validation.compare.table import read_table, where

FORMATS = ("text", "json")
PIPE_CLOSED = 141  # 128 + SIGPIPE, as `perfsim` ends


class Parser(argparse.ArgumentParser):
    """Wrong arguments are one line, like all bad input."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def compare(path: Path, conditions: Sequence[str] = (), *, bands: bool = True) -> dict[str, Any]:
    """The comparison of the table at `path`, restricted to rows that meet all COLUMN=VALUE conditions."""
    table = replace(where(read_table(path), conditions), bands=bands)
    kind = kind_of(table)
    kept, outcome = kind.compare(typed(table, kind.columns) if kind.read else table)
    return report(kept, outcome, name=path.name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = Parser(
        prog="python -m validation.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--table", type=Path, required=True, metavar="FILE.parquet", help="the measured table")
    parser.add_argument("--where", action="append", default=[], metavar="COLUMN=VALUE",
                        help="keep rows whose column has this value ('null': none); may be repeated")  # fmt: skip
    parser.add_argument("--format", metavar="|".join(FORMATS), default="text", help="a table, or all of it as JSON")
    parser.add_argument("--no-bands", action="store_true", help="predictions only, which is quicker")
    options, unknown = parser.parse_known_args(arguments)
    try:
        _check(parser, options.format, unknown)
        found = compare(options.table, options.where, bands=not options.no_bands)
    except PerfsimError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    try:
        print(json.dumps(found, indent=1, allow_nan=False) if options.format == "json" else "\n".join(text(found)))
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (`| head`) has gone; point stdout elsewhere so that the interpreter's last flush cannot fail too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return PIPE_CLOSED
    return 0


def _check(parser: argparse.ArgumentParser, chosen: str, unknown: Sequence[str]) -> None:
    if unknown:
        known = [flag for flag in parser.format_usage().replace("[", " ").replace("]", " ").split() if flag[:2] == "--"]
        raise InputError(f"unknown argument '{unknown[0]}'{nearest(unknown[0], known)}")
    if chosen not in FORMATS:
        raise InputError(f"--format: expected {' or '.join(FORMATS)}, got '{chosen}'{nearest(chosen, FORMATS)}")


def text(found: dict[str, Any]) -> Iterator[str]:
    """The comparison as lines for a terminal, without its groups."""
    yield f"{found['table']}: {found['rows']:,} rows, {found['expressible']:,} expressible"
    for reason, count in sorted(found["not_expressible"].items(), key=lambda item: -item[1]):
        yield f"  {count:>9,}  {reason}"
    if found["metrics"]:
        yield f"{'metric':24}{'n':>9}{'mean':>9}{'median':>9}{'p90':>9}{'bias':>9}{'cover 90':>10}{'width':>8}"
    for name, values in found["metrics"].items():
        errors = "".join(f"{values[key]:>9.1%}" for key in ("mape_mean", "mape_median", "mape_p90"))
        cover, width = (_share(values[key]) for key in ("coverage_90", "band_width_median"))
        yield f"{name:24}{values['n']:>9,}{errors}{values['bias']:>+9.1%}{cover:>10}{width:>8}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"
