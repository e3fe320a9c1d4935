"""What was compared, as entries that the first tables and the targets are made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from validation.report.split import ALL, Listed, Target, split
from validation.report.store import Results
from validation.report.twins import SEEN

Everything = Mapping[str, Results]
LEFT_OUT = "leave one out"
FITTED = ("fitted", SEEN)  # roles of rows that say little


@dataclass(frozen=True, slots=True)
class Entry:
    """A metric of some rows of a table: their role, which they are, the summary, and the bound that it should keep."""

    table: str
    rows: str
    role: str
    metric: str
    found: Mapping[str, Any]
    target: Target | None


def entries(everything: Everything) -> Iterator[Entry]:
    """All metrics that were compared, tables in the order of split.yaml: all rows of a role, or those of subsets.

    Sections that refit without a group and predict it add what they found to a table's rows: their results have a list
    "leave one out" of {"section": of the table, "rows": a subset or "all", "metrics": {name: summary}}.
    """
    for listed in split().tables.values():
        results = everything.get(listed.section)
        if results is None:
            continue
        for subset in listed.headline:
            found = results["roles"] if subset == ALL else results["subsets"].get(subset, {})
            yield from _entries(listed, subset, found)
        for other in everything.values():
            for left in other.get(LEFT_OUT, ()):
                if left["section"] == listed.section:
                    yield from _entries(listed, left["rows"], {LEFT_OUT: left["metrics"]})


def _entries(listed: Listed, subset: str, by_role: Mapping[str, Mapping[str, Any]]) -> Iterator[Entry]:
    targets = {target.metric: target for target in listed.targets if (target.subset or ALL) == subset}
    for role, found in by_role.items():
        for name, title in listed.metrics.items():
            if name in found:
                yield Entry(listed.short, subset, role, title, found[name], targets.get(name))
