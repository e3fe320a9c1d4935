"""aiconfigurator's sample of serving measurements: closed loops on one deployment, mean TTFT and TPOT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from validation.compare import facts, formats, plans
from validation.compare.ask import Answer, Ask, answers, ask
from validation.compare.facts import InexpressibleError
from validation.compare.outcome import Outcome, Pair, outcome_of
from validation.compare.table import Table

COLUMNS = frozenset({"backend", "model_path", "system", "mode", "isl", "osl", "tp_size", "concurrency",
                     "silicon_ttft_ms", "silicon_tpot_ms"})  # fmt: skip
TRUSTED_SPREAD = 2.0  # beyond it, runs of one published configuration differ in a setting that was not published
# The sides of a deployment, by `mode`; the columns of a side that is not split have no prefix.
MODES = {"agg": ("",), "disagg": ("prefill", "decode")}
METRICS = {"silicon_ttft_ms": "ttft", "silicon_tpot_ms": "tpot"}
Row = Mapping[str, Any]


def compare(table: Table) -> tuple[Table, Outcome]:
    """One closed loop per row."""
    return compare_rows(table, question_of, _pairs)


def compare_rows(
    table: Table, make: Callable[[Row], Ask], pairs_of: Callable[[int, Row, Answer], list[Pair]]
) -> tuple[Table, Outcome]:
    """A question `make(row)` for every row, and the pairs that its answer gives; a row without any has a reason."""
    rows = table.rows()
    reasons, questions = questions_of(rows, make)
    found = answers([question for question in questions if question is not None], bands=table.bands)
    pairs: list[Pair] = []
    for index, (row, question) in enumerate(zip(rows, questions, strict=True)):
        if question is None:
            continue
        reasons[index] = found[question].refused
        if reasons[index] is None:
            own = pairs_of(index, row, found[question])
            reasons[index] = None if own else "no measured value"
            pairs += own
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
    clients = plans.count(row, "concurrency", reason="load not published: no concurrency")
    isl, osl = (plans.count(row, name, reason="load not published: no lengths") for name in ("isl", "osl"))
    engine = plans.engine(row["backend"])
    facts.check_drafts(row, engine=engine)
    facts.check_plan(row, engine=engine)
    model, accelerator = facts.model(row["model_path"]), facts.device(row["system"])
    exported = str(row.get("origin") or "").startswith("inferencex")
    if row["mode"] not in MODES:
        raise InexpressibleError("mode not published" if row["mode"] is None else f"mode '{row['mode']}' not known")
    sides = {role: _plan(row, f"{role}_" if role else "", model, accelerator, inflated=exported)
             for role in MODES[row["mode"]]}  # fmt: skip
    first = next(iter(sides.values()))
    workload, sent = plans.closed_loop(isl=isl, osl=osl, clients=clients, spread=exported)
    content: dict[str, Any] = {
        "model": model, "hardware": accelerator, "engine": engine,
        "policy": _policy(engine, row, accelerator, model, first), "workload": workload,
        **(plans.keys_of(first, model) if row["mode"] == "agg" else _disaggregated(row, sides, engine, accelerator,
                                                                                   model)),
    }  # fmt: skip
    # Without a stated format, the checkpoint's: its own, or the one that its name says.
    stated = row.get("gemm_quant_mode") or formats.format_of(row["model_path"])
    labels = formats.weight_formats(model, gemm=stated, moe=row.get("moe_quant_mode"))
    return ask(content, formats=labels, sent=sent)


def _plan(row: Row, prefix: str, model: str, accelerator: str, *, inflated: bool) -> plans.Plan:
    tp = plans.count(row, f"{prefix}tp_size", reason="plan not published")
    ranks, moe_tp, moe_ep = (row.get(f"{prefix}{axis}_size") for axis in ("attention_dp", "moe_tp", "moe_ep"))
    if facts.has_experts(model):
        if ranks is None and moe_tp and moe_ep and moe_tp * moe_ep == tp:
            ranks = 1  # attention and experts are on the same GPUs
        for axis, size in (("attention_dp", ranks), ("moe_tp", moe_tp), ("moe_ep", moe_ep)):
            if size is None:
                raise InexpressibleError(f"plan not published: {axis}_size of a mixture of experts")
    plan = plans.parallel_plan(
        model=model, tp=tp, attention_dp=int(ranks or 1), pp=int(row.get(f"{prefix}pp_size") or 1),
        moe_tp=int(moe_tp or 1), moe_ep=int(moe_ep or 1), inflated=inflated,
    )  # fmt: skip
    plans.check_size(plan, accelerator=accelerator, model=model)
    return plan


def _policy(engine: str, row: Row, accelerator: str, model: str, plan: plans.Plan) -> dict[str, Any]:
    return plans.engine_policy(
        engine,
        version=row.get("backend_version"),
        accelerator=accelerator,
        model=model,
        plan=plan,
        date=row.get("measured"),
    )


def _disaggregated(
    row: Row, sides: Mapping[str, plans.Plan], engine: str, accelerator: str, model: str
) -> dict[str, Any]:  # fmt: skip
    groups = []
    for role, plan in sides.items():
        workers = plans.count(row, f"{role}_num_workers", reason="plan not published: number of workers")
        groups.append(group(role, workers, plan, _policy(engine, row, accelerator, model, plan), model=model))
    return {"deployment": {"groups": groups, "router": {"kind": "least_loaded"}}}


def group(role: str, workers: int, plan: plans.Plan, policy: Mapping[str, Any], *, model: str) -> dict[str, Any]:
    """A group of a disaggregated deployment; ranks of a dense model share nothing and are workers of their own."""
    parallel = {key: plan[key] for key in ("tp", "dp", "ep", "pp")}
    if not facts.has_experts(model):
        workers, parallel = workers * plan["dp"], parallel | {"dp": 1, "ep": 1}
    return {"name": role, "role": role, "count": workers, "parallel": parallel, "policy": dict(policy)}
