"""`python -m perfsim.calibrate.deepep --data DIR`: fits DeepEP, writes hardware/calibration/exchanges.yaml."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from perfsim.calibrate.fit import CLOSE, SOFT, STEPS, sandwich
from perfsim.calibrate.rows import Array
from perfsim.cost.deepep import Bounds, bounds, seconds_of
from perfsim.cost.topology import Fabric, fabric
from perfsim.errors import InputError
from perfsim.ops.exchange import SCALE_BYTES, copies, reached
from perfsim.ops.op import Collective, Direction, ExchangeKernels, Routed
from perfsim.spec import catalog
from perfsim.spec.cluster import Cluster, FatTree
from perfsim.spec.curves import ExchangeCurve

TABLE = "aic_deepep"
SMS = 20.0  # DeepEP's own number (vLLM 0.32, vllm/distributed/device_communicators/all2all.py: num_sms = 20)
# The nodes that stand for aiconfigurator's systems, and how many GPUs of one the benchmark counts as a node.
SYSTEMS = {"h100_sxm": ("dgx-h100", 8), "h200_sxm": ("dgx-h200", 8), "b200_sxm": ("dgx-b200", 8),
           "gb200": ("gb200-nvl72", 4)}  # fmt: skip
GROUPS = 4  # the normal kernels' benchmark draws the experts of a token from so many nodes at most
# Start, lowest and highest value; the search runs over logarithms. Shares end at one, the others keep it finite.
LIMITS = {
    "launch": (20e-6, 1e-6, 2e-4), "hop": (5e-6, 1e-7, 1e-4), "link_bandwidth": (0.6, 0.05, 1.0),
    "network_bandwidth": (0.6, 0.05, 1.0), "sm_bandwidth": (20e9, 1e9, 1e12), "row_seconds": (1e-7, 1e-9, 1e-5),
}  # fmt: skip
COPYING = ("sm_bandwidth", "row_seconds")  # of kernels on SMs of their own
HEADER = """\
# Expert exchanges fitted to public measurements; do not edit: `python -m perfsim.calibrate.deepep --data DIR` writes
# this file. Formula: perfsim/cost/deepep.py. The table is DeepEP's own benchmark on SGLang's images, warm and alone;
# normal kernels are timed without the notification before them. Pooled over all systems.
# sms: what DeepEP takes unless told otherwise (vLLM 0.32, vllm/distributed/device_communicators/all2all.py). by_nodes:
# absolute relative errors; normal kernels miss most between nodes, where eight of them reach a third of the rate of
# four. left_out: errors on a system when the others are fitted. stderr: clustered by system and shape; 0 at a bound.
# covariance: of the logarithms of the coefficients in the order of stderr, lower triangle. sha256: of the fitted rows.
"""


@dataclass(frozen=True)
class Rows:
    """Rows of one kind of kernel and direction: what bounds each, its SMs, seconds, and the columns it came from."""

    name: str
    system: np.ndarray
    shape: np.ndarray
    columns: dict[str, Array]
    found: Bounds
    seconds: Array

    def __len__(self) -> int:
        return len(self.seconds)

    @property
    def sms(self) -> Array | None:
        return self.columns.get("sms")

    def where(self, keep: np.ndarray) -> Rows:
        """The rows that a mask picks."""
        found = Bounds(*(np.asarray(part)[keep] for part in self.found))
        columns = {name: values[keep] for name, values in self.columns.items()}
        return Rows(self.name, self.system[keep], self.shape[keep], columns, found, self.seconds[keep])

    def digest(self) -> str:
        """SHA-256 over the sorted rows: system, columns and seconds."""
        names = sorted(self.columns)
        lines = sorted(
            f"{self.system[row]} {' '.join(repr(float(self.columns[name][row])) for name in names)} "
            f"{float(self.seconds[row])!r}"
            for row in range(len(self))
        )
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def exchanges_of(row: Mapping[str, Any], gpus: int) -> Iterator[tuple[Collective, float | None]]:
    """(dispatch in FP8 with a scale per 128 values, or combine in BF16; SMs) of a row of the table, on `gpus`."""
    nodes = int(row["node_num"])
    tokens, hidden, picks = float(row["num_token"]), int(row["hidden_size"]), int(row["num_topk"])
    experts = int(row["num_experts"])
    low, drawn = row["mode"] == "low_latency", min(nodes, GROUPS)
    pool = experts * drawn // nodes
    per_node = gpus // nodes
    kernels: ExchangeKernels = "low_latency" if low else "normal"
    sizes: dict[Direction, float] = {"dispatch": hidden + hidden * SCALE_BYTES, "combine": 2.0 * hidden}
    for direction, size in sizes.items():
        routed = Routed(kernels, direction, tokens, size, experts, picks)
        own = copies(kernels, gpus=drawn * per_node, experts=pool, picks=picks)
        across = None
        if nodes > 1 and not low:
            across = tokens * size * drawn * reached(pool, experts // nodes, picks) * (nodes - 1) / nodes
        work = Collective("all_to_all", direction, 1, tokens * size * own, gpus, across_bytes=across, routed=routed)
        sms = row.get(f"{direction}_sms") or row.get("dispatch_sms")
        yield work, None if low or not sms else float(sms)


def gpus_of(row: Mapping[str, Any]) -> int:
    """GPUs of a row of the table; KeyError for an unknown system."""
    return int(row["node_num"]) * SYSTEMS[row["system"]][1]


@cache
def network(system: str, nodes: int) -> Fabric:
    """The links of a system: one node, or several on one layer of switches."""
    node = catalog.node(SYSTEMS[system][0])
    if nodes == 1:
        return fabric(node)
    switches = FatTree(rail_optimised=True, radix=64, levels=1, hop_latency=0.0)
    return fabric(node, Cluster(name=node.name, label="", node=node, node_count=nodes, network=switches))


def measured(row: Mapping[str, Any], direction: str) -> float:
    """Seconds of a direction; of the normal kernels without the notification."""
    return float(row[f"{direction}_{'avg_t' if row['mode'] == 'low_latency' else 'transmit'}_us"]) * 1e-6


def all_rows(table: Iterable[Mapping[str, Any]]) -> list[Rows]:
    """Groups of rows by kernels and direction, in order."""
    raw: dict[str, list[tuple[str, str, dict[str, float], Bounds, float]]] = {}
    for row in table:
        if row["system"] not in SYSTEMS:
            continue
        for work, sms in exchanges_of(row, gpus_of(row)):
            direction = work.name
            columns = {"tokens": row["num_token"], "hidden": row["hidden_size"], "picks": row["num_topk"],
                       "experts": row["num_experts"], "gpus": gpus_of(row), "nodes": row["node_num"]}  # fmt: skip
            columns |= {} if sms is None else {"sms": sms}
            shape = "x".join(f"{columns[name]:g}" for name in ("hidden", "picks", "experts", "nodes"))
            path = network(row["system"], int(row["node_num"])).path(work.group)
            entry = (row["system"], shape, columns, bounds(work, path), measured(row, direction))
            raw.setdefault(f"{row['mode']}-{direction}", []).append(entry)
    return [_grouped(name, entries) for name, entries in sorted(raw.items())]


def _grouped(name: str, entries: list[tuple[str, str, dict[str, float], Bounds, float]]) -> Rows:
    systems, shapes, columns, found, seconds = zip(*entries, strict=True)
    own = {key: np.array([each[key] for each in columns], dtype=np.float64) for key in columns[0]}
    parts = Bounds(*np.array(found, dtype=np.float64).T)
    return Rows(name, np.array(systems), np.array(shapes), own, parts, np.array(seconds))


def names_of(rows: Rows) -> list[str]:
    """The coefficients that such kernels have."""
    return [name for name in LIMITS if rows.sms is not None or name not in COPYING]


def curve_of(rows: Rows, logs: Array) -> ExchangeCurve:
    """The curve with these logarithms of its coefficients."""
    values = dict(zip(names_of(rows), np.exp(logs).tolist(), strict=True))
    return ExchangeCurve(sms=None if rows.sms is None else SMS, **values)


def fit(rows: Rows) -> tuple[Array, Array]:
    """(logarithms of the coefficients, their covariance): soft-L1 relative errors, as for operators."""
    from scipy.optimize import least_squares

    start, low, high = (np.log([LIMITS[name][at] for name in names_of(rows)]) for at in range(3))
    found = least_squares(
        lambda logs: np.log1p(errors(rows, logs)), start, bounds=(low, high), loss="soft_l1", f_scale=SOFT,
        ftol=CLOSE, xtol=CLOSE, max_nfev=STEPS,
    )  # fmt: skip
    inside = (found.x > low + 1e-6) & (found.x < high - 1e-6)
    covariance = np.zeros((len(start), len(start)))
    clusters = np.char.add(np.char.add(rows.system, " "), rows.shape)
    covariance[np.ix_(inside, inside)] = sandwich(found.jac[:, inside], found.fun, clusters)
    return np.asarray(found.x), covariance


def errors(rows: Rows, logs: Array) -> Array:
    """Relative errors, signed."""
    return np.asarray(seconds_of(curve_of(rows, logs), rows.found, sms=rows.sms) / rows.seconds - 1.0)


def document(groups: list[Rows], versions: Iterable[str]) -> Iterator[str]:
    """Lines of the file."""
    yield HEADER.rstrip("\n")
    yield f"source: ai-dynamo/aiconfigurator@095f58a (Apache-2.0), {TABLE}"
    yield f'versions: "DeepEP in SGLang {", ".join(sorted(versions))}"'
    yield "exchanges:"
    for rows in groups:
        logs, covariance = fit(rows)
        missed = np.abs(errors(rows, logs))
        curve = {name: value for name, value in curve_of(rows, logs).model_dump().items() if value is not None}
        stderr = dict(zip(names_of(rows), np.exp(logs) * np.sqrt(np.diag(covariance)), strict=True))
        spans = (f"{name}: [{column.min():g}, {column.max():g}]" for name, column in rows.columns.items())
        triangle = (f"[{', '.join(f'{value:.1e}' for value in line[: at + 1])}]" for at, line in enumerate(covariance))
        yield f"  {rows.name}:"
        yield f"    curve: {_flow(curve if rows.sms is not None else curve | {'row_seconds': 0})}"
        yield f"    rows: {len(rows)}"
        yield f"    sha256: {rows.digest()}"
        yield f"    median: {np.median(missed):.4f}"
        yield f"    p90: {np.quantile(missed, 0.9):.4f}"
        yield "    by_nodes:"
        for nodes in np.unique(rows.columns["nodes"]):
            yield f"      {nodes:g}: {_miss(missed[rows.columns['nodes'] == nodes])}"
        yield "    left_out:"
        for system in sorted(SYSTEMS):
            here = rows.system == system
            others, _ = fit(rows.where(~here))
            yield f"      {SYSTEMS[system][0]}: {_miss(np.abs(errors(rows.where(here), others)))}"
        yield f"    stderr: {_flow(stderr)}"
        yield f"    range: {{{', '.join(spans)}}}"
        yield f"    covariance: [{', '.join(triangle)}]"


def _miss(absolute: Array) -> str:
    high = np.quantile(absolute, 0.9)
    return f"{{rows: {len(absolute)}, median: {np.median(absolute):.4f}, p90: {high:.4f}}}"


def _flow(values: Mapping[str, float]) -> str:
    return "{" + ", ".join(f"{name}: {value:.4g}" for name, value in values.items()) + "}"


def main(arguments: list[str] | None = None) -> int:
    """Fit the table and write the file; 2 for bad input."""
    import pyarrow.parquet as pq

    parser = argparse.ArgumentParser(prog="python -m perfsim.calibrate.deepep", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help=f"folder of {TABLE}.parquet")
    parser.add_argument("--output", type=Path, default=Path("hardware/calibration/exchanges.yaml"))
    options = parser.parse_args(arguments)
    path = options.data / f"{TABLE}.parquet"
    try:
        if not path.is_file():
            raise InputError(f"{path}: no such table")
        table = pq.read_table(path).to_pylist()
        lines = list(document(all_rows(table), {str(row["version"]) for row in table}))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
