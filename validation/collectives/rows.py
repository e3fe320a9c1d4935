"""Measured rows in one form: which machine, which collective, how many bytes, how long.

Two sources: the slice in `validation/measured/` (rows whose licence allows copying), and a directory with the whole
tables (`collectives.parquet`, `collectives_more.parquet`, `aic_deepep.parquet`). Message sizes are published in
different ways: nccl-tests counts the whole output of an all-gather, `Collective.bytes` what one GPU contributes.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perfsim.calibrate.deepep import SMS, exchanges_of
from perfsim.ops.op import Collective, CollectiveKind
from perfsim.spec import catalog

MEASURED = Path(__file__).resolve().parents[1] / "measured"
COLLECTIVE_COLUMNS = ("source", "system", "framework", "version", "op_name", "impl", "num_nodes", "num_gpus", "bytes",
                      "latency_us")  # fmt: skip
EXPERT_COLUMNS = ("system", "framework", "version", "mode", "node_num", "hidden_size", "num_token", "num_topk",
                  "num_experts", "dispatch_sms", "dispatch_us", "combine_us")  # fmt: skip

# The nodes that stand for the measured machines. vTrain's A100s reach one bus bandwidth with any number of GPUs from 3
# to 8, odd ones too, as only a switch allows. p5, p5en and p6-b200 have EFA cards instead of InfiniBand, 400 GB/s per
# node as well.
NODES = {
    "a100_sxm": "dgx-a100", "a100_dgx": "dgx-a100", "A100": "dgx-a100", "h100_sxm": "dgx-h100", "h100_dgx": "dgx-h100",
    "h100_sxm_80gb": "dgx-h100", "H100": "dgx-h100", "H100 (p5 template)": "dgx-h100", "h200_sxm": "dgx-h200",
    "H100 (file name)": "dgx-h100",
    "h200_sxm_141gb": "dgx-h200", "H200": "dgx-h200", "b200_sxm": "dgx-b200", "B200": "dgx-b200",
    "gb200": "gb200-nvl72", "GB200": "gb200-nvl72", "H800": "h800-8x-sxm",
    "a100": "dgx-a100", "l40s": "l40s-48gb", "rtx_pro_6000_server": "rtx-pro-6000-blackwell-96gb",
    "b300_sxm": "b300-8x-sxm", "B300": "b300-8x-sxm", "gb300": "gb300-nvl72", "GB300": "gb300-nvl72",
    "H20": "h20-8x-sxm", "A800": "a800-8x-sxm",
    "h20_sxm": "h20-8x-sxm", "h800": "h800-8x-sxm", "mi300x": "mi300x-8x", "MI300X": "mi300x-8x",
    "mi325x": "mi325x-8x", "mi355x": "mi355x-8x",
}  # fmt: skip
RACKS = frozenset({"gb200-nvl72", "gb300-nvl72"})  # trays of four GPUs each, all behind the same switches
OPERATIONS: dict[str, CollectiveKind] = {
    "all_reduce": "all_reduce", "allreduce": "all_reduce", "all_gather": "all_gather", "allgather": "all_gather",
    "reduce_scatter": "reduce_scatter", "reducescatter": "reduce_scatter", "alltoall": "all_to_all",
    "all_to_all": "all_to_all", "sendrecv": "send_recv", "send_recv": "send_recv", "p2p": "send_recv",
}  # fmt: skip
PEAK_BYTES = float(1 << 34)  # for a bandwidth "at large size"


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement: `work` took `seconds` on `nodes` nodes of the kind `node`, by `backend`."""

    node: str
    nodes: int
    backend: str
    work: Collective
    operation: str
    published_bytes: float
    seconds: float
    source: str


def slice_rows() -> list[Row]:
    """The committed slice."""
    with (MEASURED / "collectives.csv").open(newline="") as file:
        rows = list(collective_rows(csv.DictReader(file)))
    with (MEASURED / "expert-dispatch.csv").open(newline="") as file:
        return rows + list(expert_rows(csv.DictReader(file)))


def all_rows(directory: Path) -> list[Row]:
    """Everything in the tables that can be placed on a machine."""
    import pyarrow.parquet as pq

    def table(name: str) -> list[dict[str, Any]]:
        return list(pq.read_table(directory / name).to_pylist())

    rows = list(collective_rows(table("collectives.parquet")))
    rows += public_rows(table("collectives_more.parquet"))
    return rows + list(expert_rows(expert_times(table("aic_deepep.parquet"))))


def expert_times(table: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The table of DeepEP with one time per direction: transmission without the notification that precedes it."""
    for row in table:
        low = row["mode"] == "low_latency"
        yield {**row, "dispatch_us": row["dispatch_avg_t_us" if low else "dispatch_transmit_us"],
               "combine_us": row["combine_avg_t_us" if low else "combine_transmit_us"]}  # fmt: skip


def collective_rows(table: Iterable[dict[str, Any]]) -> Iterator[Row]:
    """Rows of `collectives` on a known machine."""
    for row in table:
        node, gpus, nodes = NODES.get(row["system"]), int(row["num_gpus"]), int(row["num_nodes"])
        if node is None or gpus < 2 or float(row["latency_us"]) <= 0 or without_peers(row):
            continue
        backend = "nccl" if row["impl"] in ("NCCL", "out-of-place") else row["impl"].lower()
        backend = "nccl torch" if row["source"] == "vidur" else backend  # timed around torch.distributed
        yield _row(node, nodes, backend, row["op_name"], gpus, float(row["bytes"]), float(row["latency_us"]) * 1e-6,
                   f"{row['source']} {row['framework']} {row['version']}")  # fmt: skip


def without_peers(row: Mapping[str, Any]) -> bool:
    """Whether a row is of aiconfigurator's L40S host, on which more than two GPUs reach each other through memory."""
    return row["system"] == "l40s" and int(row["num_gpus"]) > 2


def public_rows(table: Iterable[dict[str, Any]]) -> Iterator[Row]:
    """Rows of public documents; those without GPU or size are left out, except peaks "at large size"."""
    for row in table:
        node, notes, gpus = NODES.get(row["gpu"]), row["notes"], int(row["n_gpus"])
        peak = "peak at large size" in notes or "payload" in notes or (row["collective"] == "p2p" and row["nodes"] == 1)
        size = row["message_bytes"] or (PEAK_BYTES if peak else None)
        if node is None or size is None or "DeepEP" in row["source"] or "+ SHARP" in (row["inter_link"] or ""):
            continue
        operation = OPERATIONS[row["collective"]]
        if row["time_us"]:
            seconds = row["time_us"] * 1e-6
        elif (row["busbw_GBps"] or 0) >= 0.3:  # printed with two decimals
            seconds = size * bus_factor(operation, gpus) / (row["busbw_GBps"] * 1e9)
        else:
            continue
        nodes = 1 if node in RACKS else int(row["nodes"] or gpus // 8)
        if nodes > 1 and catalog.node(node).nics is None:
            continue  # nobody says what joins these nodes
        per_rank = row["collective"] == "allgather" and "per-rank input" in notes
        published = size * gpus if per_rank else size
        yield _row(node, nodes, _nccl_variant(notes), operation, gpus, published, seconds, row["source"])


def _nccl_variant(notes: str) -> str:
    """Which of NCCL's algorithms was chosen or forced, where the notes say so."""
    text = notes.lower()
    if "torch.distributed" in text or "all_reduce_bench" in text:
        return "nccl torch"
    if "nvlstree" in text:
        return "nccl nvls_tree"
    if re.search(r"\bring\b|no sharp|nvls_enable=0", text):
        return "nccl ring"
    return "nccl nvls" if re.search(r"picked nvls|-z 1, nvls|nvlink sharp", text) else "nccl"


def bus_factor(operation: CollectiveKind, gpus: int) -> float:
    """Bus bandwidth x time / published bytes, as nccl-tests define it."""
    if operation == "all_reduce":
        return 2 * (gpus - 1) / gpus
    return 1.0 if operation == "send_recv" else (gpus - 1) / gpus


def _row(node: str, nodes: int, backend: str, name: str, gpus: int, size: float, seconds: float, source: str) -> Row:
    operation = OPERATIONS[name]
    part = size / gpus if operation == "all_gather" else size
    # Ranks of one node stand next to each other; fewer than the node has are spread over it.
    inside = max(1, gpus // nodes)
    stride = 1 if nodes == 1 or inside >= 8 else 8 // inside
    work = Collective(operation, operation, 1, part, gpus, stride=stride)
    return Row(node, nodes, backend, work, operation, size, seconds, source)


def expert_rows(table: Iterable[dict[str, Any]]) -> Iterator[Row]:
    """Dispatch (FP8 with a scale per 128 values) and combine (BF16) of DeepEP, experts drawn evenly.

    Low-latency kernels send a copy per expert. The others send a token once per node and once per GPU in it, and their
    benchmark draws the experts from at most four nodes ("top-4 groups" in DeepEP's documentation); runs with other than
    the usual 20 SMs are left out, since what they measure is the lack of SMs.
    """
    for row in table:
        if row["dispatch_sms"] and int(float(row["dispatch_sms"])) != SMS:
            continue
        node, nodes = NODES[row["system"]], int(row["node_num"])
        for work, _ in exchanges_of(row, expert_gpus(row)):
            seconds, source = float(row[f"{work.name}_us"]) * 1e-6, f"DeepEP in {row['framework']} {row['version']}"
            one = work.routed.row_bytes if work.routed is not None else 0.0
            published = float(row["num_token"]) * int(row["num_topk"]) * one
            yield Row(node, nodes, f"deepep {row['mode']}", work, work.name, published, seconds, source)


def expert_gpus(row: Mapping[str, Any]) -> int:
    """GPUs of a row of the table of DeepEP, whose nodes are the trays of a rack."""
    return int(row["node_num"]) * (4 if NODES[row["system"]] in RACKS else 8)
