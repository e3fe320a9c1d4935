"""LLMServingSim's vLLM runs: ShareGPT requests at given times, and the engine's state second by second."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from validation.compare import facts, formats, plans
from validation.compare.ask import Answer, Ask, answers, ask
from validation.compare.beside import companions
from validation.compare.facts import InexpressibleError
from validation.compare.outcome import Outcome, Pair, outcome_of
from validation.compare.runs import Runs, run_statistics, runs_of
from validation.compare.table import Table
from validation.compare.traces import write_trace

REQUESTS = frozenset({"hardware", "model", "vllm_version", "tp", "dp", "ep", "max_num_seqs", "max_num_batched_tokens",
                      "request_index", "arrival_s", "prompt_tokens", "output_tokens", "ttft_s", "e2e_s",
                      "tpot_s"})  # fmt: skip
SERIES = frozenset({"hardware", "model", "t", "prompt_throughput", "gen_throughput", "running", "waiting",
                    "kv_cache_pct"})  # fmt: skip
DEPLOYMENT = ("hardware", "model", "vllm_version", "tp", "dp", "ep", "max_num_seqs", "max_num_batched_tokens")
STATE = ("running", "waiting", "gen_throughput", "kv_cache_pct")  # of an engine, as predicted for every second
BLOCK = 16  # tokens per id of `hash_block_ids`


def compare_requests(table: Table) -> tuple[Table, Outcome]:
    """Per run: the engine's clock, from its queue to the first token and to the last."""
    reasons: list[str | None] = [None] * len(table)
    with tempfile.TemporaryDirectory() as folder:
        runs, questions = _questions(table, Path(folder), reasons)
        outcome = run_statistics(
            table, runs, questions, reasons,
            measured=lambda rows: {name: rows.numbers(name) for name in ("ttft_s", "tpot_s", "e2e_s")},
            predicted=("engine_ttft_s", "tpot_s", "engine_e2e_s"),
        )  # fmt: skip
    return table, outcome


def compare_series(table: Table) -> tuple[Table, Outcome]:
    """Running and waiting requests, throughput and KV occupancy of every second; the load is in the requests table."""
    reasons: list[str | None] = [None] * len(table)
    pairs: list[Pair] = []
    loads = list(companions(table, REQUESTS))
    if not loads:
        return table, outcome_of(["load not published: no table of requests beside this one"] * len(table), [])
    own = set(runs_of(table, ("hardware", "model")))
    with tempfile.TemporaryDirectory() as folder:
        by_engine: dict[tuple[Any, ...], Ask] = {}
        for load in loads:
            _, questions = _questions(load, Path(folder), [None] * len(load))
            by_engine = {run[:2]: question for run, question in questions.items() if run[:2] in own} | by_engine
        found = answers(list(by_engine.values()), bands=False)
    at = table.numbers("t")
    there = np.any([table.numbers(name) >= 0 for name in STATE], axis=0)
    for run, members in runs_of(table, ("hardware", "model")).items():
        question = by_engine.get(run)
        refused = "load of this run not published" if question is None else found[question].refused
        if question is None or refused is not None:
            for index in members:
                reasons[index] = refused
            continue
        timed = (at[members] >= 0) & (at[members] < plans.MOST)
        for index in members[~timed]:
            reasons[index] = "no value of t published"
        for index in members[timed & ~there[members]]:
            reasons[index] = "no measured value"
        pairs += _series(table, members[timed & there[members]], found[question])
    return table, outcome_of(reasons, pairs)


def _questions(table: Table, folder: Path, reasons: list[str | None]) -> tuple[Runs, dict[tuple[Any, ...], Ask]]:
    """(rows of every run, its scenario); the traces are written to `folder`."""
    runs = runs_of(table, DEPLOYMENT)
    rows = table.rows()
    questions: dict[tuple[Any, ...], Ask] = {}
    for run, members in runs.items():
        try:
            questions[run] = _question([rows[index] for index in members], folder)
        except InexpressibleError as missing:
            for index in members:
                reasons[index] = str(missing)
    return runs, questions


def _question(rows: list[dict[str, Any]], folder: Path) -> Ask:
    first = rows[0]
    model, hardware = facts.model(first["model"]), facts.device(first["hardware"])
    tp, dp = (plans.count(first, name, reason="plan not published") for name in ("tp", "dp"))
    policy: dict[str, Any] = {
        **{name: plans.count(first, name) for name in ("max_num_batched_tokens", "max_num_seqs")},
        "async_scheduling": facts.version_of("vllm", first["vllm_version"])["async_scheduling"],
        "sampling": facts.facts("clients")["llmservingsim"]["sampling"],
    }  # fmt: skip
    if first.get("num_kv_tokens") is not None:
        policy["kv_cache_blocks"] = plans.count(first, "num_kv_tokens", least=BLOCK) // BLOCK
    shared = first.get("prefix_caching") is not False  # vLLM's default where none is stated
    if first.get("prefix_caching") is not None:
        policy["enable_prefix_caching"] = shared
    content: dict[str, Any] = {
        "model": model, "hardware": hardware, "engine": "vllm",
        "engine_version": facts.release_of(first["vllm_version"]), "policy": policy,
        "workload": {"kind": "trace", "trace": str(_trace(rows, folder, shared=shared))},
    }  # fmt: skip
    experts = any(group.mlp is not None and group.mlp.kind == "moe" for group in facts.arch(model).layers)
    if dp > 1 and not experts:
        content["deployment"] = {"groups": [{"name": "rank", "count": dp}], "router": {"kind": "least_loaded"}}
        dp = 1
    if experts and first["ep"] is None:
        raise InexpressibleError("plan not published: whether experts are spread")
    content["parallel"] = {"tp": tp, "dp": dp, "ep": tp * dp if first["ep"] else 1}
    return ask(content, formats=formats.named_formats(first["model"]), requests=True)


def _trace(rows: list[dict[str, Any]], folder: Path, *, shared: bool) -> Path:
    """The requests as a trace; they reach the engine when they did, not when they were planned to.

    `shared`: requests use cached blocks of each other's prompts, so that it matters which of them are equal.
    """
    queued = any(row.get("queued_engine_s") is not None for row in rows)
    arrival = "queued_engine_s" if queued else "arrival_s"
    for row in rows:
        if row[arrival] is None or row["request_index"] is None or not 0 <= row[arrival] < plans.MOST:
            raise InexpressibleError("load not published: when requests were sent")
        for name in ("prompt_tokens", "output_tokens"):
            plans.count(row, name, reason="load not published: lengths of requests")
        if shared and not _is_prompt(row.get("hash_block_ids"), row["prompt_tokens"] // BLOCK):
            raise InexpressibleError("load not published: which blocks of prompts are equal")
    if len({row["request_index"] for row in rows}) < len(rows):
        raise InexpressibleError("load not published: requests of several runs with one deployment")
    rows = sorted(rows, key=lambda row: (row[arrival], row["request_index"]))
    return write_trace(
        folder, arrival_s=[row[arrival] for row in rows], prompt_tokens=[row["prompt_tokens"] for row in rows],
        output_tokens=[row["output_tokens"] for row in rows],
        hash_block_ids=list(_whole_prompts(rows)) if shared else None,
        hash_block_tokens=BLOCK,
    )  # fmt: skip


def _is_prompt(ids: Any, blocks: int) -> bool:
    """Whether these are the ids of that many blocks."""
    return (isinstance(ids, list) and len(ids) == blocks
            and all(isinstance(each, int) and 0 <= each < plans.MOST for each in ids))  # fmt: skip


def _whole_prompts(rows: list[dict[str, Any]]) -> Iterator[list[int]]:
    """The ids of full blocks, and one of its own for the rest of a prompt, which nobody shares."""
    fresh = 1 + max((max(row["hash_block_ids"], default=0) for row in rows), default=0)
    for number, row in enumerate(rows):
        partial = row["prompt_tokens"] % BLOCK > 0
        yield [*row["hash_block_ids"], fresh + number] if partial else list(row["hash_block_ids"])


def _series(table: Table, members: NDArray[np.intp], answer: Answer) -> list[Pair]:
    """Predicted state at each time; a second's tokens are spread evenly between a request's first and last one."""
    found = answer.requests
    at = table.numbers("t")[members]
    queued, begun, first, end = (found[key] for key in ("queued_s", "scheduled_s", "first_token_s", "finish_s"))
    zero = queued.min()
    queued, begun, first, end = queued - zero, begun - zero, first - zero, end - zero
    moment = at[:, None]
    gaps = np.maximum(end - first, 1e-9)
    share = np.clip((moment - first) / gaps, 0, 1) - np.clip((moment - 1 - first) / gaps, 0, 1)
    started = (first > moment - 1) & (first <= moment)
    said = {
        "running": ((begun <= moment) & (end > moment)).sum(axis=1),
        "waiting": ((queued <= moment) & (begun > moment)).sum(axis=1),
        "gen_throughput": (share * (found["output_tokens"] - 1)).sum(axis=1) + started.sum(axis=1),
        "kv_cache_pct": _occupancy(answer, at),
    }
    return [Pair(int(row), name, float(real), float(value)) for name, values in said.items()
            for row, real, value in zip(members, table.numbers(name)[members], values, strict=True)]  # fmt: skip


def _occupancy(answer: Answer, at: NDArray[np.float64]) -> NDArray[np.float64]:
    """Percent of the KV blocks in use, averaged over the bin of the timeline that holds each time."""
    line, blocks = answer.timeline, answer.metrics["kv_cache"]["blocks"]
    series = 100.0 * np.array(line["kv_blocks"], dtype=np.float64) / blocks
    place = np.clip(np.floor(at / line["bin_s"]), -1, len(series)).astype(int)
    return np.where((place >= 0) & (place < len(series)), series[np.clip(place, 0, len(series) - 1)], np.nan)
