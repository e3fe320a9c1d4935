"""The committed slice of measured collectives: it can be placed, nothing in it is impossible, and the table says so."""

from __future__ import annotations

from math import exp
from pathlib import Path

import pytest

from validation.collectives.compare import compare, main, quantile
from validation.collectives.cut import SYSTEMS
from validation.collectives.predict import predict
from validation.collectives.rows import MEASURED, NODES, Row, bus_factor, slice_rows

ROWS = slice_rows()


def test_the_slice_covers_what_it_says() -> None:
    assert len(ROWS) > 1500
    assert {row.node for row in ROWS} == {NODES[system] for system in SYSTEMS}
    operations = {row.operation for row in ROWS}
    assert operations == {
        "all_reduce",
        "all_gather",
        "reduce_scatter",
        "all_to_all",
        "send_recv",
        "dispatch",
        "combine",
    }
    assert {row.nodes for row in ROWS} == {1, 2, 4, 8}
    licences = (MEASURED / "collectives.md").read_text()
    for source in ("aiconfigurator` @ 095f58a", "vidur` @ 7d47513", "apex_plus` @ 8769096", "Apache-2.0", "MIT"):
        assert source in licences


def test_published_bus_bandwidth_is_reproduced() -> None:
    """nccl-tests' H100 all-reduce of 512 MiB in aiconfigurator's table: 445 GB/s, as its sidecar says."""
    found = [row for row in ROWS if row.node == "dgx-h100" and row.operation == "all_reduce" and row.nodes == 1
             and row.backend == "nccl" and row.work.group == 8 and row.published_bytes == 1 << 29]  # fmt: skip
    assert found
    for row in found:
        assert bus_factor("all_reduce", 8) * row.published_bytes / row.seconds == pytest.approx(445e9, rel=0.06)


@pytest.mark.parametrize("row", [pytest.param(row, id=str(index)) for index, row in enumerate(ROWS) if index % 7 == 0])
def test_no_measurement_beats_the_speed_of_light(row: Row) -> None:
    assert row.seconds >= predict(row).bound


def test_long_all_reduces_inside_a_node_are_near_before_any_fit() -> None:
    """Half the time to twice the time: what unfitted coefficients are good for, over every backend and machine."""
    for (operation, node, nodes, backend), found in compare(ROWS).items():
        long = [item.error for item in found if item.row.published_bytes >= 1 << 26]
        if operation == "all_reduce" and nodes == 1 and long:
            assert 0.5 < exp(quantile(long, 0.5)) < 2.0, (node, backend)


def test_the_table_and_the_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--misses", "3", "--plot", str(tmp_path / "plot.html")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("before any fit")
    table = lines[2 : lines.index("")]
    assert len(table) == len(compare(ROWS))
    assert all(line.endswith(" 0") for line in table), "a measurement that the model calls impossible"
    assert sum(line.startswith("  x") for line in lines) == 3
    page = (tmp_path / "plot.html").read_text()
    assert page.count("<svg") == 6
    assert "dgx-h100, 8 GPUs" in page
    main(["--plot", str(tmp_path / "again.html")])
    assert (tmp_path / "again.html").read_text() == page
