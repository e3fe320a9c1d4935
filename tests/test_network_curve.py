"""What is fitted between nodes: it applies to every device, waits only where it says so, and obeys the same laws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from perfsim.calibrate.network import Group, fit, main, network_groups
from perfsim.cost.algorithms import ALGORITHMS
from perfsim.cost.collective import SENDS, collective_estimate
from perfsim.cost.speed_of_light import collective_seconds
from perfsim.cost.topology import fabric
from perfsim.ops.op import Collective, CollectiveKind
from perfsim.spec import catalog
from perfsim.spec.calibration import DeviceEfficiency
from perfsim.spec.cluster import Cluster
from perfsim.spec.curves import NETWORK, LinkCurve
from perfsim.spec.load import find_calibration
from perfsim.spec.network_file import FILE, NetworkFile, with_network
from perfsim.spec.problems import validated
from perfsim.spec.yaml import load_yaml
from validation.ops.predict import CALIBRATION

CLUSTERS = [name for name in catalog.list_clusters() if not name.startswith("tpu")]
KINDS: tuple[CollectiveKind, ...] = tuple(sorted(ALGORITHMS))


def machine(name: str) -> Cluster:
    found = catalog.machine(name)
    assert isinstance(found, Cluster)
    return found


def device_of(name: str) -> DeviceEfficiency:
    return find_calibration(accelerator=machine(name).node.accelerator.name, engine="vllm").device


def test_the_packaged_curve_says_what_it_was_fitted_to() -> None:
    file = validated(NetworkFile, load_yaml(CALIBRATION / FILE), where=FILE)
    assert sum(source.rows for source in file.sources.values()) == file.rows == file.held_out_rows
    assert set(file.stderr) == {"hop", "bandwidth", "handshake", "handshake_bytes"}
    assert len(file.covariance) == len(file.stderr)
    # Each source is nearer with a curve that never saw it than with the guesses.
    assert all(source.left_out < source.guess for source in file.sources.values())


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_device_has_the_network(name: str) -> None:
    curve = validated(NetworkFile, load_yaml(CALIBRATION / FILE), where=FILE).curve
    assert device_of(name).curves.collective[NETWORK] == curve


@pytest.mark.parametrize("name", CLUSTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_between_nodes_up_to_1024_gpus_nothing_beats_the_bound_and_bytes_cost(name: str, kind: CollectiveKind) -> None:
    cluster = machine(name)
    links, sizes = fabric(cluster.node, cluster), np.geomspace(16, 1e15, 120)
    inside = cluster.node.accelerator_count
    for gpus in (2 * inside, 4 * inside, 1024 // inside * inside):
        if gpus > links.gpus or gpus <= inside:
            continue
        work = Collective(kind, kind, 1, sizes, gpus)
        took = np.asarray(collective_estimate(work, links, device_of(name)).seconds)
        assert np.all(took >= collective_seconds(work, links) * (1 - 1e-12)), gpus
        assert np.all(np.diff(took) >= -1e-12 * took[1:]), gpus
        alone = collective_estimate(Collective(kind, kind, 1, float(sizes[40]), gpus), links, device_of(name)).seconds
        assert alone == took[40]


def with_curve(device: DeviceEfficiency, **changes: float) -> DeviceEfficiency:
    curve = LinkCurve(**{"launch": 0.0, "hop": 2e-5, "bandwidth": 0.9, **changes})
    collective = {**device.curves.collective, NETWORK: curve}
    return device.model_copy(update={"curves": device.curves.model_copy(update={"collective": collective})})


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_passed_on_waits_for_a_handshake_and_only_between_nodes(kind: CollectiveKind) -> None:
    cluster = machine("dgx-h100-superpod")
    links, device = fabric(cluster.node, cluster), device_of("dgx-h100-superpod")
    plain, waits = (with_curve(device, handshake=each, handshake_bytes=1e4) for each in (0.0, 5e-5))
    for gpus in (8, 32):
        work = Collective(kind, kind, 1, 1e6, gpus)
        before, after = (float(collective_estimate(work, links, each).seconds) for each in (plain, waits))
        assert (after > before) is (gpus == 32 and kind not in SENDS)


def test_a_folder_without_the_file_leaves_the_guesses(tmp_path: Path) -> None:
    device = with_curve(device_of("dgx-h100-superpod"))
    assert with_network(device, tmp_path) is device


def test_the_fit_finds_the_curve_that_made_the_rows() -> None:
    truth = LinkCurve(launch=0.0, hop=3e-5, bandwidth=0.85, handshake=6e-5, handshake_bytes=2e4)
    size = np.geomspace(64, 1e10, 25)
    places = [("a", "dgx-h100", 16, 2), ("b", "dgx-b200", 32, 4)]
    groups = [Group(*place, size, Group(*place, size, size).predicted(truth)) for place in places]
    found, covariance = fit(groups)
    for name in ("hop", "bandwidth", "handshake", "handshake_bytes"):
        assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=0.02), name
    assert covariance.shape == (4, 4)


ROW: dict[str, Any] = {
    "source": "aws-samples/x", "collective": "allreduce", "n_gpus": 16, "nodes": 2.0, "gpu": "H100",
    "inter_link": "EFA", "message_bytes": 1e6, "busbw_GBps": 10.0, "time_us": 150.0, "notes": "",
}  # fmt: skip


def table(folder: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), folder / "collectives_more.parquet")


def test_only_rows_of_a_described_network_are_used(tmp_path: Path) -> None:
    bus = {**ROW, "source": "slides (a)", "time_us": None, "busbw_GBps": 300.0, "message_bytes": None}
    table(tmp_path, [
        ROW, {**ROW, "message_bytes": 2e6, "time_us": 160.0},
        {**bus, "notes": "peak at large size"},
        {**bus, "message_bytes": 1e6, "busbw_GBps": 0.1},  # too few digits
        {**bus, "notes": "forced ring (payload not stated)"}, {**ROW, "inter_link": ""}, {**ROW, "gpu": "V100"},
        {**ROW, "inter_link": "IB + SHARP"}, {**ROW, "n_gpus": 8}, {**ROW, "collective": "alltoall"},
        {**ROW, "notes": "older EFA installer"},
    ])  # fmt: skip
    first, second = network_groups(tmp_path)
    assert (first.source, first.machine, first.gpus, first.nodes) == ("aws-samples", "dgx-h100", 16, 2)
    assert first.bytes.tolist() == [1e6, 2e6]
    assert first.seconds.tolist() == pytest.approx([150e-6, 160e-6])
    assert second.source == "slides"
    assert second.seconds[0] == pytest.approx(2 * 15 / 16 * 2**34 / 300e9)


def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    table(tmp_path, [ROW])
    output = tmp_path / "network.yaml"
    assert main(["--data", str(tmp_path), "--output", str(output)]) == 2
    assert "fewer than two sources" in capsys.readouterr().err
    assert not output.exists()
