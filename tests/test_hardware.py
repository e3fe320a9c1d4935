"""Hardware descriptors: every packaged file loads, every number has a source, and the physics is plausible."""

from __future__ import annotations

from pathlib import Path

import pytest

from perfsim.errors import InputError
from perfsim.spec import catalog
from perfsim.spec.hardware_yaml import load_accelerator, usual_node
from perfsim.spec.yaml import load_yaml
from perfsim.units import GIB

ROOT = Path(__file__).resolve().parents[1]
ACCELERATORS = catalog.list_accelerators()
NODES = catalog.list_nodes()
GOOD = (ROOT / "hardware/accelerators/h100-80gb-sxm.yaml").read_text()

# name: (GiB, GB/s, dense bf16 or fp16 TFLOP/s, TDP W): the vendors' public datasheets, recalled, apart from the files.
# Not independent, only pinned to what the files say: the H20's TDP, the capacities of B300, GB200 and GB300,
# the rates of the Jetsons and all of Ascend.
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
    ("gaudi3-128gb", "fp8"): 4,  # its fp16 runs at tf32's rate, bf16 at fp8's
}


def test_the_list() -> None:
    assert set(ACCELERATORS) == set(DATASHEETS)
    assert set(SPARSE) < set(ACCELERATORS)


def test_names_are_unique() -> None:
    names = [*ACCELERATORS, *NODES, *catalog.aliases("hardware")]
    assert len({name.lower() for name in names}) == len(names)
    labels = [catalog.accelerator(name).label for name in ACCELERATORS] + [catalog.node(name).label for name in NODES]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize("name", [*ACCELERATORS, *NODES])
def test_a_file_is_called_what_it_describes(name: str) -> None:
    described = catalog.accelerator(name) if name in ACCELERATORS else catalog.node(name)
    assert described.name == name


def test_every_accelerator_has_exactly_one_usual_node() -> None:
    usual = {name: usual_node(ROOT / f"hardware/accelerators/{name}.yaml") for name in ACCELERATORS}
    assert sorted(str(node) for node in usual.values()) == sorted(NODES)
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
    assert 0 < gpu.idle_power < 0.2 * gpu.tdp


@pytest.mark.parametrize("name", SPARSE)
def test_dense_rates_are_never_sparse_ones(name: str) -> None:
    peak = catalog.accelerator(name).peak_flops
    for dtype in ("fp16", "bf16"):
        assert peak[dtype] <= 1.02 * SPARSE[name] * 1e12 / 2


@pytest.mark.parametrize("name", ACCELERATORS)
def test_bandwidths_are_positive_and_caches_are_smaller_than_memory(name: str) -> None:
    gpu = catalog.accelerator(name)
    assert min(gpu.memory.read_bandwidth, gpu.memory.write_bandwidth) > 0
    assert 0 < gpu.sram_per_sm_bytes < gpu.memory.capacity
    assert gpu.l2_bytes < gpu.memory.capacity / 100
    assert min(gpu.peak_flops.values()) > 0


@pytest.mark.parametrize("name", ACCELERATORS)
def test_every_number_has_a_source(name: str) -> None:
    gpu = catalog.accelerator(name)
    numbers = ["sm_count", "boost_clock", "l2_bytes", "sram_per_sm_bytes", "tdp", "idle_power", "release_year"]
    numbers += [f"peak_flops.{dtype}" for dtype in gpu.peak_flops]
    numbers += ["memory.capacity", "memory.read_bandwidth", "memory.write_bandwidth"]
    numbers += [] if gpu.price_per_hour is None else ["price_per_hour"]
    assert set(gpu.sources) == set(numbers)


@pytest.mark.parametrize("name", NODES)
def test_every_node_number_has_a_source(name: str) -> None:
    node = catalog.node(name)
    numbers = ["accelerator_count", "scale_up.bandwidth", "scale_up.latency", "host_link.bandwidth"]
    numbers += ["host_link.latency", "host_power"]
    numbers += ["scale_up.in_switch_reduction"] if node.scale_up.in_switch_reduction else []
    if node.dram is not None:
        numbers += [f"dram.{field}" for field in ("capacity", "read_bandwidth", "write_bandwidth", "latency")]
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
