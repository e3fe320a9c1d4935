"""Laws of the curves of collectives inside a node: above their bound, growing, the same for arrays and numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfsim.calibrate.forms import form
from perfsim.calibrate.links import alone, families_of, seconds, taken_over, written
from perfsim.calibrate.rows import Rows, named
from perfsim.calibrate.sections import with_kind
from perfsim.cost.collective import FAMILIES, algorithm_seconds, collective_estimate
from perfsim.cost.inside import protocols, waiting
from perfsim.cost.speed_of_light import collective_seconds
from perfsim.cost.topology import Fabric, fabric
from perfsim.ops.op import Collective, CollectiveKind
from perfsim.spec import catalog
from perfsim.spec.calibration import DeviceEfficiency
from perfsim.spec.curves import LinkCurve, OperatorCurves
from perfsim.spec.load import find_calibration
from perfsim.uncertainty.coefficients import slower_device

NODES = ("h100-80gb-sxm", "a100-80gb-sxm", "rtx-pro-6000-blackwell-96gb", "l40s-48gb")
DEVICE = find_calibration(accelerator="h100-80gb-sxm", engine="vllm").device
KINDS: tuple[CollectiveKind, ...] = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
EVERY = {family for families in FAMILIES.values() for family in families.values()}

microseconds, amounts = st.floats(0, 5e-5), st.floats(1e3, 1e9)
curves = st.builds(
    LinkCurve, launch=microseconds, hop=microseconds, bandwidth=st.floats(0.02, 1), own=st.floats(0, 1),
    crossing=st.floats(0, 3), peer=microseconds, line=microseconds, line_bytes=amounts, handshake=microseconds,
    handshake_bytes=amounts,
)  # fmt: skip


def priced(curve: LinkCurve) -> DeviceEfficiency:
    return DEVICE.model_copy(update={"curves": OperatorCurves(collective=dict.fromkeys(EVERY, curve))})


def rack(device: str) -> Fabric:
    """1,024 GPUs of one kind on the links of its node."""
    return replace(fabric(catalog.node(device)), domain=1024, gpus=1024)


@settings(max_examples=300, deadline=None)
@given(curves, st.sampled_from(NODES), st.sampled_from(KINDS), st.sampled_from([2, 3, 4, 8, 72, 576, 1024]),
       st.floats(1, 1e15), st.floats(1, 1e15))  # fmt: skip
def test_any_curve_stays_above_the_bound_and_grows_with_bytes(
    curve: LinkCurve, device: str, kind: CollectiveKind, gpus: int, size: float, more: float
) -> None:
    links, efficiency = rack(device), priced(curve)
    small, large = (Collective(kind, kind, 1, amount, gpus) for amount in (size, size + more))
    took = collective_estimate(small, links, efficiency).seconds
    bound = collective_seconds(small, links)
    assert np.isfinite(took)
    assert took >= bound * (1 - 1e-12)
    assert all(each >= bound * (1 - 1e-12) for each in algorithm_seconds(small, links, efficiency).values())
    assert collective_estimate(large, links, efficiency).seconds >= took * (1 - 1e-12)


@settings(max_examples=200, deadline=None)
@given(curves, st.sampled_from(NODES), st.floats(1, 1e12))
def test_a_gather_of_equal_parts_grows_with_the_group(curve: LinkCurve, device: str, size: float) -> None:
    links, efficiency = rack(device), priced(curve)
    took = [float(collective_estimate(Collective("all_gather", "x", 1, size, gpus), links, efficiency).seconds)
            for gpus in (2, 3, 4, 8, 16, 72, 1024)]  # fmt: skip
    assert took == sorted(took)


@settings(max_examples=100, deadline=None)
@given(curves, st.sampled_from(NODES), st.sampled_from(KINDS), st.sampled_from([2, 4, 8]),
       st.lists(st.floats(1, 1e12), min_size=1, max_size=4))  # fmt: skip
def test_arrays_are_as_good_as_numbers(
    curve: LinkCurve, device: str, kind: CollectiveKind, gpus: int, sizes: list[float]
) -> None:
    links, efficiency = fabric(catalog.node(device)), priced(curve)
    together = collective_estimate(Collective(kind, kind, 1, np.array(sizes), gpus), links, efficiency).seconds
    for index, size in enumerate(sizes):
        alone_ = collective_estimate(Collective(kind, kind, 1, size, gpus), links, efficiency).seconds
        assert together[index] == alone_


def test_a_protocol_waits_longer_the_larger_the_part_up_to_its_wait() -> None:
    parts = np.geomspace(1, 1e12, 400)
    waits = waiting(3e-6, parts, 1e5)
    assert np.all(np.diff(waits) > 0) or waits[-1] == pytest.approx(3e-6)
    assert np.all(waits <= 3e-6 * (1 + 1e-12))
    assert np.all(waits <= 3e-6 * parts / 1e5 * (1 + 1e-12))
    assert waiting(3e-6, 1e5, 1e5) == pytest.approx(3e-6 / 2**0.5)
    curve = LinkCurve(launch=0, hop=0, bandwidth=1, line=1e-6, line_bytes=10.0, handshake=4e-6, handshake_bytes=1e3)
    assert protocols(curve, 1e9, 3.0) == pytest.approx(3 * 5e-6, rel=1e-6)
    assert protocols(curve, 0.0, 3.0) == 0.0


def test_only_pairs_use_an_engine_s_own_all_reduce_on_a_host_s_pcie() -> None:
    """vLLM turns its own all-reduce off for more than two GPUs without NVLink (`custom_all_reduce.py`)."""
    links, efficiency = fabric(catalog.node("l40s-48gb")), priced(LinkCurve(launch=1e-6, hop=1e-6, bandwidth=0.8))
    names = {gpus: set(algorithm_seconds(Collective("all_reduce", "x", 1, 1e6, gpus), links, efficiency))
             for gpus in (2, 4, 8)}  # fmt: skip
    assert names == {2: {"ring", "one_shot", "two_shot"}, 4: {"ring"}, 8: {"ring"}}


def test_crossing_slows_more_than_two_gpus_on_pcie_and_nothing_else() -> None:
    plain, crossed = (LinkCurve(launch=0, hop=0, bandwidth=0.8, crossing=crossing) for crossing in (0.0, 0.6))
    for device, slower in {"rtx-pro-6000-blackwell-96gb": True, "h100-80gb-sxm": False}.items():
        links = fabric(catalog.node(device))
        for gpus in (2, 4, 8):
            work = Collective("all_gather", "x", 1, 1e9, gpus)
            before, after = (collective_estimate(work, links, priced(each)).seconds for each in (plain, crossed))
            expected = 1 + 0.6 * (gpus - 2) / (gpus - 1) if slower else 1.0
            assert after / before == pytest.approx(expected, rel=1e-9)


def test_a_slower_draw_slows_every_wait() -> None:
    curve = LinkCurve(launch=1e-6, hop=2e-6, bandwidth=0.5, peer=1e-7, line=3e-7, handshake=4e-6)
    slow = slower_device(priced(curve), {"collective": 2.0}).curves.collective["all_gather"]
    assert (slow.launch, slow.hop, slow.peer, slow.line, slow.handshake) == (2e-6, 4e-6, 2e-7, 6e-7, 8e-6)
    assert slow.bandwidth == 0.25
    assert (slow.own, slow.line_bytes) == (curve.own, curve.line_bytes)


def rows_of(device: str, backend: str, kind: str, gpus: list[int]) -> Rows:
    size = np.geomspace(512, 1e8, 8)
    columns = {"gpus": np.repeat(gpus, 8).astype(float), "bytes": np.tile(size, len(gpus))}
    shape = named(columns["gpus"], columns["bytes"])
    return Rows(device, backend, "nccl 2", "collective", kind, "t", columns, np.ones(len(shape)), shape)


def test_an_engine_takes_nccl_s_kernels_from_nccl_s_own_benchmark() -> None:
    engine = rows_of("h100-80gb-sxm", "vllm", "all_reduce", [2, 8])
    nccl = rows_of("h100-80gb-sxm", "nccl", "all_reduce", [2, 8])
    elsewhere = rows_of("h200-141gb-sxm", "nccl", "all_reduce", [2, 8])
    values = {"ring_all_reduce.launch": 1.0, "nvls_all_reduce.launch": 2.0}
    assert taken_over(engine, [(nccl, values), (elsewhere, {"ring_all_reduce.launch": 3.0})]) == values
    assert taken_over(nccl, [(elsewhere, values)]) == {}


def test_one_size_of_group_takes_hops_and_crossing_from_another_card_on_pcie() -> None:
    pair = rows_of("l40s-48gb", "vllm", "all_gather", [2])
    several = rows_of("rtx-pro-6000-blackwell-96gb", "vllm", "all_gather", [2, 4, 8])
    switched = rows_of("h100-80gb-sxm", "vllm", "all_gather", [2, 4, 8])
    values = {"all_gather.launch": 1.0, "all_gather.hop": 2.0, "all_gather.crossing": 3.0}
    assert alone(pair)
    assert not alone(several)
    assert taken_over(pair, [(switched, values), (several, values)]) == {
        "all_gather.hop": 2.0, "all_gather.crossing": 3.0,
    }  # fmt: skip


def test_in_switch_reduction_that_is_never_the_fastest_gets_no_curve() -> None:
    rows = rows_of("h100-80gb-sxm", "nccl", "all_reduce", [2, 8])
    shape = form(rows)
    values = shape.fixed | {name: start for name, (start, _, _) in shape.bounds.items()}
    assert families_of(rows) == ["ring_all_reduce", "nvls_all_reduce"]
    fast = values | {"nvls_all_reduce.launch": 1e-6, "nvls_all_reduce.bandwidth": 1.0}
    slow = values | {"nvls_all_reduce.launch": 1.0}
    assert written(fast, rows, shape.bounds) == families_of(rows)
    assert written(slow, rows, shape.bounds) == ["ring_all_reduce"]
    assert np.all(seconds(fast, rows) <= seconds(slow, rows))


OLD = """\
# head
device: x
left_out:
  collective: {old: 1}
  gemm: {kept: 1}
backends:
  nccl:
    collective:
      ring_all_reduce:
        curve: {old: 1}
  vllm:
    collective:
      all_gather:
        curve: {old: 1}
    gemm:
      bf16:
        curve: {kept: 1}
versions:
  vllm:
    "0.19.0":
      gemm:
        bf16: {kept: 1}
"""
MADE = """\
# another head
device: x
left_out:
  collective: {new: 1}
backends:
  nccl:
    collective:
      ring_all_reduce:
        curve: {new: 1}
  trtllm:
    collective:
      custom_all_reduce:
        curve: {new: 1}
  vllm:
    collective:
      all_gather:
        curve: {new: 1}
"""


def test_one_kind_is_exchanged_and_every_other_line_stays() -> None:
    merged = with_kind(OLD, MADE, "collective")
    added = "  trtllm:\n    collective:\n      custom_all_reduce:\n        curve: {new: 1}\n"
    expected = OLD.replace("old", "new").replace("  vllm:\n", f"{added}  vllm:\n", 1)
    assert merged == expected
    assert with_kind(merged, MADE, "collective") == merged
