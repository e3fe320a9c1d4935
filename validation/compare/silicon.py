"""aiconfigurator's sample of serving measurements: closed loops on one deployment, mean TTFT and TPOT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from validation.compare import facts, plans
from validation.compare.ask import Answer, Ask, answers, ask
from validation.compare.facts import InexpressibleError
from validation.compare.outcome import Outcome, Pair, outcome_of
from validation.compare.table import Table

COLUMNS = frozenset({"backend", "model_path", "system", "mode", "isl", "osl", "tp_size", "concurrency",
                     "silicon_ttft_ms", "silicon_tpot_ms"})  # fmt: skip
TRUSTED_SPREAD = 2.0  # beyond it, runs of one published configuration differ in a setting that was not published
METRICS = {"silicon_ttft_ms": "ttft", "silicon_tpot_ms": "tpot"}
Row = Mapping[str, Any]


def compare(table: Table) -> tuple[Table, Outcome]:
    """One closed loop per row."""
    return compare_rows(table, question_of, _pairs)


def compare_rows(
    table: Table, make: Callable[[Row], Ask], pairs_of: Callable[[int, Row, Answer], list[Pair]]
) -> tuple[Table, Outcome]:
    """A question `make(row)` for every row, and the pairs that its answer gives."""
    rows = table.rows()
    reasons, questions = questions_of(rows, make)
    found = answers([question for question in questions if question is not None])
    pairs: list[Pair] = []
    for index, (row, question) in enumerate(zip(rows, questions, strict=True)):
        if question is None:
            continue
        reasons[index] = found[question].refused
        if reasons[index] is None:
            pairs += pairs_of(index, row, found[question])
    return table, outcome_of(reasons, pairs)


def _pairs(index: int, row: Row, answer: Answer) -> list[Pair]:
    return [pair(index, column, row[column], answer, f"{name}.mean", scale=1e3)
            for column, name in METRICS.items() if row[column]]  # fmt: skip


def questions_of(rows: list[dict[str, Any]], make: Any) -> tuple[list[str | None], list[Ask | None]]:
    """(reason, question) of every row: one of the two is None."""
    reasons: list[str | None] = []
    questions: list[Ask | None] = []
    for row in rows:
        try:
            questions.append(make(row))
            reasons.append(None)
        except InexpressibleError as missing:
            questions.append(None)
            reasons.append(str(missing))
    return reasons, questions


def pair(index: int, column: str, measured: float, answer: Answer, path: str, *, scale: float = 1.0) -> Pair:
    """A measured column against a metric of the result, `scale` units of the column per SI unit."""
    value: Any = answer.metrics
    for part in path.split("."):
        value = value[part]
    predicted = float("nan") if value is None else scale * float(value)
    low, high = answer.bands.around(predicted, path)
    return Pair(index, column, float(measured), predicted, low, high)


def question_of(row: Row) -> Ask:
    """The scenario of a row; InexpressibleError when a fact is missing."""
    if row.get("exact_duplicate"):
        raise InexpressibleError("exact duplicate of another row")
    if (row.get("same_config_tpot_spread") or 1.0) > TRUSTED_SPREAD:
        raise InexpressibleError("a setting was not published: equal configurations differ by more than a factor of 2")
    if not row["concurrency"]:
        raise InexpressibleError("load not published: no concurrency")
    engine = plans.engine(row["backend"])
    model, accelerator = facts.model(row["model_path"]), facts.device(row["system"])
    exported = str(row.get("origin") or "").startswith("inferencex")
    if row["mode"] == "agg":
        sides = {"both": _plan(row, "", model, accelerator, inflated=exported)}
    else:
        sides = {role: _plan(row, f"{role}_", model, accelerator, inflated=exported) for role in ("prefill", "decode")}
    if any((row.get(f"{prefix}pp_size") or 1) > 1 for prefix in ("", "prefill_", "decode_")):
        raise InexpressibleError("pipeline stages of a measured run are not expressed yet")
    first = next(iter(sides.values()))
    content: dict[str, Any] = {
        "model": model, "hardware": accelerator, "engine": engine,
        "policy": _policy(engine, row, accelerator, model, first),
        "workload": plans.closed_loop(
            isl=int(row["isl"]), osl=int(row["osl"]), clients=int(row["concurrency"]), spread=exported
        ),
        **(plans.keys_of(first, model) if row["mode"] == "agg" else _disaggregated(row, sides, engine, accelerator,
                                                                                   model)),
    }  # fmt: skip
    return ask(content, formats=plans.weight_formats(model, gemm=row["gemm_quant_mode"], moe=row["moe_quant_mode"]))


def _plan(row: Row, prefix: str, model: str, accelerator: str, *, inflated: bool) -> plans.Plan:
    if row.get(f"{prefix}tp_size") is None:
        raise InexpressibleError("plan not published")
    plan = plans.parallel_plan(
        model=model, tp=int(row[f"{prefix}tp_size"]), attention_dp=int(row.get(f"{prefix}attention_dp_size") or 1),
        moe_tp=int(row.get(f"{prefix}moe_tp_size") or 1), moe_ep=int(row.get(f"{prefix}moe_ep_size") or 1),
        inflated=inflated,
    )  # fmt: skip
    plans.check_size(plan, accelerator=accelerator, model=model)
    return plan


def _policy(engine: str, row: Row, accelerator: str, model: str, plan: plans.Plan) -> dict[str, Any]:
    return plans.engine_policy(
        engine, version=row.get("backend_version"), accelerator=accelerator, model=model, plan=plan
    )


def _disaggregated(
    row: Row, sides: Mapping[str, plans.Plan], engine: str, accelerator: str, model: str
) -> dict[str, Any]:  # fmt: skip
    groups = []
    for role, plan in sides.items():
        workers = row.get(f"{role}_num_workers")
        if not workers:
            raise InexpressibleError("plan not published: number of workers")
        groups.append(group(role, int(workers), plan, _policy(engine, row, accelerator, model, plan)))
    return {"deployment": {"groups": groups, "router": {"kind": "least_loaded"}}}


def group(role: str, workers: int, plan: plans.Plan, policy: Mapping[str, Any]) -> dict[str, Any]:
    """A group of a disaggregated deployment."""
    parallel = {key: plan[key] for key in ("tp", "dp", "ep")}
    return {"name": role, "role": role, "count": workers, "parallel": parallel, "policy": dict(policy)}
