"""Groups that are left out of fits of overheads: nothing of them is seen, and leaving out nothing is an error."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from perfsim.errors import InputError
from validation.compare.outcome import Outcome, Values
from validation.compare.table import Table
from validation.engines import runs as engine_runs
from validation.engines.fit import Linear
from validation.engines.runs import Runs, loops_group, stages_group, without
from validation.report import left_out
from validation.report.entries import entries

TRUE = {"a": (5e-4, 7e-3), "b": (8e-4, 4e-3)}  # what made the runs of each model: a step's host time, the ingress


def made_up_runs() -> tuple[Runs, Linear]:
    """Two models of load tests with overheads of their own, and three groups of closed loops of two other engines."""
    generator = np.random.Generator(np.random.PCG64(1))
    stages = [stages_group(model) for model in TRUE for _ in range(12)]
    loops = [("trtllm", "h100_sxm"), ("sglang", "b200_sxm"), ("sglang", "h100_sxm")]
    group = np.array([*stages, *(loops_group(engine, "m", system) for engine, system in loops for _ in range(12))])
    metric = np.array([*(["tpot_derived_ms", "ttft_mean_ms"] * 12), *(["silicon_tpot_ms"] * 36)])
    engine = np.array([*(["vllm"] * 24), *(["trtllm"] * 12), *(["sglang"] * 24)])
    names = (("vllm", "step_host"), ("vllm", "ingress"), ("trtllm", "step_host"), ("sglang", "step_host"))
    size = len(group)
    slope = generator.uniform(500.0, 1500.0, (size, 4)) * np.stack([engine == name for name, _ in names], axis=1)
    start = np.array([1e-4, 5e-3, 1e-4, 1e-4])
    true = np.tile([0.0, 0.0, 2e-4, 3e-4], (size, 1))
    for model, overheads in TRUE.items():
        true[group == stages_group(model), :2] = overheads
    base = generator.uniform(10.0, 20.0, size)
    measured = base + (slope * (true - start)).sum(axis=1)
    table = Table(Path("x.parquet"), pa.table({"model": ["a", "a", "b"], "stage_index": [-1, 0, -1]}))
    runs = Runs(table, [(name, None) for name in engine[24:]], measured, engine, group, metric, {}, {})
    scale = np.array([2e-4, 1e-3, 2e-4, 2e-4])
    return runs, Linear(names, start, scale, base, slope, np.ones(size, dtype=bool))


def stand_in(monkeypatch, tmp_path, runs: Runs, linear: Linear) -> list[tuple[str, dict[str, float]]]:
    """Let the section run on these; the list gets the model and the overheads of every simulation."""
    asked = []

    def compare(table, *, solve):
        asked.append((table.texts("model")[0], dict(solve.keywords["engine"])))
        ones = np.full(len(table), 10.0)
        nothing = np.full(len(table), np.nan)
        values = Values(np.arange(len(table)), ones, ones * 1.1, nothing, nothing)
        return table, Outcome([None] * len(table), {"tpot_derived_ms": values})

    monkeypatch.setattr(left_out, "read", lambda _: runs)
    monkeypatch.setattr(left_out, "linearised", lambda *_: linear)
    monkeypatch.setattr(left_out, "compare_stages", compare)
    (tmp_path / "serving").mkdir()
    for stem in left_out.TABLES:
        (tmp_path / "serving" / f"{stem}.parquet").write_bytes(b"rows")
    return asked


def test_groups_left_out_are_predicted_by_the_fit_without_them(tmp_path, monkeypatch) -> None:
    asked = stand_in(monkeypatch, tmp_path, *made_up_runs())
    found = left_out.run(tmp_path)
    assert [model for model, _ in asked] == ["a", "b"]
    for (_, overheads), other in zip(asked, ("b", "a"), strict=True):  # each has what the other model alone tells
        assert (overheads["step_host"], overheads["ingress"]) == pytest.approx(TRUE[other], rel=1e-3)
    assert found["left_out"]["all"]["tpot_derived_ms"]["n"] == 3
    assert found["left_out"]["whole runs"]["tpot_derived_ms"]["mape_mean"] == pytest.approx(0.1)
    assert found["loops"]["SGLang"]["silicon_tpot_ms"]["mape_median"] < 1e-3
    assert set(found["tables"]) == {f"{stem}.parquet" for stem in left_out.TABLES}
    json.dumps(found, allow_nan=False)
    assert "| SGLang | sglang m h100_sxm | 12 | 0.0% | 0.0% |" in "\n".join(left_out.render(found))
    shown = [one for one in entries({"left-out": found}) if one.role == "leave one out"]
    assert shown == []  # tables that were not run have no rows in the first table


def test_leaving_out_what_is_not_there_is_an_error(tmp_path, monkeypatch) -> None:
    runs, linear = made_up_runs()
    assert without(runs, linear.usable, stages_group("a")).tolist() == [False] * 12 + [True] * 48
    unusable = linear.usable & (runs.group != stages_group("a"))
    for usable, group in ((linear.usable, stages_group("c")), (unusable, stages_group("a"))):
        with pytest.raises(InputError, match=f"no usable run is in the group '{group}'"):
            without(runs, usable, group)
    with pytest.raises(InputError, match="nothing is left to fit"):
        without(runs, runs.group == stages_group("a"), stages_group("a"))
    renamed = np.char.replace(runs.group.astype(str), "vllm a", "a")
    stand_in(monkeypatch, tmp_path, replace(runs, group=renamed), linear)
    with pytest.raises(InputError, match="no usable run is in the group 'vllm a "):
        left_out.run(tmp_path)


def test_runs_are_in_the_groups_that_are_left_out(tmp_path, monkeypatch) -> None:
    """Of the reader itself: every model of its load tests, and every configuration of its loops, has a group."""
    loop = {"backend": "trtllm", "backend_version": "1.1", "model_path": "Qwen/Qwen3-32B", "system": "h200_sxm",
            "precision": "fp8", "mode": "agg", "tp_size": 1.0, "attention_dp_size": 1.0, "moe_ep_size": 1.0,
            "silicon_tpot_ms": 9.0, "concurrency": 8.0, "isl": 1024, "osl": 1024}  # fmt: skip
    stages = pa.table({"overloaded": [False, False, True], "hardware": ["H100"] * 3, "model": ["a", "b", "c"]})
    (tmp_path / "serving").mkdir()
    pq.write_table(stages, tmp_path / "serving" / f"{left_out.STAGES}.parquet")
    pq.write_table(pa.Table.from_pylist([loop]), tmp_path / "serving" / f"{left_out.LOOPS}.parquet")
    ones, nothing = np.ones(2), np.full(2, np.nan)
    values = {name: Values(np.arange(2), ones, ones, nothing, nothing) for name in engine_runs.STAGE_METRICS}
    monkeypatch.setattr(engine_runs, "compare_stages", lambda table, *, solve: (table, Outcome([None] * 2, values)))
    monkeypatch.setattr(engine_runs.silicon, "questions_of", lambda rows, _: ([None] * len(rows), []))
    monkeypatch.setattr(engine_runs.silicon, "question_of", lambda row: row)
    runs = engine_runs.read(tmp_path)
    usable = np.ones(len(runs.group), dtype=bool)
    assert runs.stages.texts("model").tolist() == ["a", "b"]
    assert [without(runs, usable, stages_group(model)).tolist() for model in ("a", "b")] == [
        [False, True, False, True, True], [True, False, True, False, True],
    ]  # fmt: skip
    own = without(runs, usable, loops_group("trtllm", "Qwen/Qwen3-32B", "h200_sxm"))
    assert own.tolist() == [True] * 4 + [False]
