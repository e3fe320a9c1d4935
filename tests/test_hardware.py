"""Hardware descriptors: every packaged file loads, every number has a source, and the physics is plausible."""

from __future__ import annotations

from pathlib import Path

import pytest

from perfsim.errors import InputError
from perfsim.spec import catalog
from perfsim.spec.hardware_yaml import load_accelerator
from perfsim.units import GIB

ROOT = Path(__file__).resolve().parents[1]
ACCELERATORS = catalog.list_accelerators()
NODES = catalog.list_nodes()
GOOD = (ROOT / "hardware/accelerators/h100-80gb-sxm.yaml").read_text()

# name: (GiB, GB/s, dense bf16 or fp16 TFLOP/s, TDP W): the vendors' public datasheets, recalled, apart from the files.
DATASHEETS = {
    "p100-16gb": (16, 732, 18.7, 250),
    "a100-80gb-sxm": (80, 2039, 312, 400),
    "h100-80gb-sxm": (80, 3350, 989.4, 700),
    "h200-141gb-sxm": (141, 4800, 989.4, 700),
    "b200-180gb-sxm": (180, 8000, 2250, 1000),
    "l40s-48gb": (48, 864, 362, 350),
    "rtx-4090-24gb": (24, 1008, 165.2, 450),
    "rtx-pro-6000-blackwell-96gb": (96, 1792, 503.8, 600),
}


def test_the_list() -> None:
    assert set(ACCELERATORS) == set(DATASHEETS)
    assert len(NODES) == 8


@pytest.mark.parametrize("name", ACCELERATORS)
def test_accelerators_match_their_datasheets(name: str) -> None:
    gpu = catalog.accelerator(name)
    gib, gbps, tflops, tdp = DATASHEETS[name]
    assert gpu.memory.capacity == gib * GIB
    assert gpu.memory.read_bandwidth == pytest.approx(gbps * 1e9, rel=0.01)
    peak = gpu.peak_flops.get("bf16", gpu.peak_flops.get("fp16"))
    assert peak == pytest.approx(tflops * 1e12, rel=0.02)
    assert gpu.tdp == tdp
    assert 0 < gpu.idle_power < 0.2 * gpu.tdp


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
            assert peak[high] / peak[low] == pytest.approx(2, rel=0.02)  # 4x would be a sparse figure


def test_h100_dense_peak() -> None:
    assert catalog.accelerator("h100-80gb-sxm").peak_flops["bf16"] == 989.5e12


@pytest.mark.parametrize("name", NODES)
def test_nodes_are_plausible(name: str) -> None:
    node = catalog.node(name)
    assert 1 <= node.accelerator_count <= 8
    assert node.scale_up.switched == (node.scale_up.kind == "nvlink")
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
