"""Collectives: aiconfigurator's, Vidur's and others by size, public nccl-tests, DeepEP's dispatch and combine.

Inside a node they are priced by the curves of the library that ran them; eager launches take at least as long as their
host needed (`eager.yaml`). Between nodes by those of NCCL and of the network; where nothing was fitted, by the
algorithms that the library has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from perfsim.calibrate.deepep import SMS, exchanges_of
from perfsim.cost.collective import FAMILIES, algorithm_seconds
from perfsim.cost.deepep import bounds, seconds_of
from perfsim.cost.topology import Fabric, fabric
from perfsim.errors import InfeasibleError
from perfsim.spec import catalog
from perfsim.spec.calibration import DeviceEfficiency
from perfsim.spec.load import find_calibration
from perfsim.spec.operators_file import load_operators
from perfsim.spec.yaml import load_yaml
from validation.collectives import rows as measured
from validation.collectives.predict import network, predict
from validation.collectives.rows import Row
from validation.compare.ask import Progress
from validation.compare.outcome import Outcome, Pair, outcome_of
from validation.compare.table import Table
from validation.ops.predict import CALIBRATION, relative

EAGER = Path(__file__).with_name("eager.yaml")
COLLECTIVES = frozenset({"source", "system", "library", "framework", "op_name", "impl", "num_nodes", "num_gpus",
                         "bytes", "latency_us"})  # fmt: skip
PUBLIC = frozenset({"source", "collective", "n_gpus", "nodes", "gpu", "intra_link", "inter_link", "message_bytes",
                    "busbw_GBps", "time_us", "notes"})  # fmt: skip
DEEPEP = frozenset({"system", "framework", "version", "mode", "node_num", "hidden_size", "num_token", "num_topk",
                    "num_experts", "dispatch_avg_t_us", "combine_avg_t_us", "dispatch_transmit_us",
                    "combine_transmit_us"})  # fmt: skip
Reader = Callable[[Iterable[dict[str, Any]]], Iterator[Row]]


def compare_collectives(table: Table) -> tuple[Table, Outcome]:
    """On the machine that stands for the measured one."""
    return _compare(table, measured.collective_rows, lambda row, _: {"latency_us": row["latency_us"]})


def library_seconds(row: Row, *, system: str = "", impl: str = "") -> float:
    """Seconds by the curves of the library that ran a row inside a node; else by the algorithms that it has."""
    families = FAMILIES.get(row.work.kind, {})
    nccl = row.backend.startswith("nccl")
    engine = "nccl" if nccl else next((name for name in ("sglang", "trtllm") if name in row.backend), "vllm")
    efficiency, links = _efficiency(row.node, engine)
    known = {name for name, family in families.items() if family in efficiency.curves.collective}
    if nccl:
        known = {name for name in known if families[name] != "custom_all_reduce"}
    if row.nodes > 1:
        return predict(row, curves=True).seconds
    if not known or row.backend in ("nccl ring", "nccl nvls", "nccl nvls_tree"):
        return predict(row).seconds
    times = algorithm_seconds(row.work, links, efficiency)
    found = [float(seconds) for name, seconds in times.items() if name in known]
    host = _host(system) if impl.endswith("eager") else row.source.split()[0] if row.backend == "nccl torch" else ""
    floor = float(_floors().get(host, 0.0))
    return max([floor, min(found)]) if found else predict(row).seconds


def _library(one: Row, row: Mapping[str, Any]) -> float:
    return library_seconds(one, system=str(row.get("system")), impl=str(row.get("impl")))


@cache
def _efficiency(node: str, engine: str) -> tuple[DeviceEfficiency, Fabric]:
    """The curves of the node's links; where nobody timed them, those of its GPU's relative on the same kind of link."""
    machine = catalog.node(node)
    chip = machine.accelerator.name
    device = find_calibration(accelerator=chip, engine="vllm").device
    curves = load_operators(CALIBRATION, device=chip, engine=engine, borrowed=False)
    if not curves.source and catalog.node(relative(chip)).scale_up.kind == machine.scale_up.kind:
        curves = load_operators(CALIBRATION, device=relative(chip), engine=engine, borrowed=False)
    exchange = device.curves.exchange
    curves = (curves if curves.source else device.curves).model_copy(update={"exchange": exchange})
    return device.model_copy(update={"curves": curves}), fabric(machine)


@cache
def _host(system: str) -> str:
    """The system whose host launches eagerly as this one's does."""
    if system in _floors() or system not in measured.NODES:
        return system
    other = relative(catalog.node(measured.NODES[system]).accelerator.name)
    return next((name for name in _floors() if name in measured.NODES and
                 catalog.node(measured.NODES[name]).accelerator.name == other), system)  # fmt: skip


@cache
def _floors() -> dict[str, Any]:
    return load_yaml(EAGER)


def compare_public(table: Table) -> tuple[Table, Outcome]:
    """Rows of public documents: the time where it was published, else the bus bandwidth."""

    def values(row: Mapping[str, Any], found: Row) -> dict[str, float]:
        return {"time_us": row["time_us"] or 1e6 * found.seconds}

    return _compare(table, measured.public_rows, values)


def compare_deepep(table: Table) -> tuple[Table, Outcome]:
    """Dispatch and combine; of the throughput kernels, transmission without the notification before it.

    By the kernels' own law (`perfsim.cost.deepep`), on as many SMs as the row says.
    """

    def values(row: Mapping[str, Any], found: Row) -> dict[str, float]:
        suffix = "avg_t_us" if row["mode"] == "low_latency" else "transmit_us"
        return {f"{found.work.name}_{suffix}": 1e6 * found.seconds}

    def own(one: Row, row: Mapping[str, Any]) -> float:
        sms = next(given for work, given in exchanges_of(row, measured.expert_gpus(row)) if work.name == one.work.name)
        return deepep_seconds(one, sms)

    def usual(rows: Iterable[dict[str, Any]]) -> Iterator[Row]:
        """Rows on whatever SMs, as if on the usual number: `own` prices them on those that they had."""
        for row in rows:
            yield from measured.expert_rows(
                measured.expert_times([{**row, "dispatch_sms": row.get("dispatch_sms") and SMS}])
            )

    return _compare(table, usual, values, own)


def deepep_seconds(row: Row, sms: float | None = None) -> float:
    """Seconds of one dispatch or combine by its own kernels, on so many SMs (None: the usual number)."""
    efficiency, _ = _efficiency(row.node, "sglang")
    path = network(row.node, row.nodes).path(row.work.group, stride=row.work.stride)
    curve = efficiency.curves.exchange[f"{row.backend.removeprefix('deepep ')}-{row.work.name}"]
    return float(seconds_of(curve, bounds(row.work, path), sms=sms))


def _compare(
    table: Table,
    reader: Reader,
    values: Callable[[Mapping[str, Any], Row], Mapping[str, float]],
    price: Callable[[Row, Mapping[str, Any]], float] | None = None,
) -> tuple[Table, Outcome]:
    reasons: list[str | None] = []
    pairs: list[Pair] = []
    progress = Progress(len(table), what="rows")
    for index, row in enumerate(table.rows()):
        try:
            own = [Pair(index, name, float(value), 1e6 * (price or _library)(one, row))
                   for one in reader([row]) for name, value in values(row, one).items() if value]  # fmt: skip
            reason = None
        except (TypeError, AttributeError, LookupError, ValueError, ArithmeticError):
            own, reason = [], None  # a value is missing, or that of no exchange
        except InfeasibleError as error:
            own, reason = [], f"infeasible: {error}"
        reasons.append(None if own else reason or _reason(row))
        pairs += own
        progress.step()
    return table, outcome_of(reasons, pairs)


def _reason(row: Mapping[str, Any]) -> str:
    """Why the reader has no use for a row."""
    machine = row.get("system", row.get("gpu"))
    if machine not in measured.NODES:
        return f"no machine stands for '{machine}'"
    if row.get("num_gpus") and measured.without_peers(row):
        return "more than two GPUs on a host without peer-to-peer"
    if "DeepEP" in str(row.get("source")):
        return "expert dispatch of a public document: number of experts and tokens not published"
    if "SHARP" in str(row.get("inter_link")):
        return "reduction in network switches is not modelled"
    nodes = row.get("num_nodes") or row.get("node_num") or row.get("nodes") or 1
    if int(nodes) > 1 and catalog.node(measured.NODES[machine]).nics is None:
        return f"network between nodes of '{machine}' not published"
    needed = ("op_name", "collective", "num_gpus", "n_gpus", "bytes", "num_experts", "num_topk", "hidden_size",
              "num_token", "node_num")  # fmt: skip
    missing = [name for name in needed if name in row and row[name] is None]
    return f"no value of {missing[0]} published" if missing else "no measured value, or no size"
