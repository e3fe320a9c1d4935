"""`perfsim doctor`: is this installation able to work?"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import typer

from perfsim import __version__
from perfsim.cli.common import Format, FormatOption, print_csv, print_json
from perfsim.errors import PerfsimError

NARROWEST_TERMINAL = 80


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one check."""

    check: str
    ok: bool
    detail: str


def doctor(output: FormatOption = Format.table) -> None:
    """Check the installation and its data; exit code 1 when something is wrong."""
    findings = [finding for check in (_python, _packages, _data, _calibration, _directory, _terminal)
                for finding in check()]  # fmt: skip
    if output is Format.json:
        print_json([asdict(finding) for finding in findings])
    elif output is Format.csv:
        print_csv([asdict(finding) for finding in findings], columns=["check", "ok", "detail"])
    else:
        for finding in findings:
            typer.echo(f"{'ok      ' if finding.ok else 'problem '} {finding.check}: {finding.detail}")
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


def _python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding("python", sys.version_info >= (3, 11), f"{version}; 3.11 or newer is needed")
    yield Finding("perfsim", True, __version__)


def _packages() -> Iterator[Finding]:
    for name in ("numpy", "pyarrow", "pydantic", "pyyaml", "rich", "typer"):
        try:
            yield Finding(name, True, metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Finding(name, False, "not installed; try: pip install perfsim")


def _data() -> Iterator[Finding]:
    from perfsim.spec import catalog

    try:
        directories = catalog.data_directories()
    except PerfsimError as error:
        yield Finding("data", False, str(error))
        return
    yield Finding("data", bool(directories), os.pathsep.join(map(str, directories)) or "no data directory found")
    yield _loads("models", catalog.list_models(), catalog.model)
    yield _loads("accelerators", catalog.list_accelerators(), catalog.accelerator)
    yield _loads("nodes", catalog.list_nodes(), catalog.node)
    yield _loads("clusters", catalog.list_clusters(), catalog.cluster)
    yield _loads("links", catalog.list_links(), catalog.link)
    yield _loads("storage", catalog.list_storage(), catalog.storage)
    yield _loads("traces", catalog.list_traces(), catalog.trace_path)


def _loads(what: str, names: list[str], load: Callable[[str], object]) -> Finding:
    """Whether everything the catalogue lists can also be read; the first thing that cannot is named."""
    for name in names:
        try:
            load(name)
        except PerfsimError as error:
            return Finding(what, False, f"{name}: {error}")
    return Finding(what, bool(names), f"{len(names)} can be read" if names else "none found")


def _calibration() -> Iterator[Finding]:
    from perfsim.spec.load import DEFAULT_SCENARIO, load_scenario

    try:
        scenario = load_scenario(DEFAULT_SCENARIO)
    except PerfsimError as error:
        yield Finding("default scenario", False, str(error))
        return
    yield Finding("default scenario", True, f"{scenario.name}, coefficients: {scenario.calibration.status}")


def _directory() -> Iterator[Finding]:
    here = Path.cwd()
    writable = os.access(here, os.W_OK)
    yield Finding("working directory", writable, f"{here} is {'' if writable else 'not '}writable")


def _terminal() -> Iterator[Finding]:
    columns = shutil.get_terminal_size().columns
    detail = f"{columns} columns" + ("" if columns >= NARROWEST_TERMINAL else f"; tables need {NARROWEST_TERMINAL}")
    yield Finding("terminal", columns >= NARROWEST_TERMINAL, detail)
