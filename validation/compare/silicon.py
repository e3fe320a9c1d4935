"""aiconfigurator's sample of serving measurements: closed loops on one deployment, mean TTFT and TPOT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from validation.compare import facts, formats, plans
from validation.compare.ask import Answer, Ask, answers, ask
from validation.compare.facts import InexpressibleError
from validation.compare.outcome import Outcome, Pair, outcome_of, positive
from validation.compare.table import Table

COLUMNS = frozenset({"backend", "model_path", "system", "mode", "isl", "osl", "tp_size", "concurrency",
                     "silicon_ttft_ms", "silicon_tpot_ms"})  # fmt: skip
TRUSTED_SPREAD = 2.0  # beyond it, runs of one published configuration differ in a setting that was not published
# The sides of a deployment, by `mode`; the columns of a side that is not split have no prefix.
MODES = {"agg": ("",), "disagg": ("prefill", "decode")}
# How `origin` begins -> whether the rows are of InferenceX, whose lengths are uniform in 0.8-1.0 of the stated ones.
ORIGINS = {"inferencex": True, "nvidia": False}
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
            for column, name in METRICS.items() if positive(row[column])]  # fmt: skip


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
    _check_repeats(row)
    clients = plans.count(row, "concurrency", reason="load not published: no concurrency")
    isl, osl = (plans.count(row, name, reason="load not published: no lengths") for name in ("isl", "osl"))
    engine = plans.engine(row["backend"])
    model, accelerator = facts.model(row["model_path"]), facts.device(row["system"])
    if row["mode"] not in MODES:
        raise InexpressibleError("mode not published" if row["mode"] is None else f"mode '{row['mode']}' not known")
    exported = _is_exported(row.get("origin"))
    facts.check_drafts(row, engine=engine)
    facts.check_plan(row, engine=engine)
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
    return ask(content, formats=_formats(row, model), sent=sent)


def _check_repeats(row: Row) -> None:
    """InexpressibleError for rows that repeat another one, and for equal configurations that differ too much.

    A table without these columns has not been searched for either; in one that has them, null is not "no".
    """
    if "exact_duplicate" in row and row["exact_duplicate"] is None:
        raise InexpressibleError("whether the row repeats another one not published")
    if row.get("exact_duplicate"):
        raise InexpressibleError("exact duplicate of another row")
    if "same_config_tpot_spread" in row:
        spread = row["same_config_tpot_spread"]
        if spread is None or spread < 1.0:
            raise InexpressibleError("no value of same_config_tpot_spread published")
        if spread > TRUSTED_SPREAD:
            raise InexpressibleError(
                "a setting was not published: equal configurations differ by more than a factor of 2"
            )


def _is_exported(origin: str | None) -> bool:
    """Whether a row is an export of InferenceX: how long prompts and answers are depends on it."""
    if origin is None:
        raise InexpressibleError("load not published: lengths depend on the origin of a row")
    for beginning, exported in ORIGINS.items():
        if origin.startswith(beginning):
            return exported
    raise InexpressibleError(f"origin '{origin[:40]}' not known")


def _formats(row: Row, model: str) -> dict[str, str | bool]:
    """The formats that the columns state; where one is missing, those that `precision` allows alone.

    A row that says nothing of formats ran the checkpoint: in its own ones, or those that its name says.
    """
    gemm, moe, precision = (row.get(name) for name in ("gemm_quant_mode", "moe_quant_mode", "precision"))
    if precision is not None and precision.lower() not in formats.LABELS:
        raise InexpressibleError(f"precision '{precision}' not known")
    if gemm is None and moe is None and precision is None:
        return formats.named_formats(row["model_path"])
    if gemm is None or (moe is None and facts.has_experts(model)):
        stated = None if precision is None else formats.only_format(row["model_path"], precision)
        if stated is None:
            raise InexpressibleError(f"weight formats not published: no {'gemm' if gemm is None else 'moe'}_quant_mode")
        gemm, moe = gemm or stated, moe or stated
    found = formats.weight_formats(model, gemm=gemm, moe=moe)
    formats.check_precision(precision, gemm)
    return found


def _plan(row: Row, prefix: str, model: str, accelerator: str, *, inflated: bool) -> plans.Plan:
    tp = plans.count(row, f"{prefix}tp_size", reason="plan not published")
    stages = plans.count(row, f"{prefix}pp_size", reason=f"plan not published: {prefix}pp_size")
    ranks, moe_tp, moe_ep = (
        None if row.get(column) is None else plans.count(row, column, reason="plan not published", least=0)
        for column in (f"{prefix}{axis}_size" for axis in ("attention_dp", "moe_tp", "moe_ep"))
    )
    if facts.has_experts(model):
        if ranks is None and moe_tp and moe_ep and moe_tp * moe_ep == tp:
            ranks = 1  # attention and experts are on the same GPUs
        for axis, size in (("attention_dp", ranks), ("moe_tp", moe_tp), ("moe_ep", moe_ep)):
            if size is None:
                raise InexpressibleError(f"plan not published: {axis}_size of a mixture of experts")
    plan = plans.parallel_plan(
        model=model, tp=tp, attention_dp=ranks or 1, pp=stages, moe_tp=moe_tp or 1, moe_ep=moe_ep or 1,
        inflated=inflated,
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
