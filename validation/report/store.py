"""Results of sections as JSON files, the hashes of what they were made from, and their blocks in the report.

A section is run again when its table is at hand; otherwise its stored results are shown, with the hash of the table
that they were made from and a note when the coefficients have changed since.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("results")
CALIBRATION = ROOT / "hardware" / "calibration"
MEASURED = ROOT / "validation" / "measured"
SHORT = 12  # digits of a hash that are shown to readers
_BLOCK = re.compile(r"<!-- section: (\S+) .*?-->\n.*?<!-- end: \1 -->\n", re.DOTALL)

Results = dict[str, Any]


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def coefficients() -> str:
    """SHA-256 over all files of `hardware/calibration`, with their names."""
    found = hashlib.sha256()
    for path in sorted(CALIBRATION.rglob("*.yaml")):
        found.update(f"{path.relative_to(CALIBRATION).as_posix()} {sha256(path)}\n".encode())
    return found.hexdigest()


def save(name: str, results: Results, *, folder: Path = RESULTS) -> None:
    """Write the results of a section; equal results give equal bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def load(name: str, *, folder: Path = RESULTS) -> Results | None:
    """The stored results of a section; None when it was never run."""
    path = folder / f"{name}.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def stamped(results: Results, paths: Iterable[Path]) -> Results:
    """The results with the hashes of the tables and coefficients that they were made from."""
    tables = {path.name: sha256(path) for path in paths}
    return {**rounded(results), "tables": tables, "coefficients": coefficients()}


def rounded(value: Any, digits: int = 6) -> Any:
    """Floats to six significant digits: enough to print, and the same on every processor."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, Mapping):
        return {key: rounded(one, digits) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one, digits) for one in value]
    return value


def provenance(results: Results) -> str:
    """A line that says which tables and coefficients the numbers of a section come from."""
    tables = ", ".join(f"`{name}` (sha256 {digest[:SHORT]})" for name, digest in sorted(results["tables"].items()))
    line = f"Made from {tables or 'no table'}"
    if results["coefficients"] == coefficients():
        return f"{line} with the coefficients of this tree."
    return f"{line} **with other coefficients than this tree's** (sha256 {results['coefficients'][:SHORT]})."


def block(name: str, results: Results | None, text: str) -> str:
    """A section between its markers, which name the tables and coefficients by their whole hashes."""
    tables = (results or {}).get("tables", {})
    marks = [f"table: {table} sha256: {digest}" for table, digest in sorted(tables.items())]
    if results is not None:
        marks.append(f"coefficients: {results['coefficients']}")
    return f"<!-- section: {name} {' '.join(marks)} -->\n{text.strip()}\n<!-- end: {name} -->\n"


def blocks(document: str) -> dict[str, str]:
    """The sections of a report by name, markers included."""
    return {found.group(1): found.group(0) for found in _BLOCK.finditer(document)}


def replaced(document: str, new: Mapping[str, str]) -> str:
    """The report with sections replaced in their places; those that it does not have yet come last, in order."""
    have = blocks(document)
    for name, text in new.items():
        document = document.replace(have[name], text) if name in have else f"{document.rstrip()}\n\n{text}"
    return document
