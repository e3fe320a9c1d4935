"""An engine's command-line flags: what they are called, and what perfsim does with each of them.

`flags/ENGINE.json` lists names, types and choices as the engine's own parser has them; `flags/ENGINE.yaml` puts every
one of them into exactly one class:

- `keys`: its value is that of a scenario key; `rules`: the engine's module here turns it into scenario keys;
- `irrelevant`: it changes neither speed nor memory;
- `unmodelled`: it may, and perfsim does not know how; grouped by what it is about.

`former` are flags that the engine no longer has but that old command lines still carry, with one of these classes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from perfsim.spec.yaml import load_yaml

FLAGS = Path(__file__).with_name("flags")
ENGINES = ("vllm", "sglang", "trtllm")
Role = Literal["key", "rule", "irrelevant", "unmodelled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """One flag; `names[0]` is its long form, `topic` says what an unmodelled one is about."""

    names: tuple[str, ...]
    kind: str
    nargs: str | None = None
    choices: tuple[Any, ...] = ()
    default: Any = None
    role: Role
    key: str | None = None
    topic: str | None = None
    former: bool = False

    @property
    def name(self) -> str:
        """The long form without dashes."""
        return self.names[0].lstrip("-")


@dataclass(frozen=True, slots=True, kw_only=True)
class FlagTable:
    """All flags of one engine and how its command lines begin."""

    engine: str
    program: str
    version: str
    source: str
    flags: tuple[Flag, ...]
    starts: tuple[tuple[str, ...], ...]
    abbreviations: bool
    separator: str | None
    dotted_json: bool
    model_first: bool
    defaults: dict[str, Any]
    approximations: tuple[str, ...]
    environment: tuple[str, ...]
    options: dict[str, Any]

    def named(self, name: str) -> Flag:
        """The flag with this long form (without dashes)."""
        return next(flag for flag in self.flags if flag.name == name)


def load_table(engine: str) -> FlagTable:
    """The table of `engine`, one of `ENGINES`."""
    derived = json.loads((FLAGS / f"{engine}.json").read_text(encoding="utf-8"))
    ours = load_yaml(FLAGS / f"{engine}.yaml")
    roles = dict(_roles(ours))
    rows = [*derived["flags"], *({**row, "former": True} for row in ours.get("former", []))]
    return FlagTable(
        engine=engine,
        program=ours["program"],
        version=derived["version"],
        source=derived["source"],
        flags=tuple(_flag(row, roles) for row in rows),
        starts=tuple(tuple(start.split()) for start in ours["starts"]),
        abbreviations=ours["abbreviations"],
        separator=ours.get("separator"),
        dotted_json=ours.get("dotted_json", False),
        model_first=ours.get("model_first", False),
        defaults=ours.get("defaults", {}),
        approximations=tuple(ours.get("approximations", ())),
        environment=tuple(ours["environment"]),
        options=ours.get("options", {}),
    )


def classes(engine: str) -> list[tuple[str, Role]]:
    """(flag, class) for every mention in `flags/ENGINE.yaml`: a table is right when each flag has exactly one."""
    return [(name, role["role"]) for name, role in _roles(load_yaml(FLAGS / f"{engine}.yaml"))]


def _roles(ours: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, key in ours["keys"].items():
        yield name, {"role": "key", "key": key}
    for name in ours["rules"]:
        yield name, {"role": "rule"}
    for name in ours["irrelevant"]:
        yield name, {"role": "irrelevant"}
    for topic, names in ours["unmodelled"].items():
        for name in names:
            yield name, {"role": "unmodelled", "topic": topic}


def _flag(row: dict[str, Any], roles: dict[str, dict[str, Any]]) -> Flag:
    name = row["names"][0].lstrip("-")
    return Flag(
        names=tuple(row["names"]), kind=row["kind"], nargs=row.get("nargs"), choices=tuple(row.get("choices", ())),
        default=row.get("default"), former=row.get("former", False), **roles[name],
    )  # fmt: skip
