"""How often perfsim's engines decide as vLLM did: `python -m validation.scheduler.compare [case ...]`.

Replays `cases/*.json` and compares the scheduler's calls one by one: the same requests with the same number of new
tokens, the same admissions with the same cache hits, the same preemptions. Calls are compared by position, so that
after one different decision all steps count as different until the schedules meet again. Free blocks after the call are
compared too, in a column of their own. Exit status 0 always: what must hold is in the tests.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from validation.scheduler.replay import ENGINES, Decision, recorded, replayed

CASES_DIR = Path(__file__).parent / "cases"


@dataclass(frozen=True, slots=True)
class Comparison:
    """One case in one engine; `first` describes the first difference, empty when there is none."""

    case: str
    engine: str
    steps: int
    equal: int
    equal_blocks: int
    first: str


def logs(names: set[str] | None = None) -> Iterator[dict[str, Any]]:
    """The committed logs, by name."""
    for path in sorted(CASES_DIR.glob("*.json")):
        if not names or path.stem in names:
            yield json.loads(path.read_text())


def compare(log: dict[str, Any], *, engine: str) -> Comparison:
    """Replay one log."""
    theirs, ours = recorded(log), replayed(log, engine=engine)
    pairs = list(zip_longest(theirs, ours))
    equal = [a is not None and b is not None and a.same(b) for a, b in pairs]
    blocks = sum(a is not None and b is not None and a.free == b.free for a, b in pairs)
    first = ""
    if not all(equal):
        at = equal.index(False)
        first = f"call {at}: vLLM {_said(pairs[at][0])}; perfsim {_said(pairs[at][1])}"
    return Comparison(log["case"], engine, len(pairs), sum(equal), blocks, first)


def _said(decision: Decision | None) -> str:
    return "has finished" if decision is None else str(decision)


def main() -> None:
    """Print the table and what differs first in each case."""
    results = [compare(log, engine=engine) for log in logs(set(sys.argv[1:])) for engine in ENGINES]
    print(f"{'case':32}{'engine':10}{'steps':>6}{'equal':>7}{'same free blocks':>18}")
    for item in results:
        print(f"{item.case:32}{item.engine:10}{item.steps:6}{item.equal:7}{item.equal_blocks:18}")
        if item.first:
            print(f"    {item.first}")
    for engine in ENGINES:
        mine = [item for item in results if item.engine == engine]
        steps, equal, blocks = (sum(getattr(i, name) for i in mine) for name in ("steps", "equal", "equal_blocks"))
        print(f"{engine}: {equal} of {steps} steps equal ({equal / steps:.2%}), free blocks in {blocks / steps:.2%}")


if __name__ == "__main__":
    main()
