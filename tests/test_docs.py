"""The documents tell the truth: README's examples run, its numbers are the tool's, and what the pages name exists."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest

from perfsim.cli.main import main
from perfsim.report.format import human
from perfsim.run import simulate
from perfsim.spec.load import load_scenario
from perfsim.units import parse_quantity

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
SVG = ROOT / "docs" / "architecture.svg"
PAGES = [ROOT / "README.md", ROOT / "docs" / "architecture.md"]


def blocks(language: str) -> list[str]:
    """README's code blocks in one language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def what_ifs() -> list[tuple[list[str], list[str]]]:
    """(flags, printed cells) of each row of README's table."""
    rows = [line.strip("|").split("|") for line in README.splitlines() if line.startswith("| ") and "---" not in line]
    found = []
    for first, *cells in rows[1:]:
        flags = re.search(r"`(.*?)`", first)
        found.append((shlex.split(flags.group(1)) if flags else [], [cell.strip() for cell in cells]))
    return found


def lines_of_shell() -> list[str]:
    return [line for block in blocks("sh") for line in block.splitlines() if line.strip()]


def test_shell_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    ran = 0
    for line in lines_of_shell():
        program, *arguments = shlex.split(line, comments=True)
        if program == "make":
            assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
        elif program == "perfsim":
            assert main(arguments) == 0, f"{line}\n{capsys.readouterr().err}"
            assert capsys.readouterr().out, line
            ran += 1
        else:
            subprocess.run(["/bin/sh", "-c", line], check=True)
    assert ran >= 4
    assert (tmp_path / "run" / "report.html").is_file()


def test_python_example_runs(tmp_path: Path) -> None:
    (code,) = blocks("python")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.match(r"\d+\.\d+ 0\.\d+ \[", done.stdout)


@pytest.mark.parametrize(("flags", "cells"), what_ifs(), ids=" ".join)
def test_the_numbers_of_the_what_if_table_are_the_tools(flags: list[str], cells: list[str]) -> None:
    """Within 5%, so that the page is rewritten when an answer changes, and not for every rounding."""
    options: dict[str, object] = {"overrides": []}
    for name, value in zip(flags[::2], flags[1::2], strict=True):
        if name == "--set":
            options["overrides"].append(value)
        else:
            options[name.removeprefix("--")] = int(value) if name == "--tp" else value
    result = simulate(load_scenario("mooncake-demo", **options))
    paths = ("ttft.p50", "ttft.p95", "tpot.p95", "goodput.fraction", "cost.usd")
    now = [result.value(path) for path in paths]
    row = " | ".join(human(value, unit) for value, unit in zip(now, ("s", "s", "s", "fraction", "USD"), strict=True))
    printed = [*(parse_quantity(cell, "seconds") for cell in cells[:3]), float(cells[3].rstrip("%")) / 100,
               float(cells[4].lstrip("$"))]  # fmt: skip
    assert printed == pytest.approx(now, rel=0.05, abs=0.005), f"the row should read {row}"


def test_readme_fits_one_screen() -> None:
    assert len(README.splitlines()) <= 75
    assert (ROOT / "docs" / "report.png").stat().st_size < 200_000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page: Path) -> None:
    text = page.read_text()
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert targets
    assert not missing


def test_named_files_and_classes_exist() -> None:
    names = re.findall(r"`([^`\n]+)`", ARCHITECTURE)
    files = [name for name in names if re.fullmatch(r"[\w.-]+(/[\w.-]+)*/([\w-]+\.\w+)?", name)]
    missing = [name for name in files if not any((base / name).exists() for base in (ROOT, ROOT / "perfsim"))]
    assert len(files) > 15
    assert not missing
    source = "\n".join(path.read_text() for path in (ROOT / "perfsim").rglob("*.py"))
    classes = [name for name in names if re.fullmatch(r"([A-Z][a-z]+)+(\.\w+)?", name)]
    unknown = [name for name in classes if f"class {name.partition('.')[0]}" not in source
               or f"def {name.partition('.')[2]}" not in source]  # fmt: skip
    assert len(classes) > 5
    assert not unknown


def test_rooms_are_those_of_the_layers_contract() -> None:
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    layers = [layer.removeprefix("perfsim.") for layer in contract["layers"]]
    section = ARCHITECTURE.split("## Rooms")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == layers
    picture = ElementTree.parse(SVG)  # noqa: S314  # a file of this repository, not of a stranger
    texts = [element.text or "" for element in picture.iter() if element.tag.endswith("text")]
    drawn = [name for text in texts for name in text.split(", ") if name in layers]
    assert drawn[: len(layers)] == layers


def test_modules_in_the_picture_exist() -> None:
    modules = re.findall(r"[\w/]+\.py", SVG.read_text())
    assert modules
    assert [name for name in modules if not list((ROOT / "perfsim").rglob(name))] == []
