"""Hardware descriptors: every packaged file loads, every number has a source, and the physics is plausible."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from perfsim.cli.main import main
from perfsim.errors import InputError
from perfsim.run import simulate
from perfsim.spec import catalog
from perfsim.spec.hardware_yaml import load_accelerator, usual_node
from perfsim.spec.load import load_scenario
from perfsim.spec.yaml import load_yaml
from perfsim.units import GIB

ROOT = Path(__file__).resolve().parents[1]
ACCELERATORS = catalog.list_accelerators()
NODES = catalog.list_nodes()
CLUSTERS = catalog.list_clusters()
GOOD = (ROOT / "hardware/accelerators/h100-80gb-sxm.yaml").read_text()

# name: (GiB, GB/s, dense bf16 or fp16 TFLOP/s, TDP W): the vendors' public datasheets, recalled, apart from the files.
# Not independent, only pinned to what the files say: the H20's TDP, the capacities of B300, GB200 and GB300,
# the rates of the Jetsons, the Hexagon and the EPYC, and all of Ascend.
DATASHEETS = {
    "p100-16gb": (16, 732, 18.7, 250),
    "v100-32gb-sxm": (32, 900, 125, 300),
    "a100-40gb-sxm": (40, 1555, 312, 400),
    "a100-80gb-sxm": (80, 2039, 312, 400),
    "a100-80gb-pcie": (80, 1935, 312, 300),
    "a800-80gb-sxm": (80, 2039, 312, 400),
    "h100-80gb-sxm": (80, 3350, 989.4, 700),
    "h100-80gb-pcie": (80, 2000, 756, 350),
    "h100-94gb-nvl": (94, 3938, 835, 400),
    "h800-80gb-sxm": (80, 3350, 989.4, 700),
    "h20-96gb-sxm": (96, 4000, 148, 400),
    "h200-141gb-sxm": (141, 4800, 989.4, 700),
    "gh200-96gb": (96, 4000, 989.4, 900),
    "b200-180gb-sxm": (180, 8000, 2250, 1000),
    "b300-288gb-sxm": (268.6, 8000, 2250, 1100),  # 288 decimal GB
    "gb200-186gb": (185, 8000, 2500, 1200),
    "gb300-288gb": (277.5, 8000, 2500, 1400),
    "l4-24gb": (24, 300, 121, 72),
    "l40s-48gb": (48, 864, 362, 350),
    "a10-24gb": (24, 600, 125, 150),
    "a40-48gb": (48, 696, 149.7, 300),
    "rtx-a6000-48gb": (48, 768, 154.8, 300),
    "rtx-6000-ada-48gb": (48, 960, 364.2, 300),
    "rtx-3090-24gb": (24, 936, 71, 350),
    "rtx-4090-24gb": (24, 1008, 165.2, 450),
    "rtx-5090-32gb": (32, 1792, 209.5, 575),
    "rtx-pro-6000-blackwell-96gb": (96, 1792, 503.8, 600),
    "jetson-orin-nano-8gb": (8, 68, 10, 15),
    "jetson-orin-nano-super-8gb": (8, 102, 16.75, 25),
    "mi250x-64gb-gcd": (64, 1600, 191.5, 280),
    "mi300x-192gb": (192, 5300, 1307.4, 750),
    "mi325x-256gb": (256, 6000, 1307.4, 1000),
    "mi355x-288gb": (288, 8000, 2516, 1400),
    "gaudi3-128gb": (128, 3700, 1835, 900),
    "ascend-910b-64gb": (64, 1600, 280, 400),
    "ascend-910-32gb": (32, 1200, 256, 310),
    "mi250x-128gb": (128, 3277, 383, 560),
    "tpu-v5e-16gb": (16, 819, 197, None),
    "tpu-v5p-95gb": (95, 2765, 459, None),
    "tpu-v6e-32gb": (32, 1640, 918, None),
    "hexagon-sd8gen3": (16, 76.8, 17, 5),
    "epyc-9654": (6144, 460.8, 21.8, 360),
}

# What vendors print for bf16 or fp16 with 2:4 sparsity, TFLOP/s, recalled: the figure that a careless table copies.
SPARSE = {
    "a100-40gb-sxm": 624, "a100-80gb-sxm": 624, "a100-80gb-pcie": 624, "a800-80gb-sxm": 624,
    "h100-80gb-sxm": 1979, "h100-80gb-pcie": 1513, "h100-94gb-nvl": 1671, "h800-80gb-sxm": 1979,
    "h20-96gb-sxm": 296, "h200-141gb-sxm": 1979, "gh200-96gb": 1979, "b200-180gb-sxm": 4500,
    "b300-288gb-sxm": 4500, "gb200-186gb": 5000, "gb300-288gb": 5000, "l4-24gb": 242, "l40s-48gb": 733,
    "a10-24gb": 250, "a40-48gb": 299.4, "rtx-a6000-48gb": 309.7, "rtx-6000-ada-48gb": 728.5, "rtx-3090-24gb": 142,
    "rtx-4090-24gb": 330.4, "rtx-5090-32gb": 419, "rtx-pro-6000-blackwell-96gb": 1007.6, "mi300x-192gb": 2614.9,
    "mi325x-256gb": 2614.9, "mi355x-288gb": 5033,
}  # fmt: skip

# Ratios of successive dtypes other than 2, and why they are not sparse figures.
UNUSUAL = {
    ("b300-288gb-sxm", "fp4"): 3,  # Blackwell Ultra widened FP4 only
    ("gb300-288gb", "fp4"): 3,
    ("rtx-5090-32gb", "fp4"): 4,  # GeForce halves fp8 with fp32 accumulation, FP4 runs at full rate
    ("tpu-v5p-95gb", "fp8"): 1,  # computed as bf16
    ("tpu-v6e-32gb", "fp8"): 1,
    ("gaudi3-128gb", "fp8"): 4,  # its fp16 runs at tf32's rate, bf16 at fp8's
}


def test_the_list() -> None:
    assert set(ACCELERATORS) == set(DATASHEETS)
    assert set(SPARSE) < set(ACCELERATORS)


def test_names_are_unique() -> None:
    names = [*ACCELERATORS, *NODES, *CLUSTERS, *catalog.list_links(), *catalog.list_storage()]
    names += catalog.aliases("hardware")
    assert len({name.lower() for name in names}) == len(names)
    labels = [catalog.accelerator(name).label for name in ACCELERATORS] + [catalog.node(name).label for name in NODES]
    labels += [catalog.cluster(name).label for name in CLUSTERS]
    assert len(set(labels)) == len(labels)


def everything() -> dict[str, Any]:
    """Every packaged descriptor by name."""
    kinds: tuple[tuple[list[str], Callable[[str], Any]], ...] = (
        (ACCELERATORS, catalog.accelerator),
        (NODES, catalog.node),
        (CLUSTERS, catalog.cluster),
        (catalog.list_links(), catalog.link),
        (catalog.list_storage(), catalog.storage),
    )
    return {name: load(name) for names, load in kinds for name in names}


EVERYTHING = everything()


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_file_is_called_what_it_describes(name: str) -> None:
    assert EVERYTHING[name].name == name


def test_every_accelerator_has_a_usual_node_of_its_own() -> None:
    usual = {name: usual_node(ROOT / f"hardware/accelerators/{name}.yaml") for name in ACCELERATORS}
    assert len(set(usual.values())) == len(usual)
    assert set(NODES) - set(usual.values()) == {"hgx-h200-roce"}  # a variant, for a cluster
    for name, node in usual.items():
        assert catalog.node(name) == catalog.node(str(node))
        assert catalog.node(name).accelerator.name == name


def test_every_accelerator_has_coefficients_or_a_relative_that_has() -> None:
    content = load_yaml(ROOT / "hardware/calibration/first-guess.yaml")
    devices, borrow = set(content["devices"]), content["borrow"]
    assert set(borrow.values()) <= devices
    assert not devices & set(borrow)
    assert devices | set(borrow) == set(ACCELERATORS)


@pytest.mark.parametrize("name", ACCELERATORS)
def test_accelerators_match_their_datasheets(name: str) -> None:
    gpu = catalog.accelerator(name)
    gib, gbps, tflops, tdp = DATASHEETS[name]
    assert gpu.memory.capacity == pytest.approx(gib * GIB, rel=2e-3 if gib % 1 or name == "gb200-186gb" else 1e-12)
    assert gpu.memory.read_bandwidth == pytest.approx(gbps * 1e9, rel=0.01)
    peak = gpu.peak_flops.get("bf16", gpu.peak_flops.get("fp16"))
    assert peak == pytest.approx(tflops * 1e12, rel=0.02)
    assert gpu.tdp == tdp
    assert gpu.idle_power is None or gpu.tdp is None or 0 < gpu.idle_power < 0.2 * gpu.tdp


@pytest.mark.parametrize("name", SPARSE)
def test_dense_rates_are_never_sparse_ones(name: str) -> None:
    peak = catalog.accelerator(name).peak_flops
    for dtype in ("fp16", "bf16"):
        assert peak[dtype] <= 1.02 * SPARSE[name] * 1e12 / 2


@pytest.mark.parametrize("name", ACCELERATORS)
def test_bandwidths_are_positive_and_caches_are_smaller_than_memory(name: str) -> None:
    gpu = catalog.accelerator(name)
    assert min(gpu.memory.read_bandwidth, gpu.memory.write_bandwidth) > 0
    assert gpu.sram_per_sm_bytes is None or 0 < gpu.sram_per_sm_bytes < gpu.memory.capacity
    assert gpu.l2_bytes is None or gpu.l2_bytes < gpu.memory.capacity / 100
    assert min(gpu.peak_flops.values()) > 0


@pytest.mark.parametrize("name", ACCELERATORS)
def test_every_number_has_a_source(name: str) -> None:
    gpu = catalog.accelerator(name)
    optional = ("sm_count", "boost_clock", "l2_bytes", "sram_per_sm_bytes", "tdp", "idle_power", "price_per_hour")
    numbers = [field for field in optional if getattr(gpu, field) is not None] + ["release_year"]
    numbers += [f"peak_flops.{dtype}" for dtype in gpu.peak_flops]
    numbers += ["memory.capacity", "memory.read_bandwidth", "memory.write_bandwidth"]
    assert set(gpu.sources) == set(numbers)


def numbers_in(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from numbers_in(value, f"{prefix}{key}.")
        elif isinstance(value, int | float | list) and not isinstance(value, bool):
            yield prefix + key


@pytest.mark.parametrize("name", [*CLUSTERS, *catalog.list_links(), *catalog.list_storage()])
def test_every_number_of_a_part_or_cluster_has_a_source(name: str) -> None:
    described = EVERYTHING[name]
    numbers = set(numbers_in(described.model_dump(mode="json", exclude={"sources", "node"})))
    plain = {field for field in described.sources if field.endswith("wrap")} | {"lanes"}  # x16 is what its name says
    assert numbers - plain == set(described.sources) - plain
    for field, fact in described.sources.items():
        spelled_out = "@" in fact.source or fact.source.startswith("http")
        assert spelled_out or not fact.verified, field


@pytest.mark.parametrize("name", NODES)
def test_every_node_number_has_a_source(name: str) -> None:
    node = catalog.node(name)
    numbers = ["accelerator_count", "scale_up.bandwidth", "scale_up.latency", "host_link.bandwidth"]
    numbers += ["host_link.latency", "host_power"]
    numbers += ["scale_up.in_switch_reduction"] if node.scale_up.in_switch_reduction else []
    if node.dram is not None:
        numbers += [f"dram.{field}" for field in ("capacity", "read_bandwidth", "write_bandwidth", "latency")]
    more = node.model_dump(mode="json", include={"nics", "cpu", "drives", "max_power", "measured"}, exclude_none=True)
    numbers += [*numbers_in(more), *(["scale_up.switches"] if node.scale_up.switches else [])]
    assert set(node.sources) == set(numbers)


@pytest.mark.parametrize("name", [*ACCELERATORS, *NODES])
def test_doubtful_facts_say_so(name: str) -> None:
    described = catalog.accelerator(name) if name in ACCELERATORS else catalog.node(name)
    for field, fact in described.sources.items():
        spelled_out = "@" in fact.source or fact.source.startswith("http")
        assert spelled_out or not fact.verified, field
        assert fact.verified or fact.note or fact.source == "recalled", field


@pytest.mark.parametrize("name", ACCELERATORS)
def test_rates_are_dense_and_ordered(name: str) -> None:
    peak = catalog.accelerator(name).peak_flops
    ladder = [peak[dtype] for dtype in ("fp32", "fp16", "fp8", "fp4") if dtype in peak]
    assert ladder == sorted(ladder)
    for low, high in (("fp16", "fp8"), ("fp8", "fp4")):
        if low in peak and high in peak:
            ratio = UNUSUAL.get((name, high), 2)  # an unexplained 4 would be a sparse figure
            assert peak[high] / peak[low] == pytest.approx(ratio, rel=0.02)


def test_h100_dense_peak() -> None:
    assert catalog.accelerator("h100-80gb-sxm").peak_flops["bf16"] == 989.5e12


@pytest.mark.parametrize("name", NODES)
def test_nodes_are_plausible(name: str) -> None:
    node = catalog.node(name)
    assert node.accelerator_count in (1, 4, 8, 72)
    assert node.nics is None or 1e9 < node.nics.bandwidth <= 100e9
    assert (node.scale_up.topology == "host") >= (node.scale_up.kind == "pcie")
    assert min(node.scale_up.bandwidth, node.host_link.bandwidth) > 0
    assert node.host_link.topology == "host"
    assert node.scale_up.bandwidth < node.accelerator.memory.read_bandwidth
    assert node.scale_up.bandwidth >= node.host_link.bandwidth
    assert node.host_power > 0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("sm_count: {value: 132", "sm_count: {value: -1", "sm_count: expected a number greater than 0, got -1"),
        ("3350 GB/s", "3350 GB", "memory.read_bandwidth: 'GB' is not a unit of bytes/s"),
        ("tdp: ", "tpd: ", "unknown key 'tpd'; did you mean 'tdp'?"),
        ("vendor: NVIDIA", "vendor: NVIDIA\nl3_bytes: 1", "unknown key 'l3_bytes'; did you mean 'l2_bytes'?"),
        ("source: tpu_c3900}", "sauce: x}", "unknown key 'release_year.sauce'; did you mean 'source'?"),
        ("{value: 132, source: tpu_c3900}", "{value: 132}", "sm_count: the key 'source' is missing"),
        ("  bf16:", "  bf17:", "peak_flops.bf17"),
        ("kind: hbm", "kind: core", "memory.kind"),
        ("refs:", "refs: 5\nrefz:", "refs: expected a mapping"),
        ("1830 MHz", "1830 MHz MHz", "boost_clock"),
        ("name: h100-80gb-sxm", "name: [1]", "name: expected text, got a list"),
    ],
)
def test_bad_descriptors_name_file_and_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    path = tmp_path / "gpu.yaml"
    path.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(InputError) as caught:
        load_accelerator(path)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert message in text
    assert "\n" not in text


def test_what_if_values_need_no_source(tmp_path: Path) -> None:
    path = tmp_path / "gpu.yaml"
    path.write_text(GOOD.replace("{value: 132, source: tpu_c3900}", "264"))
    gpu = load_accelerator(path)
    assert gpu.sm_count == 264
    assert "sm_count" not in gpu.sources


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 0
    return capsys.readouterr().out


def test_list_hardware_counts_sources_and_doubts(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["name"]: row for row in json.loads(printed(capsys, "list", "hardware", "--format", "json"))}
    assert set(rows) == set(EVERYTHING)
    assert {row["kind"] for row in rows.values()} == {"accelerator", "node", "cluster", "link", "storage"}
    row, gpu = rows["h100-80gb-sxm"], catalog.accelerator("h100-80gb-sxm")
    assert (row["facts"], row["unverified"], row["unverified_fields"]) == (len(gpu.sources), 1, "idle_power")
    assert rows["gb200-nvl72-8x"]["accelerators"] == 576


@pytest.mark.parametrize(("name", "shown"), [
    ("tpu-v6e", "tdp –"), ("dgx-h100", "nics.bandwidth 50.00 GB/s"), ("nvlink-5", "lanes 18"),
    ("s3", "per_connection 0.08750 GB/s"), ("hgx-h200-roce-128x", "derived.spine.gpu_bandwidth 27.50 GB/s"),
    ("frontier", "derived.bisection_bandwidth 148,225 GB/s"), ("tpu-v5p-pod", "network.shape [16, 20, 28]"),
])  # fmt: skip
def test_show_hardware_knows_every_kind(capsys: pytest.CaptureFixture[str], name: str, shown: str) -> None:
    lines = [" ".join(line.split()) for line in printed(capsys, "show", "hardware", name).splitlines()]
    assert any(line.startswith(shown) for line in lines)
    described = json.loads(printed(capsys, "show", "hardware", name, "--format", "json"))
    assert ("derived" in described) == (name in CLUSTERS)


def test_a_device_of_unknown_power_runs_without_energy() -> None:
    scenario = load_scenario(hardware="tpu-v5p", model="llama-2-7b-hf", overrides=["workload.num_requests=20"])
    result = simulate(scenario)
    assert result.metrics["counts"]["completed"] == 20
    assert set(result.energy.values()) == {None}
