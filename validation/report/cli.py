"""The command line of the report.

    python -m validation.report [--data DIR] [--only SECTION]... [--output FILE]

With `--data`, the folder of the whole tables (`serving/`, `ops/`), every section is run on them. Without it, sections
whose rows are committed are run again and the others are shown as they were stored, with the hash of their table.
Figures lie beside the report and results in `report/results` there; what is kept comes from the committed ones.
Progress is on stderr. Exit status 2 with one line for bad input.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from perfsim.errors import InputError, PerfsimError, nearest
from perfsim.spec.yaml import load_yaml
from validation.report import headline, peers
from validation.report.filled import filled
from validation.report.sections import Section, sections
from validation.report.store import RESULTS, ROOT, Results, block, load, save

REPORT = ROOT / "validation" / "REPORT.md"
BUDGET = Path(__file__).with_name("budget.md")
CHAPTERS = {
    "isim": "Load tests of vLLM", "silicon": "Closed loops of several engines", "operators": "Kernels",
    "collectives": "Collectives", "long-prefills": "Long prefills",
}  # fmt: skip
HEADER = """\
# What perfsim misses

Predictions against measurements. `make validate DATA=DIR` runs everything on the whole tables in DIR; `make validate`
runs what is committed and keeps the rest. Every section names its tables by their SHA-256, and says when coefficients
have changed since it was run. No coefficient belongs to one experiment; bad figures are in.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run sections and write the report; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m validation.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of the whole tables, with serving/ and ops/")
    parser.add_argument("--only", action="append", default=[], metavar="SECTION", help="run this one; may be repeated")
    parser.add_argument("--output", type=Path, default=REPORT, metavar="FILE")
    options = parser.parse_args(arguments)
    try:
        write(options.output, data=options.data, only=options.only)
    except PerfsimError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def write(output: Path, *, data: Path | None, only: Sequence[str] = ()) -> None:
    """Run what can be run (or `only` these) and write the report with its figures."""
    if data is not None and not data.is_dir():
        raise InputError(f"--data: there is no folder '{data}'")
    every = list(sections())
    names = [section.name for section in every]
    for name in only:
        if name not in names:
            raise InputError(f"--only: no section '{name[:80]}'{nearest(name, names)}")
    figures, results = output.parent / "figures", output.parent / "report" / "results"
    figures.mkdir(parents=True, exist_ok=True)
    if output.parent.resolve() != REPORT.parent:
        for kept in sorted((REPORT.parent / "figures").glob("*.svg")):
            shutil.copy(kept, figures)
    for section in every:
        paths = section.inputs(data)
        if paths is None or (only and section.name not in only):
            print(f"{section.name}: kept", file=sys.stderr)
            continue
        started = time.monotonic()
        save(section.name, section.run(paths, figures), folder=results)
        print(f"{section.name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    output.write_text(document(every, results), encoding="utf-8")


def document(every: Sequence[Section], results: Path = RESULTS) -> str:
    """The whole report from the results in a folder, and from the committed ones where it has none."""
    stored = {section.name: load(section.name, folder=results) or load(section.name) for section in every}
    everything: dict[str, Results] = {name: found for name, found in stored.items() if found is not None}
    others = peers.render(everything.get("isim"), everything.get("left-out"))
    budget = filled(BUDGET.read_text(encoding="utf-8"), {**everything, **coefficients()}, source=BUDGET.name)
    return "\n".join([
        HEADER, "## Headline\n", block("headline", None, "\n".join(headline.render(everything))),
        "## What others published\n", block("peers", None, "\n".join(others)),
        "## Error budget\n", block("budget", None, budget), *_parts(every, everything),
    ])  # fmt: skip


def coefficients() -> dict[str, dict[str, Any]]:
    """Files of `hardware/calibration` by "calibration/STEM": fits state their own errors there."""
    folder = ROOT / "hardware" / "calibration"
    return {f"calibration/{path.stem}": load_yaml(path) for path in sorted(folder.rglob("*.yaml"))}


def _parts(every: Sequence[Section], everything: dict[str, Results]) -> Iterator[str]:
    for section in every:
        if section.name in CHAPTERS:
            yield f"## {CHAPTERS[section.name]}\n"
        results = everything.get(section.name)
        if results is None:
            tables = ", ".join(f"`{name}`" for name in section.tables)
            yield block(section.name, None, f"*{section.name}: not run yet; `make validate DATA=DIR` needs {tables}.*")
        else:
            yield block(section.name, results, "\n".join(section.show(results)))
