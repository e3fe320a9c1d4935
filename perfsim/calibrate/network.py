"""`python -m perfsim.calibrate.network --data DIR`: fits NCCL between nodes, writes hardware/calibration/network.yaml.

All-reduces of public documents whose network is published (`collectives_more`): nccl-tests of two nodes of H100, four
of B200, and single large sizes. Left out are an older installation of the same nodes, rows without a size, and rows of
networks that nobody describes: the pair of A100 nodes in `collectives` reaches 8 GB/s between two GPUs, a third of one
card of a DGX A100.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from perfsim.calibrate.bounds import US, Bounds
from perfsim.calibrate.fit import SOFT, sandwich
from perfsim.calibrate.rows import Array, read
from perfsim.calibrate.transfer import spread
from perfsim.cost.collective import algorithm_seconds
from perfsim.cost.topology import Fabric, fabric
from perfsim.errors import InputError
from perfsim.ops.op import Collective
from perfsim.spec.calibration import DeviceEfficiency
from perfsim.spec.catalog import node
from perfsim.spec.cluster import Cluster, FatTree
from perfsim.spec.curves import NETWORK, LinkCurve
from perfsim.spec.load import find_calibration

TABLE = "collectives_more"
COLUMNS = ("source", "collective", "n_gpus", "nodes", "gpu", "inter_link", "message_bytes", "busbw_GBps", "time_us",
           "notes")  # fmt: skip
# p5, p5en and p6-b200 have EFA cards instead of InfiniBand: 400 GB/s per node as well.
MACHINES = {"A100": "dgx-a100", "H100": "dgx-h100", "H200": "dgx-h200", "B200": "dgx-b200"}
NCCL = ("ring", "tree", "nvls_tree")
PER_NODE = 8
LARGE = float(1 << 34)  # bytes: "peak at large size"
PRINTED = 0.3  # GB/s: below, two decimals are too few
BOUNDS: Bounds = {
    "hop": (20 * US, 0.1 * US, 200 * US), "bandwidth": (0.9, 0.1, 1.0), "handshake": (40 * US, 0.1 * US, 1000 * US),
    "handshake_bytes": (1e4, 10.0, 1e9),
}  # fmt: skip
HEADER = """\
# NCCL between nodes; do not edit: `python -m perfsim.calibrate.network --data DIR` writes this file.
#
# All-reduces of public documents (collectives_more): a hop over a card, what messages of more than handshake_bytes per
#   card wait for longer, and the share of the cards' rate. Inside nodes the fitted curves of NCCL hold. Most rows are
#   of EFA cards, with NCCL 2.18 to 2.27. `median`, `p90` and `discrepancy` are of sources that were left out; `sources`
#   has each one's errors, with a curve fitted to the others (`left_out`) and without any (`guess`).
# stderr: of the rows as they are; sources differ by more (discrepancy). covariance: of the logarithms in the order of
#   stderr, lower triangle. sha256: of the rows.
"""


@dataclass(frozen=True)
class Group:
    """All-reduces of one source on some nodes of one kind."""

    source: str
    machine: str
    gpus: int
    nodes: int
    bytes: Array
    seconds: Array

    def predicted(self, curve: LinkCurve | None) -> Array:
        """Seconds of the fastest of NCCL's algorithms; without a curve, by the guesses of the device."""
        work = Collective("all_reduce", "x", 1, self.bytes, self.gpus)
        times = algorithm_seconds(
            work, _links(self.machine, self.nodes), _priced(_device(self.machine), curve), allowed=NCCL
        )
        result: Array = np.min(np.broadcast_arrays(*times.values()), axis=0)
        return result


@cache
def _links(machine: str, nodes: int) -> Fabric:
    single = FatTree(rail_optimised=True, radix=64, levels=1, hop_latency=0.0)
    return fabric(node(machine), Cluster(name="x", label="", node=node(machine), node_count=nodes, network=single))


@cache
def _device(machine: str) -> DeviceEfficiency:
    return find_calibration(accelerator=node(machine).accelerator.name, engine="vllm").device


def _priced(device: DeviceEfficiency, curve: LinkCurve | None) -> DeviceEfficiency:
    kept = {name: own for name, own in device.curves.collective.items() if name != NETWORK}
    collective = kept if curve is None else {**kept, NETWORK: curve}
    return device.model_copy(update={"curves": device.curves.model_copy(update={"collective": collective})})


def network_groups(folder: Path) -> list[Group]:
    """The rows that can be used, by source, machine and size of group."""
    raw = read(folder, TABLE, list(COLUMNS))
    found: dict[tuple[str, str, int, int], list[tuple[float, float]]] = {}
    for index in range(len(raw["source"])):
        row = {name: raw[name][index] for name in COLUMNS}
        key, timed = _placed(row), _timed(row)
        if key is not None and timed is not None:
            found.setdefault(key, []).append(timed)
    return [Group(*key, *(np.array(column) for column in zip(*sorted(rows), strict=True)))
            for key, rows in sorted(found.items())]  # fmt: skip


def _placed(row: Mapping[str, Any]) -> tuple[str, str, int, int] | None:
    """(source, machine, GPUs, nodes) of a row between nodes of a published network; None for any other."""
    gpus, link, notes = int(row["n_gpus"]), str(row["inter_link"] or ""), str(row["notes"])
    unknown = not link or "SHARP" in link or "older" in notes or "payload not stated" in notes
    if row["collective"] != "allreduce" or gpus <= PER_NODE or row["gpu"] not in MACHINES or unknown:
        return None
    return str(row["source"]).split("/")[0].split(" (")[0], MACHINES[row["gpu"]], gpus, gpus // PER_NODE


def _timed(row: Mapping[str, Any]) -> tuple[float, float] | None:
    """(bytes, seconds) of a row; None where one is missing or printed with too few digits."""
    size, time, bus = (float(row[name] or 0.0) for name in ("message_bytes", "time_us", "busbw_GBps"))
    size = LARGE if not size > 0 and "peak at large size" in row["notes"] else size
    if not size > 0:
        return None
    if time > 0:
        return size, time * 1e-6
    gpus = int(row["n_gpus"])
    return (size, 2 * (gpus - 1) / gpus * size / (bus * 1e9)) if bus >= PRINTED else None


def fit(groups: list[Group]) -> tuple[LinkCurve, Array]:
    """The curve and the covariance of the logarithms of its free coefficients: soft-L1 as for all other curves."""
    from scipy.optimize import least_squares

    names = list(BOUNDS)
    start, low, high = (np.log([BOUNDS[name][at] for name in names]) for at in range(3))
    measured = np.log(np.concatenate([group.seconds for group in groups]))

    def errors(logs: Array) -> Array:
        curve = _curve(logs)
        result: Array = np.log(np.concatenate([group.predicted(curve) for group in groups])) - measured
        return result

    later = start + np.log([1.0, 1.0, 1.0, 100.0])  # where large messages begin decides which rows are of one kind
    searches = [least_squares(errors, each, bounds=(low, high), loss="soft_l1", f_scale=SOFT)
                for each in (start, later)]  # fmt: skip
    found = min(searches, key=lambda search: float(search.cost))
    return _curve(found.x), sandwich(found.jac, found.fun, np.arange(len(measured)))


def _curve(logs: Array) -> LinkCurve:
    return LinkCurve(launch=0.0, **dict(zip(BOUNDS, np.exp(logs).tolist(), strict=True)))


def document(groups: list[Group]) -> Iterator[str]:
    """Lines of the file."""
    curve, covariance = fit(groups)
    sources = sorted({group.source for group in groups})
    missed: list[Array] = []
    about = []
    for source in sources:
        own = [group for group in groups if group.source == source]
        without, _ = fit([group for group in groups if group.source != source])
        fitted, left, guess = (_errors(own, each) for each in (curve, without, None))
        missed.append(left)
        about.append(f'  "{source}": {{rows: {len(left)}, median: {np.median(np.abs(fitted)):.4f}, '
                     f"left_out: {np.median(np.abs(left)):.4f}, guess: {np.median(np.abs(guess)):.4f}}}")  # fmt: skip
    errors = np.concatenate(missed)
    deviation = np.sqrt(np.diag(covariance))
    spans = {"gpus": np.array([group.gpus for group in groups]), "nodes": np.array([group.nodes for group in groups]),
             "bytes": np.concatenate([group.bytes for group in groups])}  # fmt: skip
    lines = sorted(f"{g.source} {g.machine} {g.gpus} {size!r} {time!r}" for g in groups
                   for size, time in zip(g.bytes.tolist(), g.seconds.tolist(), strict=True))  # fmt: skip
    yield HEADER.rstrip("\n")
    yield f"source: {', '.join(sources)}"
    yield f"curve: {_flow(curve.model_dump())}"
    yield 'version: "NCCL 2.18 to 2.27"'
    yield f"table: {TABLE}"
    yield f"rows: {len(lines)}"
    yield f"sha256: {hashlib.sha256(chr(10).join(lines).encode()).hexdigest()}"
    yield f"median: {np.median(np.abs(errors)):.4f}"
    yield f"p90: {np.quantile(np.abs(errors), 0.9):.4f}"
    yield f"held_out_rows: {len(errors)}"
    yield f"discrepancy: {spread(errors):.4f}"
    yield f"stderr: {_flow({n: getattr(curve, n) * float(d) for n, d in zip(BOUNDS, deviation, strict=True)})}"
    yield f"range: {{{', '.join(f'{name}: [{s.min():g}, {s.max():g}]' for name, s in spans.items())}}}"
    rows = [f"[{', '.join(f'{value:.1e}' for value in covariance[at, : at + 1])}]" for at in range(len(covariance))]
    yield f"covariance: [{', '.join(rows)}]"
    yield "sources:"
    yield from about


def _errors(groups: list[Group], curve: LinkCurve | None) -> Array:
    return np.concatenate([group.predicted(curve) / group.seconds - 1.0 for group in groups])


def _flow(values: Mapping[str, float]) -> str:
    return "{" + ", ".join(f"{name}: {value:.4g}" for name, value in values.items()) + "}"


def main(arguments: list[str] | None = None) -> int:
    """Fit and write the file; 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m perfsim.calibrate.network", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help=f"folder of {TABLE}.parquet")
    parser.add_argument("--output", type=Path, default=Path("hardware/calibration/network.yaml"))
    options = parser.parse_args(arguments)
    try:
        groups = network_groups(options.data)
        if len({group.source for group in groups}) < 2:
            raise InputError(f"{options.data / TABLE}.parquet: all-reduces between nodes of fewer than two sources")
        text = "\n".join(document(groups)) + "\n"
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    options.output.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
