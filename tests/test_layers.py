"""The layers contract has teeth: the import-linter configuration in pyproject.toml names every package."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_module_at_the_top_belongs_to_a_layer() -> None:
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    top = {f"perfsim.{path.stem}" for path in (ROOT / "perfsim").iterdir()
           if (path.suffix == ".py" and not path.stem.startswith("__")) or (path / "__init__.py").is_file()}  # fmt: skip
    assert top == set(contract["layers"])
