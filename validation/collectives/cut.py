"""Cuts the committed slice out of the whole tables: `python -m validation.collectives.cut DIR`.

Rows of aiconfigurator (Apache-2.0), Vidur and APEX (MIT) on A100, H100, H200, B200 and GB200, the newest version of
each backend, the first size of each factor of four and the largest. Sources, licences and traps:
`validation/measured/collectives.md`.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterable, Sequence
from math import log2
from pathlib import Path
from typing import Any

from validation.collectives.rows import COLLECTIVE_COLUMNS, EXPERT_COLUMNS, MEASURED, expert_times

SOURCES = ("aiconfigurator", "vidur", "apex_plus")
SYSTEMS = ("a100_sxm", "a100_dgx", "h100_sxm", "h100_dgx", "h100_sxm_80gb", "h200_sxm", "h200_sxm_141gb", "b200_sxm",
           "gb200")  # fmt: skip


def main() -> None:
    """Write both files of the slice."""
    import pyarrow.parquet as pq

    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m validation.collectives.cut DIR")
    whole = pq.read_table(Path(sys.argv[1]) / "collectives.parquet").to_pylist()
    rows = [row for row in whole if row["source"] in SOURCES and row["system"] in SYSTEMS
            and row["dtype"] != "int8" and row["impl"] not in ("vllm_eager", "sglang_eager")]  # fmt: skip
    rows = _newest(rows, key=lambda row: (row["source"], row["system"], row["framework"], row["op_name"]))
    rows = _thinned(rows, key=lambda row: tuple(row[name] for name in COLLECTIVE_COLUMNS[:8]), size="bytes")
    _write("collectives.csv", COLLECTIVE_COLUMNS, rows)
    experts = [row for row in expert_times(pq.read_table(Path(sys.argv[1]) / "aic_deepep.parquet").to_pylist())
               if row["hidden_size"] == 7168 and row["num_topk"] == 8 and row["num_experts"] == 256
               and row["dispatch_sms"] in (None, 20)]  # fmt: skip
    experts = _newest(experts, key=lambda row: (row["system"], row["mode"], row["node_num"]))
    experts = _thinned(experts, key=lambda row: (row["system"], row["mode"], row["node_num"]), size="num_token")
    _write("expert-dispatch.csv", EXPERT_COLUMNS, experts)


def _newest(rows: Iterable[dict[str, Any]], *, key: Callable[[dict[str, Any]], Any]) -> list[dict[str, Any]]:
    """Of each group, the rows of its newest version."""
    groups: dict[Any, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        groups.setdefault(key(row), {}).setdefault(row["version"], []).append(row)
    return [row for versions in groups.values() for row in versions[max(versions, key=_version)]]


def _version(text: str) -> tuple[int, ...]:
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in text.split("."))


def _thinned(
    rows: Iterable[dict[str, Any]], *, key: Callable[[dict[str, Any]], Any], size: str
) -> list[dict[str, Any]]:
    """Of each group, the first row at or above every power of four, and the last row."""
    kept: dict[tuple[Any, int], dict[str, Any]] = {}
    last: dict[Any, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: (key(row), row[size])):
        if row[size] > 0:
            kept.setdefault((key(row), int(log2(row[size]) // 2)), row)
            last[key(row)] = row
    extra = [row for row in last.values() if not any(row is other for other in kept.values())]
    return sorted([*kept.values(), *extra], key=lambda row: (key(row), row[size]))


def _write(name: str, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    with (MEASURED / name).open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in rows:
            values = [row[column] for column in columns]
            writer.writerow(["" if v is None else f"{v:.6g}" if isinstance(v, float) else v for v in values])


if __name__ == "__main__":
    main()
