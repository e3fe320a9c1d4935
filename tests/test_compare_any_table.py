"""Tables as others may write them: other types, missing values, shapes that no kernel has, wrong arguments."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from validation.compare.cli import compare, main
from validation.compare.table import Table, read_table, where

PRODUCTS = {
    "system": ["h100_sxm", "h100_sxm", "h100_sxm", None, "l4", "z9"], "framework": ["vllm"] * 6, "version": ["0.1"] * 6,
    "gemm_dtype": ["bfloat16", "bfloat16", None, "bfloat16", "fp8", "bfloat16"], "m": [64, None, 64, 64, 64, 64],
    "n": [4096] * 6, "k": [4096, 4096, 4096, 4096, 4096, -1], "latency_us": [20.0, 20.0, 20.0, 20.0, None, 20.0],
}  # fmt: skip


def write(path, columns):
    pq.write_table(pa.table(columns), path)
    return path


def test_missing_values_are_reasons(tmp_path):
    found = compare(write(tmp_path / "t.parquet", PRODUCTS))
    assert (found["rows"], found["expressible"]) == (6, 1)
    assert sum(found["not_expressible"].values()) == 5
    assert found["not_expressible"]["no measured value"] == 1
    assert found["not_expressible"]["no descriptor of device 'z9'"] == 1
    json.dumps(found, allow_nan=False)


def test_types_and_orders_change_nothing(tmp_path):
    plain = compare(write(tmp_path / "t.parquet", PRODUCTS))
    columns = {name: pa.array(values) for name, values in PRODUCTS.items()}
    columns["system"] = columns["system"].dictionary_encode()
    columns["version"] = columns["version"].cast(pa.large_string())
    columns["m"] = pa.array([np.nan if value is None else float(value) for value in PRODUCTS["m"]], from_pandas=False)
    columns["n"] = columns["n"].cast(pa.int32())
    order = list(reversed(columns))
    (tmp_path / "other").mkdir()
    assert compare(write(tmp_path / "other" / "t.parquet", {name: columns[name] for name in order})) == plain


def test_no_rows_and_no_bands(tmp_path):
    empty = {name: pa.array(values).slice(0, 0) for name, values in PRODUCTS.items()}
    assert compare(write(tmp_path / "t.parquet", empty), bands=False)["rows"] == 0


def test_not_a_number_is_no_value(tmp_path):
    table = read_table(write(tmp_path / "t.parquet", {"x": pa.array([1.0, float("nan"), None], from_pandas=False)}))
    assert table.data["x"].null_count == 2
    assert len(where(table, ["x=null"])) == 2


def test_values_of_any_size_and_type(tmp_path, capsys):
    data = pa.table({"small": pa.array([1, 2], pa.int8()), "name": ["a100", None], "none": pa.nulls(2),
                     "day": pa.array(["2026-01-02", None]).cast(pa.date32())})  # fmt: skip
    table = Table(tmp_path / "t.parquet", data)
    assert len(where(table, ["small=300"])) == len(where(table, ["none=x"])) == 0
    assert len(where(table, ["small=2.0"])) == len(where(table, ["day=2026-01-02"])) == 1
    assert len(where(table, ["name=a10"])) == 0
    assert "did you mean 'a100'" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--table", "x", "--format", "xml"], ["--tabel", "x"], ["--table", "."]])
def test_wrong_arguments_are_one_line(arguments, capsys):
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert capsys.readouterr().err.count("\n") == 1
