"""InferenceX: DeepSeek-R1 under closed loops, and decode latency over the position in the context."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from validation.compare import facts, formats, plans
from validation.compare.ask import Answer, Ask, ask
from validation.compare.facts import InexpressibleError
from validation.compare.outcome import Outcome, Pair, positive
from validation.compare.silicon import compare_rows, group, pair
from validation.compare.table import Table

SERVING = frozenset({"hardware", "framework", "model", "precision", "spec_method", "disagg", "decode_tp", "decode_ep",
                     "decode_dp_attention", "isl", "osl", "conc", "median_ttft", "median_tpot"})  # fmt: skip
POSITION = frozenset({"model", "framework", "parallel", "isl", "osl", "conc", "num_prompts", "output_throughput",
                      "median_ttft", "median_tpot", "median_e2el"})  # fmt: skip
LATENCIES = {
    f"{statistic}_{column}": f"{name}.{statistic.replace('median', 'p50')}"
    for column, name in (("ttft", "ttft"), ("tpot", "tpot"), ("e2el", "e2e"))
    for statistic in ("mean", "median", "p90", "p99")
}  # fmt: skip
Row = Mapping[str, Any]


def compare_serving(table: Table) -> tuple[Table, Outcome]:
    """One closed loop per row; seconds, and tokens/s per GPU of deployments that are not split."""
    return compare_rows(table, question_of, _pairs)


def compare_position(table: Table) -> tuple[Table, Outcome]:
    """One closed loop per row, on the eight H200 that the study names in its job scripts; tokens/s of all of them."""
    return compare_rows(table, position_question, _pairs)


def _pairs(index: int, row: Row, answer: Answer) -> list[Pair]:
    found = [pair(index, column, row[column], answer, path) for column, path in LATENCIES.items()
             if positive(row.get(column))]  # fmt: skip
    if positive(row.get("output_tput_per_gpu")) and not row["disagg"]:
        share = 1.0 / int(row["decode_tp"])
        found.append(
            pair(index, "output_tput_per_gpu", row["output_tput_per_gpu"], answer, "throughput.output_tokens_per_s",
                 scale=share)
        )  # fmt: skip
    for column, path in (("output_throughput", "output_tokens_per_s"), ("request_throughput", "requests_per_s")):
        if positive(row.get(column)):
            found.append(pair(index, column, row[column], answer, f"throughput.{path}"))
    return found


def question_of(row: Row) -> Ask:
    """The scenario of a row; InexpressibleError when a fact is missing."""
    if row["disagg"] is None:
        raise InexpressibleError("plan not published: whether prefill and decode are split")
    if row["spec_method"] is None:
        raise InexpressibleError("whether tokens were drafted not published")
    if row["spec_method"] != "none":
        raise InexpressibleError("acceptance of drafts not published")
    engine = plans.engine(row["framework"])
    model, accelerator = facts.model(row["model"]), facts.device(row["hardware"])
    label = row["precision"]
    if label is None:
        raise InexpressibleError("no precision stated")
    version = _version(row.get("image"))
    workload, sent = plans.closed_loop(spread=True, **_load(row))
    plan = _plan(row, "decode", accelerator, model)
    content: dict[str, Any] = {
        "model": model, "hardware": accelerator, "engine": engine, "engine_version": facts.release_of(version),
        "policy": plans.engine_policy(engine, version=version, accelerator=accelerator, model=model, plan=plan,
                                      date=row.get("date")),
        "workload": workload,
    }  # fmt: skip
    if row["disagg"]:
        groups = []
        for role in ("prefill", "decode"):
            workers = plans.count(row, f"{role}_num_workers", reason="plan not published: number of workers")
            own = _plan(row, role, accelerator, model)
            if row.get(f"num_{role}_gpu") not in (None, workers * own["gpus"]):
                raise InexpressibleError("plan not published: workers and their GPUs do not add up")
            policy = plans.engine_policy(
                engine, version=version, accelerator=accelerator, model=model, plan=own, date=row.get("date")
            )
            groups.append(group(role, workers, own, policy, model=model))
        content["deployment"] = {"groups": groups, "router": {"kind": "least_loaded"}}
    else:
        content |= plans.keys_of(plan, model)
    return ask(content, formats=formats.weight_formats(model, gemm=label, moe=label), sent=sent)


def _load(row: Row) -> dict[str, int]:
    return {
        "clients": plans.count(row, "conc", reason="load not published: no concurrency"),
        **{name: plans.count(row, name, reason="load not published: no lengths") for name in ("isl", "osl")},
    }


def _plan(row: Row, role: str, accelerator: str, model: str) -> plans.Plan:
    """TP counts the GPUs of a worker; with data-parallel attention each of them is a rank."""
    gpus, ep = (plans.count(row, f"{role}_{axis}", reason="plan not published") for axis in ("tp", "ep"))
    spread = row.get(f"{role}_dp_attention")
    if spread is None:
        raise InexpressibleError("plan not published: whether attention is data-parallel")
    if ep not in (1, gpus):
        raise InexpressibleError("plan not published: attention and experts are on different numbers of GPUs")
    ranks = gpus if spread else 1
    plan = {"tp": gpus // ranks, "dp": ranks, "ep": ep, "pp": 1, "gpus": gpus}
    plans.check_size(plan, accelerator=accelerator, model=model)
    return plan


def _version(image: str | None) -> str | None:
    """The version in a container's tag: `lmsysorg/sglang:v0.5.8-cu130` is 0.5.8."""
    return None if not image or ":" not in image else image.rsplit(":", 1)[1].lstrip("v")


def position_question(row: Row) -> Ask:
    """As `question_of`, for runs whose plan is one of tp8, tep8 (experts spread) and dep8 (data-parallel attention)."""
    layouts = {"tp": (False, False), "tep": (True, False), "dep": (True, True)}
    name = str(row["parallel"])
    kind, gpus = name.rstrip("0123456789"), name[len(name.rstrip("0123456789")):]  # fmt: skip
    if kind not in layouts or not int(gpus or 0):
        raise InexpressibleError(f"plan '{name[:40]}' not known")
    client = facts.facts("clients")["token_position"]
    engine, model, accelerator = plans.engine(row["framework"]), facts.model(row["model"]), client["device"]
    spread, ranks = layouts[kind]
    count = int(gpus)
    spread = spread and facts.has_experts(model)
    plan = {"tp": 1 if ranks else count, "dp": count if ranks else 1, "ep": count if spread else 1, "pp": 1,
            "gpus": count}  # fmt: skip
    plans.check_size(plan, accelerator=accelerator, model=model)
    workload, _ = plans.closed_loop(spread=False, **_load(row))
    workload["num_requests"] = plans.count(row, "num_prompts", reason="load not published: no number of prompts")
    content: dict[str, Any] = {
        "model": model, "hardware": accelerator, "engine": engine,
        "policy": plans.engine_policy(
            engine, version=client["engine_version"], accelerator=accelerator, model=model, plan=plan
        ),
        "workload": workload, **plans.keys_of(plan, model),
    }  # fmt: skip
    return ask(content, formats=formats.named_formats(row["model"]))
