"""Constant-rate stages against vLLM: inference-sim's experiments, as aggregates per stage and as single requests."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perfsim.ops.cache import growing_bytes
from perfsim.spec.policy import ServingPolicy
from validation.compare import facts, formats, plans
from validation.compare.ask import Answer, Ask, answers, ask
from validation.compare.beside import companions
from validation.compare.facts import InexpressibleError
from validation.compare.outcome import Outcome, Pair, outcome_of, positive
from validation.compare.runs import run_statistics, runs_of
from validation.compare.table import Table
from validation.compare.traces import write_trace

STAGES = frozenset({"experiment", "model", "hardware", "tp", "precision", "stage_index", "stages", "system_prompt_len",
                    "question_len", "output_len", "max_num_batched_tokens", "max_num_seqs", "e2e_mean_ms"})  # fmt: skip
REQUESTS = frozenset({"experiment", "request_index", "arrival_s", "input_tokens", "output_tokens_configured", "ttft_s",
                      "e2e_s"})  # fmt: skip
# Column -> (request column, statistic). The published ITL of the client counts re-tokenised text and is only roughly
# the time per token; `tpot_derived_ms` is the one to judge by. The raw, halved ITL is not compared.
LATENCIES = {
    f"{name}_{statistic}_ms": (f"{name}_s", statistic)
    for name in ("e2e", "ttft") for statistic in ("mean", "median", "p90", "p95", "p99")
} | {"itl_mean_ms": ("tpot_s", "mean")}  # fmt: skip
MEASURED = (*LATENCIES, "n_success", "tpot_derived_ms", "requests_per_s")
# What a run is, beside its name: rows of one name that state different values here are of different runs.
DEPLOYMENT = ("model", "hardware", "tp", "dp", "precision", "cpu_offload", "gpu_mem_util", "max_num_batched_tokens",
              "max_num_seqs", "total_kv_blocks", "cpu_kv_blocks", "system_prompt_len", "question_len", "output_len",
              "stages")  # fmt: skip
Row = Mapping[str, Any]
Solve = Callable[[Sequence[Ask]], dict[Ask, Answer]]


def compare_stages(table: Table, *, solve: Solve | None = None) -> tuple[Table, Outcome]:
    """Rows of whole runs (`stage_index` -1) and of their stages; a repeated run counts once.

    `solve` answers the questions: other coefficients than the packaged ones give other answers.
    """
    table = _once(table)
    rows = table.rows()
    questions, reasons = _questions(rows)
    solve = solve or partial(answers, bands=table.bands)
    found = solve([question for question in questions if question is not None])
    pairs: list[Pair] = []
    for index, (row, question) in enumerate(zip(rows, questions, strict=True)):
        if question is None:
            continue
        if found[question].refused is not None:
            reasons[index] = found[question].refused
            continue
        own = list(_pairs(index, row, found[question]))
        reasons[index] = None if own else "no answer in the prediction of this stage"
        pairs += own
    return table, outcome_of(reasons, pairs)


def compare_requests(table: Table) -> tuple[Table, Outcome]:
    """Requests of whole runs; what was deployed is in the experiments table beside this one."""
    runs = runs_of(table, ("experiment",))
    rows = _deployments(row for deployed in companions(table, STAGES) for row in deployed.rows())
    questions: dict[tuple[Any, ...], Ask] = {}
    reasons: list[str | None] = [None] * len(table)
    with tempfile.TemporaryDirectory() as folder:
        for run, members in runs.items():
            try:
                row = _deployment(run[0], rows)
                trace = _trace(table, members, Path(folder))
                questions[run] = question_of({**row, **_measured_lengths(table, members)}, trace=trace)
            except InexpressibleError as missing:
                for index in members:
                    reasons[index] = str(missing)
        outcome = run_statistics(
            table, runs, questions, reasons,
            measured=_measured_requests, predicted=("ttft_s", "tpot_s", "e2e_s"),
        )  # fmt: skip
    return table, outcome


def _deployments(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of every name, the first of each deployment that was stated under it."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["experiment"] is not None:
            own = found.setdefault(row["experiment"], [])
            if not any(_agree(row, other) for other in own):
                own.append(row)
    return found


def _deployment(name: str | None, rows: Mapping[str, list[Row]]) -> Row:
    if name is None:
        raise InexpressibleError("deployment not published: no name of the run")
    if name not in rows:
        raise InexpressibleError("deployment not published: no table of experiments with this run beside this one")
    if len(rows[name]) > 1:
        raise InexpressibleError("deployment not published: runs of this name differ")
    return rows[name][0]


def _agree(row: Row, other: Row) -> bool:
    """Whether nothing that both rows state of a deployment differs."""
    pairs = ((row.get(name), other.get(name)) for name in DEPLOYMENT)
    return all(mine is None or its is None or mine == its for mine, its in pairs)


def _trace(table: Table, members: NDArray[np.intp], folder: Path) -> Path:
    """The requests as they were sent, prompts in rotation; InexpressibleError where a time or a length is missing.

    A length that a request lacks is that of its prompt, which others were sent with.
    """
    distinct = facts.facts("clients")["inference_perf"]["distinct_prompts"]
    names = ("request_index", "arrival_s", "input_tokens", "output_tokens_configured")
    columns = {name: table.numbers(name)[members] for name in names}
    for name, least in zip(names, (0, 0, 1, 1), strict=True):
        if name == "input_tokens":
            columns[name] = _filled(columns[name], columns["request_index"] % distinct)
        whole = name == "arrival_s" or (columns[name] % 1 == 0).all()
        if not whole or not ((columns[name] >= least) & (columns[name] < plans.MOST)).all():
            raise InexpressibleError(f"load not published: no value of {name} of some request")
    if len(np.unique(columns["request_index"])) < len(members):
        raise InexpressibleError("load not published: requests of several runs under one name")
    order = np.lexsort((columns["request_index"], columns["arrival_s"]))
    index, arrival, prompts, outputs = (column[order] for column in columns.values())
    # One name for a whole prompt: what prompts of a group share is not known, because their order is not.
    prompt = index % distinct
    return write_trace(
        folder, arrival_s=arrival - arrival[0], prompt_tokens=prompts, output_tokens=outputs,
        hash_block_ids=[[int(name)] for name in prompt], hash_block_tokens=int(prompts.max()),
    )  # fmt: skip


def _filled(lengths: NDArray[np.float64], prompt: NDArray[np.float64]) -> NDArray[np.float64]:
    known = {name: length for name, length in zip(prompt, lengths, strict=True) if length > 0}
    return np.array([length if np.isfinite(length) else known.get(name, np.nan)
                     for name, length in zip(prompt, lengths, strict=True)])  # fmt: skip


def question_of(row: Row, *, trace: Path | None = None) -> Ask:
    """The scenario of a run, with the requests of `trace`; InexpressibleError when a fact about it was not published.

    Without a trace, requests are sent as inference-perf sends them.
    """
    client = facts.facts("clients")["inference_perf"]
    model = facts.model(row["model"])
    hardware = facts.device(row["hardware"])
    if not row.get("stages"):
        raise InexpressibleError("load not published")
    stages = _stages(row["stages"])
    prompt = _prompt_tokens(row, client["retokenised"])
    output = plans.count(row, "output_len", reason="load not published")
    tp = plans.count(row, "tp", reason="plan not published")
    dp = 1 if row.get("dp") is None else plans.count(row, "dp", reason="plan not published")
    policy: dict[str, Any] = {
        "max_num_batched_tokens": plans.count(row, "max_num_batched_tokens"),
        "max_num_seqs": plans.count(row, "max_num_seqs"),
        "max_model_len": min(client["max_model_len"], facts.arch(model).max_position_embeddings),
        "async_scheduling": facts.version_of("vllm", client["engine_version"])["async_scheduling"],
        "sampling": _sampling(model),
    }  # fmt: skip
    policy |= _memory(row, model=model, client=client)
    content: dict[str, Any] = {
        "model": model, "hardware": hardware, "engine": "vllm", "policy": policy,
        "workload": {
            "kind": "synthetic", "num_requests": sum(int(rate * seconds + 1e-9) for rate, seconds in stages),
            "arrivals": {"kind": "stages", "stages": stages, "pause": client["pause_s"]},
            "prompt": {"kind": "fixed", "tokens": prompt}, "output": {"kind": "fixed", "tokens": output},
            "shared_prefix": {"num_prefixes": client["distinct_prompts"], "tokens": prompt, "order": "rotation"},
            "timeout": client["timeout_s"],
        },
    }  # fmt: skip
    if trace is not None:
        content["workload"] = {"kind": "trace", "trace": str(trace), "timeout": client["timeout_s"]}
    content["parallel"] = {"tp": tp}
    if dp > 1:
        # Replicas that share nothing, experts neither: a run with dp 2 has the time per token of one replica at half
        # the rate, far above what experts spread over all of its GPUs would take.
        content["deployment"] = {"groups": [{"name": "rank", "count": dp}], "router": {"kind": "least_loaded"}}
    return ask(content, formats=_formats(row, model), requests=True)


def _stages(text: str) -> list[tuple[float, float]]:
    """(requests per second, seconds) of every stage of a load."""
    try:
        stages = [(float(rate), float(seconds)) for rate, seconds in json.loads(text)]
    except (ValueError, TypeError):
        raise InexpressibleError("load not published: stages are no pairs of rate and seconds") from None
    if not stages or not all(0 < rate * seconds < plans.MOST and rate > 0 for rate, seconds in stages):
        raise InexpressibleError("load not published: stages are no pairs of rate and seconds")
    return stages


def _sampling(model: str) -> str:
    """How requests that say nothing about it are sampled."""
    found = facts.facts("sampling")
    return str(next((kind for part, kind in found["models"] if part in model.lower()), found["others"]))


def _block_bytes(model: str) -> float:
    """K/V of one block of tokens on all GPUs."""
    arch, policy = facts.arch(model), ServingPolicy()
    tokens = sum(group.count * growing_bytes(arch, group, tp=1, kv_cache_dtype=policy.kv_cache_dtype)
                 for group in arch.layers)  # fmt: skip
    return policy.block_size * tokens


def _memory(row: Row, *, model: str, client: Mapping[str, Any]) -> dict[str, Any]:
    """The KV pool: vLLM's own count where its log was published, else what perfsim works out from the utilisation."""
    policy: dict[str, Any] = {}
    if row.get("total_kv_blocks") is not None:
        policy["kv_cache_blocks"] = plans.count(row, "total_kv_blocks")
    elif row.get("gpu_mem_util"):
        policy["gpu_memory_utilization"] = float(row["gpu_mem_util"])
    else:
        raise InexpressibleError("size of the KV pool not published")
    if row.get("cpu_kv_blocks") is not None:
        blocks = plans.count(row, "cpu_kv_blocks", least=0)
        if blocks:
            policy["kv_offload"] = {"capacity": math.ceil(blocks * _block_bytes(model))}
    elif row.get("cpu_offload"):
        policy["kv_offload"] = {"capacity": client["offload_bytes"]}
    elif row.get("cpu_offload") is None:
        raise InexpressibleError("KV offload not published")
    return policy


def _formats(row: Row, model: str) -> dict[str, str | bool]:
    """FP8 runs quantise the projections of a bf16 checkpoint when it is loaded; FP8 checkpoints are as they are.

    A precision of 16 bits is that of activations: a checkpoint whose name says other weights has those.
    """
    precision = row["precision"]
    if not precision:
        raise InexpressibleError("no precision stated")
    label = str(precision).lower()
    if label not in formats.LABELS:
        raise InexpressibleError(f"precision '{precision}' not known")
    if formats.LABELS[label][0] is None:
        return formats.named_formats(row["model"])
    return formats.weight_formats(model, gemm=label, moe=None)


def _prompt_tokens(row: Row, retokenised: float) -> int:
    measured = row.get("mean_input_tokens") or _mean_tokens(row)
    if measured:
        return round(measured)
    parts = [plans.count(row, name, reason="load not published", least=0)
             for name in ("system_prompt_len", "question_len")]  # fmt: skip
    return round(sum(parts) * retokenised)


def _mean_tokens(row: Row) -> float | None:
    """Of the prompts that were sent; None where a rate is missing, or no rate."""
    tokens, requests = row.get("input_tokens_per_s"), row.get("requests_per_s")
    if not positive(tokens) or not positive(requests) or not 1 <= tokens / requests < plans.MOST:
        return None
    return float(tokens / requests)


def _measured_lengths(table: Table, members: NDArray[np.intp]) -> dict[str, float]:
    tokens = table.numbers("input_tokens")[members]
    return {"mean_input_tokens": float(np.nanmean(tokens))} if np.isfinite(tokens).any() else {}


def _measured_requests(table: Table) -> dict[str, NDArray[np.float64]]:
    """Latencies of the requests that were answered; the time per token from the configured length."""
    ttft, e2e = table.numbers("ttft_s"), table.numbers("e2e_s")
    failed = table.numbers("has_error") == 1
    ttft, e2e = np.where(failed, np.nan, ttft), np.where(failed, np.nan, e2e)
    gaps = table.numbers("output_tokens_configured") - 1
    return {"ttft_s": ttft, "e2e_s": e2e, "tpot_s": (e2e - ttft) / np.where(gaps > 0, gaps, np.nan)}


def _once(table: Table) -> Table:
    """Without rows that say that they repeat another run of the table: the raw one is kept where it is there.

    Rows that say nothing of the kind are runs of their own, whatever their names are; so are those whose deployment is
    another one than that of the run that they name.
    """
    rows = table.rows()
    kept = np.ones(len(rows), dtype=bool)
    first: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if not row.get("same_run_as") and row["experiment"] is not None:
            first.setdefault((row["experiment"], row["stage_index"]), []).append(row)
    for index, row in enumerate(rows):
        if not row.get("same_run_as") or row["stage_index"] is None:
            continue
        known = first.setdefault((row["same_run_as"], row["stage_index"]), [])
        if any(_agree(row, other) for other in known):
            kept[index] = False
        else:
            known.append(row)
    return table.keep(kept)


def _questions(rows: list[dict[str, Any]]) -> tuple[list[Ask | None], list[str | None]]:
    questions: list[Ask | None] = []
    reasons: list[str | None] = []
    # What is published for the run as a whole holds for its stages: lengths sent come from the whole run's row.
    lengths = {_run(row): _mean_tokens(row) for row in rows if row["stage_index"] == -1 and _mean_tokens(row)}
    for row in rows:
        try:
            whole = None if row["experiment"] is None else lengths.get(_run(row))
            question = question_of({**row, "mean_input_tokens": whole})
            if plans.count(row, "stage_index", least=-1) >= len(_stages(row["stages"])):
                raise InexpressibleError("load not published: no such stage")
            if not any(positive(row.get(name)) for name in MEASURED):
                raise InexpressibleError("no measured value")
            questions.append(question)
            reasons.append(None)
        except InexpressibleError as missing:
            questions.append(None)
            reasons.append(str(missing))
    return questions, reasons


def _run(row: Row) -> tuple[Any, ...]:
    """A run's name and its deployment."""
    return (row["experiment"], *(row.get(name) for name in DEPLOYMENT))


def _pairs(index: int, row: Row, answer: Answer) -> Iterator[Pair]:
    """Statistics of the requests that were answered; none where no request of the stage was."""
    found = answer.requests
    order, stage = found["request_index"], int(row["stage_index"])
    stages = json.loads(row["stages"])
    ends = np.cumsum([int(rate * seconds + 1e-9) for rate, seconds in stages])
    first, last = (0, ends[-1]) if stage < 0 else (ends[stage - 1] if stage else 0, ends[stage])
    mask = (order >= first) & (order < last)
    if positive(row.get("n_success")):
        yield _pair(index, "n_success", row["n_success"], float(mask.sum()), answer, "counts.completed")
    if not mask.any():
        return
    for column, (name, statistic) in LATENCIES.items():
        if positive(row.get(column)):
            values = found[name][mask]
            value = 1e3 * float(np.mean(values) if statistic == "mean" else np.quantile(values, _level(statistic)))
            yield _pair(index, column, row[column], value, answer, f"{name[:-2]}.{statistic}".replace("median", "p50"))
    if positive(row.get("tpot_derived_ms")) and row["output_len"] > 1:
        mean = {name: 1e3 * float(np.mean(found[name][mask])) for name in ("e2e_s", "ttft_s")}
        value = (mean["e2e_s"] - mean["ttft_s"]) / (row["output_len"] - 1)
        yield _pair(index, "tpot_derived_ms", row["tpot_derived_ms"], value, answer, "tpot.mean")
    if positive(row.get("requests_per_s")):
        tail = ends[-2] if stage < 0 and len(ends) > 1 else first
        span = _span(found, int(first), int(last), tail=int(tail), seconds=stages[stage][1])
        value = float(mask.sum() / span)
        # No band. As long as the load is below saturation this is the rate of sending, over a span of minutes that ends
        # one answer after it: no factor of the simulator moves it, and how well the client kept its rate is not known.
        yield Pair(index, "requests_per_s", float(row["requests_per_s"]), value)


def _span(found: Mapping[str, NDArray[np.float64]], first: int, last: int, *, tail: int, seconds: float) -> float:
    """From the first request sent to the last one answered or given up, of requests `first` to `last` - 1.

    Of requests that were not answered the time of sending is not known: it lies between those of their neighbours, and
    the last one is sent when the stage that begins with request `tail` ends, after `seconds`.
    """
    mask = (found["request_index"] >= first) & (found["request_index"] < last)
    order, sent = found["request_index"][mask], found["arrival_s"][mask]
    begin, end = float(sent.min()), float((sent + found["e2e_s"][mask]).max())
    missing = np.setdiff1d(np.arange(first, last), order)
    if len(missing):
        timeout = facts.facts("clients")["inference_perf"]["timeout_s"]
        closing = float(sent[order >= tail].min() if (order >= tail).any() else sent.max()) + seconds
        known = np.append(order, last - 1.0), np.append(sent, max(closing, float(sent.max())))
        end = max(end, float(np.interp(missing[-1], *known)) + timeout)
    return end - begin


def _level(statistic: str) -> float:
    return 0.5 if statistic == "median" else float(statistic[1:]) / 100


def _pair(index: int, name: str, measured: float, predicted: float, answer: Answer, path: str) -> Pair:
    low, high = answer.bands.around(predicted, path)
    return Pair(index, name, float(measured), predicted, low, high)
