"""Which numbers of tokens share the tiles of vLLM's kernel of unquantised experts: read from a data file."""

from __future__ import annotations

from functools import lru_cache

from pydantic import Field

from perfsim.spec import catalog
from perfsim.spec.base import Spec
from perfsim.spec.problems import validated
from perfsim.spec.yaml import load_yaml

FILE = "expert-tiles.yaml"


class TunedExperts(Spec):
    """Experts of one width on one GPU; equal `tiles` are shared by the numbers of tokens at their places."""

    experts: int = Field(gt=0)
    width: int = Field(gt=0)
    tiles: tuple[int, ...]


class ExpertTiles(Spec):
    """The file: numbers of `tokens`, and per device the experts that are tuned for them."""

    tokens: tuple[int, ...]
    devices: dict[str, tuple[TunedExperts, ...]]


def tiles_of(accelerator: str, *, experts: int, width: int) -> dict[int, int]:
    """Tiles by number of tokens; empty where nothing is tuned for these experts on this device."""
    table = _table()
    for tuned in table.devices.get(accelerator, ()):
        if (tuned.experts, tuned.width) == (experts, width):
            return dict(zip(table.tokens, tuned.tiles, strict=True))
    return {}


@lru_cache(maxsize=1)
def _table() -> ExpertTiles:
    for root in catalog.data_directories():
        path = root / "hardware" / "calibration" / FILE
        if path.is_file():
            return validated(ExpertTiles, load_yaml(path), where=str(path))
    return ExpertTiles(tokens=(), devices={})
