"""Tables as others may write them: other types, missing values, shapes that no kernel has, wrong arguments."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from perfsim.errors import InputError
from validation.compare.cli import compare, main
from validation.compare.columns import typed
from validation.compare.outcome import codes_of
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
    columns["framework"] = columns["framework"].cast(pa.binary())
    columns["gemm_dtype"] = columns["gemm_dtype"].cast(pa.string_view())
    columns["k"] = columns["k"].cast(pa.string())
    columns["latency_us"] = columns["latency_us"].cast(pa.int64()).cast(pa.decimal128(30, 2))
    order = list(reversed(columns))
    (tmp_path / "other").mkdir()
    assert compare(write(tmp_path / "other" / "t.parquet", {name: columns[name] for name in order})) == plain


def test_columns_that_nobody_reads_are_groups_and_nothing_else(tmp_path):
    plain = compare(write(tmp_path / "t.parquet", PRODUCTS))
    moments = pa.array([datetime(2026, 1, 2, tzinfo=UTC)] * 6, pa.timestamp("us", "UTC"))
    other = {"when": moments, "raw": [b"\xff"] * 6, "many": [[1]] * 6, "parts": [{"a": 1}] * 6, "nothing": pa.nulls(6)}
    found = compare(write(tmp_path / "t.parquet", {**other, **PRODUCTS}))
    assert set(found["groups"]) - set(plain["groups"]) == {"when", "raw", "nothing"}
    assert list(found["groups"]["when"]) == ["2026-01-02 00:00:00+00:00"]
    assert list(found["groups"]["nothing"]) == ["null"]
    assert {**found, "groups": None} == {**plain, "groups": None}


def test_values_of_groups_are_the_same_text_however_they_are_stored(tmp_path):
    def keys(column: pa.Array) -> list[str]:
        data = pa.table({"x": column})
        coded = codes_of(Table(tmp_path / "t.parquet", data), "x")
        assert coded is not None
        return [coded[0][code] for code in coded[1]]

    whole = pa.array([1, 2, None])
    for kind in (pa.int8(), pa.uint64(), pa.float16(), pa.float32(), pa.float64(), pa.string(), pa.decimal128(20, 0)):
        assert keys(whole.cast(kind)) == ["1", "2", "null"]
    assert keys(whole.cast(pa.decimal128(20, 0)).cast(pa.decimal128(22, 2))) == ["1", "2", "null"]
    for kind in (pa.float32(), pa.float64(), pa.string(), pa.large_string(), pa.string_view()):
        assert keys(pa.array(["0.1", None]).cast(kind)) == ["0.1", "null"]
    assert keys(pa.array([True, False, None])) == ["true", "false", "null"]
    assert keys(pa.array([b"a", b"b"])) == keys(pa.array(["a", "b"]).dictionary_encode()) == ["a", "b"]


def test_measured_columns_are_groups_too(tmp_path):
    """Every column of at most 50 values, nulls aside; `latency_us` has 20.0 and, in rows without a prediction, null."""
    found = compare(write(tmp_path / "t.parquet", PRODUCTS))
    assert set(found["groups"]) == set(PRODUCTS)
    assert found["groups"]["latency_us"] == {"20": found["metrics"]}
    rows = {name: [values[0]] * 51 for name, values in PRODUCTS.items()}
    rows |= {"latency_us": [20.0 + 0.5 * index for index in range(51)], "m": [1 + index % 50 for index in range(51)]}
    groups = compare(write(tmp_path / "t.parquet", rows))["groups"]
    assert set(groups) == set(PRODUCTS) - {"latency_us"}
    assert len(groups["m"]) == 50


@pytest.mark.parametrize(("column", "values", "expected"), [
    ("m", ["64"] * 5 + ["many"], "column 'm' of 't.parquet' holds string, expected numbers"),
    ("m", [[64]] * 6, "column 'm' of 't.parquet' holds list<element: int64>, expected numbers"),
    ("system", [["h100_sxm"]] * 6, "column 'system' of 't.parquet' holds list<element: string>, expected text"),
])  # fmt: skip
def test_columns_of_the_wrong_kind_are_named(tmp_path, column, values, expected):
    with pytest.raises(InputError) as error:
        compare(write(tmp_path / "t.parquet", {**PRODUCTS, column: pa.array(values)}))
    assert str(error.value) == f"--table: {expected}"


def test_truth_values_may_be_numbers_or_words(tmp_path):
    truth = pa.array([True, False, None])
    for kind in (pa.bool_(), pa.int8(), pa.string()):
        table = Table(tmp_path / "t.parquet", pa.table({"gated": truth.cast(kind)}))
        assert typed(table, frozenset({"gated"})).data["gated"].to_pylist() == [True, False, None]
    with pytest.raises(InputError, match=r"'gated' of 't.parquet' holds string, expected true or false"):
        typed(Table(tmp_path / "t.parquet", pa.table({"gated": ["yes"]})), frozenset({"gated"}))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({name: values for name, values in PRODUCTS.items() if name != "n"},
         "--table: 't.parquet' is nearest to 'products of aiconfigurator', but has no column 'n'"),
        ({"latency" if name == "latency_us" else name: values for name, values in PRODUCTS.items()},
         "--table: 't.parquet' is nearest to 'products of aiconfigurator', but has no column 'latency_us'; did you mean"
         " 'latency'?"),
        ({"x": [1]}, "--table: 't.parquet' has no column of a known table, expected those of one of them"),
    ],
)  # fmt: skip
def test_tables_without_the_columns_say_which_are_missing(tmp_path, columns, message):
    with pytest.raises(InputError) as error:
        compare(write(tmp_path / "t.parquet", columns))
    assert str(error.value) == message


def test_no_rows_and_no_bands(tmp_path):
    empty = {name: pa.array(values).slice(0, 0) for name, values in PRODUCTS.items()}
    assert compare(write(tmp_path / "t.parquet", empty))["rows"] == 0
    assert compare(write(tmp_path / "t.parquet", PRODUCTS), ["m=1"], bands=False)["rows"] == 0


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --table"),
        (["--table", "x", "--format", "jsn"], "--format: expected text or json, got 'jsn'; did you mean 'json'?"),
        (["--table", "x", "--were", "m=1"], "unknown argument '--were'; did you mean '--where'?"),
        (["--table", "."], "--table: '.' is a folder, expected a Parquet file"),
        (["--table", "no\nsuch"], "--table: there is no file 'no such'"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, capsys):
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert capsys.readouterr().err == f"error: {message}\n"
