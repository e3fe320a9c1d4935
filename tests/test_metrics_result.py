"""Result, its canonical JSON, and requests.parquet."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from metrics_data import EGRESS_S, Columns, aggregate, chunked, synthetic_result, toy_run

from perfsim.errors import InputError
from perfsim.metrics import requests_table
from perfsim.metrics.definitions import METRICS, metric
from perfsim.metrics.requests_table import ParquetSpool
from perfsim.metrics.result import Result, canonical_json


@pytest.fixture(scope="module")
def run() -> tuple[Columns, Columns]:
    return toy_run(200, rate=6.0)


@pytest.fixture(scope="module")
def result(run: tuple[Columns, Columns]) -> Result:
    return synthetic_result(aggregate(*run))


def test_canonical_json_sorts_keys_and_keeps_every_digit() -> None:
    data = {"b": [1, 2.5, None], "a": {"z": 0.1 + 0.2, "y": True}, "c": [], "d": {}, "e": [{"k": 1}]}
    text = canonical_json(data)
    assert json.loads(text) == data
    assert text == canonical_json(dict(reversed(data.items())))
    assert "0.30000000000000004" in text
    assert text.index('"a"') < text.index('"b"') < text.index('"c"')
    assert '"b": [1, 2.5, null]' in text


def test_equal_results_give_equal_bytes(run: tuple[Columns, Columns], result: Result) -> None:
    assert synthetic_result(aggregate(*run)).to_json() == result.to_json()


def test_json_round_trips_to_the_same_values(result: Result) -> None:
    tree = json.loads(result.to_json())
    assert tree == result.to_dict()
    assert "NaN" not in result.to_json()


@pytest.mark.parametrize("bad", [math.nan, math.inf, np.float64("nan")])
def test_nan_is_refused_with_its_place(run: tuple[Columns, Columns], bad: float) -> None:
    with pytest.raises(ValueError, match=r"cost\.usd is"):
        synthetic_result(aggregate(*run), cost={"usd": bad})


def test_what_json_cannot_hold_is_refused(run: tuple[Columns, Columns]) -> None:
    with pytest.raises(TypeError, match=r"provenance\.when"):
        synthetic_result(aggregate(*run), provenance={"when": Path("x")})
    with pytest.raises(TypeError, match="not a string"):
        synthetic_result(aggregate(*run), memory={1: 2.0})


def test_a_result_does_not_change_with_what_it_was_made_of(run: tuple[Columns, Columns]) -> None:
    cost = {"usd": np.float64(1.5), "n": np.int64(3), "zero": -0.0, "list": (1, 2)}
    result = synthetic_result(aggregate(*run), cost=cost)
    cost["usd"] = 9.0
    assert result.cost == {"usd": 1.5, "n": 3, "zero": 0.0, "list": [1, 2]}
    assert type(result.cost["usd"]) is float
    assert type(result.cost["n"]) is int
    assert math.copysign(1, result.cost["zero"]) == 1.0
    result.to_dict()["cost"]["usd"] = 7.0
    assert result.cost["usd"] == 1.5


def test_value_by_path(result: Result) -> None:
    assert result.value("ttft.p95") == result.metrics["ttft"]["p95"]
    assert result.value("cost.usd") == result.cost["usd"]
    with pytest.raises(InputError, match=r"no metric 'tttft\.p95'.*did you mean 'ttft\.p95'"):
        result.value("tttft.p95")


def test_every_scalar_metric_has_a_definition(result: Result) -> None:
    for path in result.numbers():
        group, _, stat = path.rpartition(".")
        if group in METRICS or path.startswith(("breakdown.", "bound.", "memory.", "simulation.")):
            continue
        assert path in METRICS, f"{path} has no definition ({stat})"


def test_an_unknown_metric_gets_a_label_and_unit_from_its_name() -> None:
    assert (metric("cost.usd_per_gpu").label, metric("cost.usd_per_gpu").unit) == ("Usd per gpu", "USD")
    assert metric("energy.idle_joules").unit == "J"
    assert metric("x.stalled_s").unit == "s"
    assert metric("rejected_for.too long").label == "Rejected: too long"


def spool(path: Path, requests: Columns, chunk: int) -> bytes:
    with ParquetSpool(path, egress=EGRESS_S) as table:
        for part in chunked(requests, chunk):
            table.add(part)
    return path.read_bytes()


def test_parquet_holds_the_requests(tmp_path: Path, run: tuple[Columns, Columns]) -> None:
    requests = {**run[0], "output_tokens": np.where(np.arange(200) < 5, 1, run[0]["output_tokens"])}
    spool(tmp_path / "requests.parquet", requests, 64)
    table = pq.read_table(tmp_path / "requests.parquet")
    for name, column in requests.items():
        assert table[name].fill_null(-1).to_pylist() == column.tolist()
    assert table["adapter"].null_count == 200
    assert table["ttft_s"].to_numpy() == pytest.approx(requests["first_token_s"] + EGRESS_S - requests["arrival_s"])
    assert table["e2e_s"].to_numpy() == pytest.approx(requests["finish_s"] + EGRESS_S - requests["arrival_s"])
    assert table["tpot_s"].null_count == (requests["output_tokens"] == 1).sum() >= 5
    assert not list(tmp_path.glob("*.partial"))


def test_parquet_bytes_do_not_depend_on_chunks(
    tmp_path: Path, run: tuple[Columns, Columns], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests_table, "ROWS_PER_GROUP", 60)
    contents = {spool(tmp_path / f"{chunk}.parquet", run[0], chunk) for chunk in (1, 7, 60, 61, 1000)}
    assert len(contents) == 1
    groups = pq.ParquetFile(tmp_path / "7.parquet").metadata
    assert [groups.row_group(index).num_rows for index in range(groups.num_row_groups)] == [60, 60, 60, 20]


def test_a_failed_run_leaves_no_parquet(tmp_path: Path, run: tuple[Columns, Columns]) -> None:
    def fail() -> None:
        with ParquetSpool(tmp_path / "requests.parquet", egress=0.0) as table:
            table.add(run[0])
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_an_empty_run_gives_an_empty_table(tmp_path: Path) -> None:
    with ParquetSpool(tmp_path / "requests.parquet", egress=0.0):
        pass
    assert pq.read_table(tmp_path / "requests.parquet").num_rows == 0
