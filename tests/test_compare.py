"""Tables against predictions: the command line, filters, summaries and reasons, on tables made up for the purpose."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from perfsim.errors import InputError
from validation.compare import facts, plans
from validation.compare.cli import compare, main
from validation.compare.facts import InexpressibleError
from validation.compare.kinds import KINDS, kind_of
from validation.compare.outcome import Outcome, Values, report, summary
from validation.compare.table import Table, where

RUN = {
    "experiment": "a", "model": "meta-llama/Llama-3.1-8B-Instruct", "hardware": "H100", "tp": 1, "precision": "FP16",
    "cpu_offload": False, "gpu_mem_util": 0.9, "max_num_batched_tokens": 2048, "max_num_seqs": 128,
    "same_run_as": None, "stages": "[[2.0, 20], [4.0, 20]]", "system_prompt_len": 100, "question_len": 200,
    "output_len": 50, "overloaded": False, "tpot_derived_ms": 8.0, "ttft_mean_ms": 25.0, "e2e_p99_ms": 500.0,
}  # fmt: skip


def stage(index: int, **changes: object) -> dict[str, object]:
    return {**RUN, "stage_index": index, "e2e_mean_ms": 400.0 + index, **changes}


def write(path, rows: list[dict[str, object]]):
    columns = list(rows[0])
    pq.write_table(pa.table({name: pa.array([row.get(name) for row in rows]) for name in columns}), path)
    return path


@pytest.fixture(name="stages")
def stages_table(tmp_path):
    rows = [stage(-1), stage(0), stage(1), stage(0, experiment="b", same_run_as="a"),
            stage(0, experiment="c", gpu_mem_util=None), stage(0, experiment="d", hardware="H999")]  # fmt: skip
    return write(tmp_path / "any-name.parquet", rows)


def test_runs_by_stage(stages):
    found = compare(stages)
    assert (found["rows"], found["expressible"]) == (5, 3)  # the repeated run counts once
    assert found["not_expressible"] == {
        "no descriptor of device 'H999'": 1, "size of the KV pool not published": 1,
    }  # fmt: skip
    assert set(found["metrics"]) == {"e2e_mean_ms", "e2e_p99_ms", "tpot_derived_ms", "ttft_mean_ms"}
    assert found["metrics"]["tpot_derived_ms"]["n"] == 3
    light = 1e3 * 2 * (8.03e9 - 128_256 * 4096) / 3.35e12  # every weight but the embedding is read in each step
    assert light < 8.0 * (1 + found["metrics"]["tpot_derived_ms"]["bias"]) < 1.7 * light
    groups = found["groups"]
    assert set(groups["stage_index"]) == {"-1", "0", "1"}
    assert groups["overloaded"]["false"]["ttft_mean_ms"]["n"] == 3
    assert compare(stages) == found


def test_where_is_an_and_over_typed_values(stages):
    assert compare(stages, ["stage_index=0"])["rows"] == 3
    assert compare(stages, ["stage_index=0", "hardware=H100", "gpu_mem_util=0.90"])["rows"] == 1
    assert compare(stages, ["overloaded=false", "gpu_mem_util=null"])["expressible"] == 0
    assert compare(stages, ["tp=7"]) == {
        "table": "any-name.parquet", "rows": 0, "expressible": 0, "not_expressible": {}, "metrics": {}, "groups": {},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("hardwear=H100", "did you mean 'hardware'"),
        ("tp=two", "expected an integer, got 'two'"),
        ("overloaded=maybe", "expected true or false"),
        ("gpu_mem_util=x", "expected a number"),
        ("tp", "expected COLUMN=VALUE"),
    ],
)
def test_bad_conditions_are_one_line_and_exit_2(stages, capsys, condition, message):
    assert main(["--table", str(stages), "--where", condition]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_bad_tables(tmp_path, capsys):
    assert main(["--table", str(tmp_path / "none.parquet")]) == 2
    (tmp_path / "text.parquet").write_text("no Parquet")
    assert main(["--table", str(tmp_path / "text.parquet")]) == 2
    odd = write(tmp_path / "odd.parquet", [{"system": "h100_sxm", "framework": "vllm", "m": 1, "n": 1, "k": 1}])
    assert main(["--table", str(odd)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "no file" in lines[0]
    assert "not a readable Parquet file" in lines[1]
    assert "nearest to 'products of aiconfigurator'" in lines[2]


def test_output(stages, capsys):
    assert main(["--table", str(stages), "--where", "stage_index=-1", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metrics"]["e2e_mean_ms"]["n"] == 1
    assert main(["--table", str(stages), "--where", "stage_index=-1"]) == 0
    assert "1 rows, 1 expressible" in capsys.readouterr().out


def values(measured, predicted, low, high) -> Values:
    columns = [np.array(column, dtype=float) for column in (measured, predicted, low, high)]
    return Values(np.arange(len(measured)), *columns)


def test_summary():
    found = summary(values([1, 2, 4, 10], [1.1, 1.8, 4, 15], [0.9, 1.0, np.nan, 12], [1.2, 1.9, np.nan, 18]))
    assert found["n"] == 4
    assert found["mape_mean"] == pytest.approx((0.1 + 0.1 + 0 + 0.5) / 4)
    assert found["mape_median"] == pytest.approx(0.1)
    assert found["bias"] == pytest.approx((0.1 - 0.1 + 0 + 0.5) / 4)
    assert found["coverage_90"] == pytest.approx(1 / 3)
    assert found["band_width_median"] == pytest.approx(0.4)  # of 0.3/1.1, 0.9/1.8 and 6/15
    assert summary(values([1], [2], [np.nan], [np.nan]))["band_width_median"] is None


def test_groups_are_columns_of_few_values(tmp_path):
    data = pa.table({
        "few": pa.array([i % 3 for i in range(60)]), "many": pa.array(range(60)),
        "metric": pa.array([f"m{i}" for i in range(60)]), "share": pa.array([0.5, 1.0] * 30), "blank": pa.nulls(60),
        "list": pa.array([[i] for i in range(60)]),
    })  # fmt: skip
    table = Table(tmp_path / "t.parquet", data)
    ones = np.ones(60)
    pairs = values(ones, ones * 2, ones * np.nan, ones * np.nan)
    found = report(table, Outcome([None] * 60, {"value": pairs}), name="t")
    assert set(found["groups"]) == {"few", "metric", "share", "blank"}
    assert len(found["groups"]["metric"]) == 60  # always there, however many values it has
    assert set(found["groups"]["share"]) == {"0.5", "1"}
    assert found["groups"]["few"]["0"]["value"]["n"] == 20
    assert found["groups"]["blank"]["null"]["value"]["mape_mean"] == 1.0


def test_kinds_are_told_apart_by_columns(tmp_path):
    for kind in KINDS:
        table = Table(tmp_path / "t.parquet", pa.table({name: pa.nulls(0) for name in sorted(kind.columns)}))
        assert kind_of(table) is kind
    with pytest.raises(InputError, match="no column of a known table"):
        kind_of(Table(tmp_path / "t.parquet", pa.table({"x": [1]})))


def test_where_on_dictionaries_and_small_floats(tmp_path):
    data = pa.table({"name": pa.array(["a", "b", None]).dictionary_encode(), "x": pa.array([0.1, 0.2, 0.1], "float32")})
    table = Table(tmp_path / "t.parquet", data)
    assert len(where(table, ["name=b"])) == 1
    assert len(where(table, ["x=0.1"])) == 2
    assert len(where(table, ["name=null", "x=0.1"])) == 1


@pytest.mark.parametrize(
    ("numbers", "plan"),
    [
        ((8, 1, 8, 1), {"tp": 8, "dp": 1, "ep": 1, "pp": 1, "gpus": 8}),
        ((8, 1, 1, 8), {"tp": 8, "dp": 1, "ep": 8, "pp": 1, "gpus": 8}),
        ((64, 1, 8, 8), {"tp": 8, "dp": 1, "ep": 8, "pp": 1, "gpus": 8}),
        ((1, 64, 8, 8), {"tp": 1, "dp": 8, "ep": 8, "pp": 1, "gpus": 8}),
        ((4, 4, 1, 16), {"tp": 1, "dp": 4, "ep": 4, "pp": 1, "gpus": 4}),
    ],
)
def test_exported_plans_count_gpus_once(numbers, plan):
    tp, ranks, moe_tp, moe_ep = numbers
    found = plans.parallel_plan(
        model="deepseek-ai--DeepSeek-R1", tp=tp, attention_dp=ranks, moe_tp=moe_tp, moe_ep=moe_ep, inflated=True
    )
    assert found == plan


def test_plans_that_do_not_fit_are_reasons():
    model = "deepseek-ai--DeepSeek-R1"
    with pytest.raises(InexpressibleError, match="different numbers of GPUs"):
        plans.parallel_plan(model=model, tp=8, attention_dp=1, moe_tp=2, moe_ep=2, inflated=False)
    with pytest.raises(InexpressibleError, match="tp counts all GPUs"):
        plans.check_size({"tp": 28, "dp": 1, "ep": 1, "gpus": 28}, accelerator="gb200-186gb", model=model)
    with pytest.raises(InexpressibleError, match="network between nodes not published: more than 8"):
        plans.check_size({"tp": 16, "dp": 1, "ep": 16, "gpus": 16}, accelerator="h200-141gb-sxm", model=model)


def test_engine_versions():
    assert facts.version_of("vllm", "0.15.1")["async_scheduling"] is True
    assert facts.version_of("vllm", "0.12.0")["async_scheduling"] is False
    assert facts.version_of("sglang", None)["async_scheduling"] is True  # the same in all versions
    with pytest.raises(InexpressibleError, match="version not published"):
        facts.version_of("vllm", None)
    with pytest.raises(InexpressibleError, match="not known"):
        facts.version_of("vllm", "0.2.7")
