"""The layers contract has teeth: the import-linter configuration in pyproject.toml names every package."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_module_at_the_top_belongs_to_a_layer() -> None:
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    modules = {path.stem for path in (ROOT / "perfsim").glob("*.py") if not path.stem.startswith("__")}
    packages = {path.parent.name for path in (ROOT / "perfsim").glob("*/__init__.py")}
    assert {f"perfsim.{name}" for name in modules | packages} == set(contract["layers"])
