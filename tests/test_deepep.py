"""DeepEP's kernels: laws of the formula, measured rows, and simulations whose experts are reached by them."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfsim.cost.collective import collective_estimate
from perfsim.cost.deepep import bounds, seconds_of
from perfsim.cost.speed_of_light import collective_seconds
from perfsim.cost.step import step_estimate
from perfsim.cost.step_model import compile_steps
from perfsim.cost.topology import Fabric, fabric
from perfsim.errors import InputError
from perfsim.ops.exchange import copies, reached
from perfsim.ops.op import Collective, Routed
from perfsim.ops.step import StepShape
from perfsim.ops.transformer import lower
from perfsim.run import simulate
from perfsim.spec import catalog
from perfsim.spec.cluster import Cluster, FatTree
from perfsim.spec.exchanges_file import ExchangesFile
from perfsim.spec.load import find_calibration, load_scenario
from perfsim.spec.policy import ServingPolicy
from perfsim.spec.scenario import Scenario
from perfsim.spec.yaml import load_yaml
from validation.compare.plans import engine_policy

CALIBRATION = find_calibration(accelerator="h100-80gb-sxm", engine="sglang")
CURVES = CALIBRATION.device.curves.exchange
KERNELS, DIRECTIONS = ("low_latency", "normal"), ("dispatch", "combine")
BACKENDS = ("all_to_all", "allgather_reducescatter", "deepep_low_latency", "deepep_high_throughput", "deepep_auto")
MODEL = catalog.model("deepseek-ai--DeepSeek-V3")

kinds = st.sampled_from(KERNELS)
ways = st.sampled_from(DIRECTIONS)
sizes = st.floats(1.0, 65536.0)
counts = st.sampled_from((1, 2, 4, 8))


def machine(nodes: int, name: str = "dgx-h100") -> Fabric:
    node = catalog.node(name)
    if nodes == 1:
        return fabric(node)
    switches = FatTree(rail_optimised=True, radix=64, levels=1, hop_latency=0.0)
    return fabric(node, Cluster(name=name, label="", node=node, node_count=nodes, network=switches))


def exchange(kernels, direction, tokens, *, nodes: int = 1, row: float = 7168.0, picks: int = 8, gpus: int = 8):
    group = nodes * gpus
    routed = Routed(kernels, direction, tokens, row, 256, picks)
    sent = tokens * (row * copies(kernels, gpus=group, experts=256, picks=picks))
    return Collective("all_to_all", f"expert_{direction}", 1, sent, group, routed=routed)


def seconds(work: Collective, nodes: int = 1, name: str = "dgx-h100"):
    return collective_estimate(work, machine(nodes, name), CALIBRATION.device).seconds


@given(kinds, ways, sizes, st.floats(1.0, 4.0), counts)
def test_more_tokens_and_wider_rows_never_take_less(kernels, direction, tokens, factor, nodes) -> None:
    base = seconds(exchange(kernels, direction, tokens, nodes=nodes), nodes)
    assert seconds(exchange(kernels, direction, tokens * factor, nodes=nodes), nodes) >= base
    assert seconds(exchange(kernels, direction, tokens, nodes=nodes, row=7168.0 * factor), nodes) >= base


@given(kinds, ways, sizes, st.sampled_from((1, 2, 4)))
def test_more_nodes_never_take_less(kernels, direction, tokens, nodes) -> None:
    few, many = (seconds(exchange(kernels, direction, tokens, nodes=count), count) for count in (nodes, 2 * nodes))
    assert many >= few


@given(kinds, ways, sizes, counts, st.floats(1.0, 256.0))
def test_nothing_beats_the_links_and_the_cards(kernels, direction, tokens, nodes, sms) -> None:
    work, links = exchange(kernels, direction, tokens, nodes=nodes), machine(nodes)
    curve, found = CURVES[f"{kernels}-{direction}"], bounds(work, links.path(work.group))
    took = seconds_of(curve, found, sms=sms)
    assert took >= curve.launch + max(found.links, found.cards)
    assert took >= collective_seconds(work, links)
    assert seconds_of(curve, found, sms=2 * sms) <= took


@given(ways, st.lists(sizes, min_size=1, max_size=5), kinds, counts)
def test_arrays_hold_what_floats_hold(direction, tokens, kernels, nodes) -> None:
    many = seconds(exchange(kernels, direction, np.array(tokens), nodes=nodes), nodes)
    each = [seconds(exchange(kernels, direction, one, nodes=nodes), nodes) for one in tokens]
    np.testing.assert_allclose(many, each, rtol=1e-12)


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 8))
def test_reached_counts_combinations(owned, parts, picks) -> None:
    experts = owned * parts
    picks = min(picks, experts)
    assert reached(experts, owned, picks) == pytest.approx(1 - comb(experts - owned, picks) / comb(experts, picks))


# Rows of aic_deepep (ai-dynamo/aiconfigurator@095f58a, Apache-2.0): 256 experts, 8 picks, hidden size 7168, FP8
# dispatch with scales and BF16 combine; seconds as measured, on 20 SMs where the kernels have SMs of their own.
MEASURED = [
    ("dgx-h100", 1, "low_latency", "combine", 128, 72.4e-6), ("dgx-h100", 1, "normal", "dispatch", 4096, 492.2e-6),
    ("dgx-h200", 4, "low_latency", "combine", 64, 151.7e-6), ("dgx-h100", 2, "low_latency", "dispatch", 64, 58.1e-6),
    ("dgx-h100", 2, "normal", "combine", 2048, 1114.0e-6), ("dgx-h100", 4, "normal", "combine", 160, 245.4e-6),
    ("dgx-b200", 1, "normal", "combine", 2048, 500.1e-6), ("dgx-b200", 1, "low_latency", "dispatch", 256, 44.5e-6),
    ("gb200-nvl72", 1, "low_latency", "dispatch", 256, 37.5e-6),
    ("gb200-nvl72", 1, "normal", "dispatch", 2048, 233.6e-6),
]  # fmt: skip


@pytest.mark.parametrize(("name", "nodes", "kernels", "direction", "tokens", "measured"), MEASURED)
def test_measured_rows(name, nodes, kernels, direction, tokens, measured) -> None:
    row = 7168 * (1 + 4 / 128) if direction == "dispatch" else 2 * 7168.0
    work = exchange(kernels, direction, float(tokens), nodes=nodes, row=row, gpus=4 if name == "gb200-nvl72" else 8)
    assert seconds(work, nodes, name) == pytest.approx(measured, rel=0.25)


def test_the_file_says_how_far_off_it_is() -> None:
    path = next(root / "hardware/calibration/exchanges.yaml" for root in catalog.data_directories())
    content = ExchangesFile.model_validate(load_yaml(path))
    assert set(content.exchanges) == {f"{kernels}-{direction}" for kernels in KERNELS for direction in DIRECTIONS}
    for fitted in content.exchanges.values():
        assert fitted.median < 0.15
        assert sum(miss.rows for miss in fitted.by_nodes.values()) == fitted.rows
        assert set(fitted.left_out) == {"dgx-b200", "dgx-h100", "dgx-h200", "gb200-nvl72"}
        assert max(miss.median for miss in fitted.left_out.values()) < 0.3
        assert len(fitted.covariance) == len(fitted.stderr)
        assert (fitted.curve.sms is None) == (fitted.curve.sm_bandwidth is None)


def step(tokens: float, prompt: float) -> StepShape:
    return StepShape(tokens, 8.0, 8.0, (4096.0,), prompt, (prompt * 500.0,), (prompt,), 8 * tokens)


@pytest.mark.parametrize(("backend", "prompt", "kernels"), [
    ("deepep_low_latency", 512.0, "low_latency"), ("deepep_high_throughput", 0.0, "normal"),
    ("deepep_auto", 0.0, "low_latency"), ("deepep_auto", 512.0, "normal"),
])  # fmt: skip
@pytest.mark.parametrize("tp", [1, 2])
def test_which_kernels_run_and_what_they_move(backend, prompt, kernels, tp) -> None:
    work = lower(MODEL, step(64.0 + prompt, prompt), tp=tp, dp=8, ep=8 * tp, all2all_backend=backend)
    moved = [item for item in work if isinstance(item, Collective) and item.routed is not None and item.active > 0]
    assert [item.routed.direction for item in moved] == ["dispatch", "combine"]
    for item, row in zip(moved, (7168 * (1 + 4 / 128), 2 * 7168.0), strict=True):
        assert item.routed == Routed(kernels, item.routed.direction, (64.0 + prompt) / tp, row, 256, 8)
        assert item.bytes == pytest.approx(
            item.routed.tokens * row * copies(kernels, gpus=8 * tp, experts=256, picks=8)
        )


@pytest.mark.parametrize("tp", [1, 2])
def test_the_gather_brings_all_tokens_to_all_experts(tp: int) -> None:
    work = lower(MODEL, step(64.0, 0.0), tp=tp, dp=8, ep=8 * tp, all2all_backend="allgather_reducescatter")
    found = {item.name: item for item in work if isinstance(item, Collective)}
    gather, scatter = found["expert_gather"], found["expert_reduce"]
    assert (gather.kind, gather.group, gather.bytes * gather.group) == ("all_gather", 8 * tp, 8 * 64 * 7168)
    assert (scatter.kind, scatter.group, scatter.bytes) == ("reduce_scatter", 8 * tp, 8 * 64 * 7168 * 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("tokens", "prompt"), [(8, 0), (520, 512)])
def test_the_compiled_form_equals_the_explained_one(backend, tokens, prompt) -> None:
    policy, node = ServingPolicy(all2all_backend=backend), catalog.node("dgx-h100")
    steps = compile_steps(
        model=MODEL, node=node, tp=1, dp=8, ep=8, calibration=CALIBRATION, max_num_batched_tokens=1024,
        max_num_seqs=64, async_scheduling=False, policy=policy,
    )  # fmt: skip
    pairs = (prompt * 500,)
    gpu = steps.on_gpu().step_seconds(tokens, 8, 8, (4096,), prompt, pairs, (prompt,)) + steps.group_s[8 * tokens]
    explained = step_estimate(
        step(float(tokens), float(prompt)), model=MODEL, node=node, tp=1, dp=8, ep=8, calibration=CALIBRATION,
        async_scheduling=False, policy=policy,
    )  # fmt: skip
    assert gpu + steps.host_seconds(tokens) + steps.exposed_seconds(8) == pytest.approx(explained.seconds, rel=1e-9)


def scenario(**changes) -> Scenario:
    keys = {"parallel.dp": 8, "parallel.ep": 8, "workload.num_requests": 60, "workload.arrivals.rate": 6.0, **changes}
    return load_scenario(
        model="deepseek-ai--DeepSeek-V3", hardware="dgx-h200", engine="sglang",
        overrides=[f"{key}={value}" for key, value in keys.items()],
    )  # fmt: skip


def test_a_simulation_uses_the_kernels_that_its_policy_names() -> None:
    spent = {}
    for backend in BACKENDS:
        result = simulate(scenario(**{"policy.all2all_backend": backend}))
        spent[backend] = result.breakdown["communication"]
    assert len(set(spent.values())) == len(BACKENDS)
    assert spent["deepep_auto"] < max(spent["deepep_low_latency"], spent["deepep_high_throughput"])


def test_jumps_equal_steps_with_two_kinds_of_kernels() -> None:
    chosen = scenario(**{"policy.all2all_backend": "deepep_auto"})
    fast, slow = simulate(chosen), simulate(chosen, stepwise=True)
    for name in ("ttft", "tpot", "e2e"):
        for statistic in ("mean", "p50", "p99"):
            assert fast.metrics[name][statistic] == pytest.approx(slow.metrics[name][statistic], rel=1e-9)


def test_engines_without_the_option() -> None:
    chosen = {name: find_calibration(accelerator="h100-80gb-sxm", engine=name).engine.all2all_backend
              for name in ("vllm", "sglang", "trtllm")}  # fmt: skip
    assert chosen == {"vllm": "allgather_reducescatter", "sglang": "allgather_reducescatter", "trtllm": "all_to_all"}


def test_measured_runs_whose_exchange_was_not_published_keep_a_plain_one() -> None:
    sizes = {"version": "0.5.8", "accelerator": "h200-141gb-sxm", "model": "deepseek-ai--DeepSeek-V3"}
    spread, alone = {"tp": 1, "dp": 8, "ep": 8, "pp": 1, "gpus": 8}, {"tp": 8, "dp": 1, "ep": 8, "pp": 1, "gpus": 8}
    assert engine_policy("sglang", plan=spread, **sizes)["all2all_backend"] == "all_to_all"
    assert "all2all_backend" not in engine_policy("sglang", plan=alone, **sizes)


def test_a_wrong_name_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(InputError, match="did you mean 'deepep_low_latency'"):
        scenario(**{"policy.all2all_backend": "deepep_lowlatency"})
