"""Collectives: aiconfigurator's, Vidur's and others by size, public nccl-tests, DeepEP's dispatch and combine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from validation.collectives import rows as measured
from validation.collectives.predict import predict
from validation.collectives.rows import Row
from validation.compare.ask import Progress
from validation.compare.outcome import Outcome, Pair, outcome_of
from validation.compare.table import Table

COLLECTIVES = frozenset({"source", "system", "library", "framework", "op_name", "impl", "num_nodes", "num_gpus",
                         "bytes", "latency_us"})  # fmt: skip
PUBLIC = frozenset({"source", "collective", "n_gpus", "nodes", "gpu", "intra_link", "inter_link", "message_bytes",
                    "busbw_GBps", "time_us", "notes"})  # fmt: skip
DEEPEP = frozenset({"system", "framework", "version", "mode", "node_num", "hidden_size", "num_token", "num_topk",
                    "num_experts", "dispatch_avg_t_us", "combine_avg_t_us", "dispatch_transmit_us",
                    "combine_transmit_us"})  # fmt: skip
Reader = Callable[[Iterable[dict[str, Any]]], Iterator[Row]]


def compare_collectives(table: Table) -> tuple[Table, Outcome]:
    """By the algorithms that a backend has, on the machine that stands for the measured one."""
    return _compare(table, measured.collective_rows, lambda row, _: {"latency_us": row["latency_us"]})


def compare_public(table: Table) -> tuple[Table, Outcome]:
    """Rows of public documents: the time where it was published, else the bus bandwidth."""

    def values(row: Mapping[str, Any], found: Row) -> dict[str, float]:
        return {"time_us": row["time_us"] or 1e6 * found.seconds}

    return _compare(table, measured.public_rows, values)


def compare_deepep(table: Table) -> tuple[Table, Outcome]:
    """Dispatch and combine; of the throughput kernels, transmission without the notification before it."""

    def values(row: Mapping[str, Any], found: Row) -> dict[str, float]:
        suffix = "avg_t_us" if row["mode"] == "low_latency" else "transmit_us"
        return {f"{found.work.name}_{suffix}": 1e6 * found.seconds}

    return _compare(table, lambda rows: measured.expert_rows(measured.expert_times(rows)), values)


def _compare(
    table: Table, reader: Reader, values: Callable[[Mapping[str, Any], Row], Mapping[str, float]]
) -> tuple[Table, Outcome]:
    reasons: list[str | None] = []
    pairs: list[Pair] = []
    progress = Progress(len(table), what="rows")
    for index, row in enumerate(table.rows()):
        found = list(reader([row]))
        reasons.append(None if found else _reason(row))
        for one in found:
            said = 1e6 * predict(one, curves=True).seconds
            pairs += [Pair(index, name, float(value), said) for name, value in values(row, one).items()]
        progress.step()
    return table, outcome_of(reasons, pairs)


def _reason(row: Mapping[str, Any]) -> str:
    """Why the reader has no use for a row."""
    machine = row.get("system", row.get("gpu"))
    if machine not in measured.NODES:
        return f"no machine stands for '{machine}'"
    if row.get("dispatch_sms"):
        return "other than the usual 20 SMs: what is measured is the lack of them"
    if "DeepEP" in str(row.get("source")):
        return "expert dispatch of a public document: number of experts and tokens not published"
    if "SHARP" in str(row.get("inter_link")):
        return "reduction in network switches is not modelled"
    return "no measured value, or no size"
