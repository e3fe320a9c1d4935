"""Laws of the cost model: never above the speed of light, never faster for more work, sums that add up."""

from __future__ import annotations

import json
from functools import cache, reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batches import Chunks, batch_shape, decode_knots, decodes, prefills, stacked
from hypothesis import example, given, settings
from hypothesis import strategies as st

from perfsim.cost.alike import Alike
from perfsim.cost.collective import collective_estimate
from perfsim.cost.device import peak_flops
from perfsim.cost.estimate import Estimate, overlap
from perfsim.cost.roofline import op_estimate
from perfsim.cost.speed_of_light import collective_seconds, op_seconds
from perfsim.cost.step import gpu_parts, step_estimate
from perfsim.cost.topology import fabric
from perfsim.errors import InfeasibleError
from perfsim.ops.op import Op
from perfsim.ops.step import StepShape, attention_spans
from perfsim.ops.transformer import lower
from perfsim.spec import catalog
from perfsim.spec.calibration import Calibration
from perfsim.spec.hardware import Node
from perfsim.spec.load import find_calibration
from perfsim.spec.policy import ServingPolicy

FOLDER = Path(__file__).resolve().parents[1] / "workloads" / "models"
ACCELERATORS = catalog.list_accelerators()
MODELS = (
    "llama-3.1-8b-instruct",
    "Qwen--Qwen3-32B-FP8",
    "qwen3-30b-a3b",
    "deepseek-ai--DeepSeek-V3",
    "openai--gpt-oss-20b",
    "MiniMaxAI--MiniMax-M3",
    "deepseek-ai--DeepSeek-V3.2",
    "deepseek-ai--DeepSeek-V4-Flash",
    "Qwen--Qwen3.5-35B-A3B",
    "moonshotai--Kimi-K3",
    "nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    "mistralai--Mamba-Codestral-7B-v0.1",
)
CHUNKED = "meta-llama--Llama-4-Scout-17B-16E-Instruct"  # attends less where a chunk begins, so it breaks some laws

node_of = cache(catalog.node)
model_of = cache(catalog.model)


def cases_of(models: tuple[str, ...]) -> st.SearchStrategy[tuple[str, str, int]]:
    cases = st.tuples(st.sampled_from(models), st.sampled_from(ACCELERATORS), st.sampled_from([1, 2, 4]))
    return cases.filter(lambda case: case[2] <= node_of(case[1]).accelerator_count)


names, all_names = cases_of(MODELS), cases_of((*MODELS, CHUNKED))
# (decoding sequences, context of each, prefill chunk, its past)
loads = st.tuples(st.integers(0, 1024), st.integers(1, 10**7), st.integers(0, 16384), st.integers(0, 10**7))
# Growing contexts, each with its bandwidth fraction: what a fit of measured kernels may bring.
knots = st.lists(st.tuples(st.integers(1, 10**6), st.floats(0.05, 1)), min_size=1, max_size=6, unique_by=lambda k: k[0])
parts = st.builds(
    lambda seconds, flops, joules, bound, factor: Estimate(
        seconds, flops, joules=joules, bound_s={bound: seconds}, d_seconds={factor: seconds}
    ),
    *[st.floats(0, 1e3)] * 3,
    st.sampled_from(["compute", "memory", "link"]),
    st.sampled_from(["linear", "experts", "communication"]),
)


@cache
def calibration_of(accelerator: str) -> Calibration:
    return find_calibration(accelerator=accelerator, engine="vllm")


def load_shape(model: str, load: tuple[int, int, int, int]) -> StepShape:
    """A step of equal decodes and one chunk, whose sums may be far beyond what a list could hold."""
    sequences, context, chunk, past = load
    one = batch_shape(model_of(model), [context - 1], [(chunk, past)] if chunk else [])
    decoding = tuple(float(sequences * span.attended(context - 1)) for span in attention_spans(model_of(model)))
    logits = float(sequences + bool(chunk))
    return StepShape(
        float(sequences + chunk), logits, float(sequences), decoding, one.prefill_tokens, one.prefill_pairs,
        one.prefill_context,
    )  # fmt: skip


def check_speed_of_light(name: str, step: StepShape, node: Node, calibration: Calibration, tp: int) -> None:
    popularity = calibration.engine.expert_popularity
    sixteen = lower(model_of(name), step, tp=tp, expert_popularity=popularity)
    eight = lower(model_of(name), step, tp=tp, expert_popularity=popularity, kv_cache_dtype="fp8")
    for work in (*sixteen, *eight):
        if isinstance(work, Op):
            estimate = op_estimate(work, node.accelerator, calibration.device, calibration.power)
            bound = op_seconds(work, node.accelerator)
        else:
            estimate = collective_estimate(work, fabric(node), calibration.device)
            bound = collective_seconds(work, fabric(node))
        assert np.all(estimate.seconds >= bound * (1 - 1e-12)), f"{work.name} beats the speed of light"
        assert np.all(np.greater_equal(estimate.joules, 0.0))
        assert np.all(np.isfinite(estimate.seconds))


@settings(max_examples=150, deadline=None)
@given(all_names, st.lists(loads, min_size=1, max_size=8))
def test_nothing_beats_the_speed_of_light(case: tuple[str, str, int], batch: list[tuple[int, int, int, int]]) -> None:
    name, accelerator, tp = case
    step = stacked([load_shape(name, load) for load in batch])
    check_speed_of_light(name, step, node_of(accelerator), calibration_of(accelerator), tp)


@settings(deadline=None)
@given(all_names, loads, knots, st.floats(0.1, 10))
@example(("llama-3.1-8b-instruct", "h100-80gb-sxm", 1), (1024, 1, 0, 0), [(128, 1.0)], 0.1)
def test_nothing_beats_it_with_other_curves_and_memories(
    case: tuple[str, str, int], load: tuple[int, int, int, int], curve: list[tuple[int, float]], ratio: float
) -> None:
    name, accelerator, tp = case
    node, calibration = node_of(accelerator), with_curve(calibration_of(accelerator), curve)
    written = node.accelerator.memory.read_bandwidth * ratio
    check_speed_of_light(name, load_shape(name, load), with_memory(node, write_bandwidth=written), calibration, tp)


def with_curve(calibration: Calibration, curve: list[tuple[int, float]]) -> Calibration:
    device = decode_knots(calibration.device, tuple(sorted(curve)))
    return calibration.model_copy(update={"device": device})


def with_memory(node: Node, **changes: float) -> Node:
    memory = node.accelerator.memory.model_copy(update=changes)
    return node.model_copy(update={"accelerator": node.accelerator.model_copy(update={"memory": memory})})


def seconds(name: str, step: StepShape, node: Node, calibration: Calibration, tp: int, *, lag: bool = True) -> float:
    estimate = step_estimate(
        step, model=model_of(name), node=node, tp=tp, calibration=calibration, async_scheduling=lag
    )  # fmt: skip
    return float(estimate.seconds)


@pytest.mark.parametrize("prompt_chunk", [8192, 32000])
def test_a_long_prefill_takes_as_long_as_its_flops(prompt_chunk: int) -> None:
    """32,000 tokens of Llama-3.1-8B on one H100: 723 ms at the dense bf16 peak, which a published simulator beats."""
    raw: dict[str, Any] = json.loads((FOLDER / "llama-3.1-8b-instruct.json").read_text())
    layers, hidden, inner = raw["num_hidden_layers"], raw["hidden_size"], raw["intermediate_size"]
    heads, kv_heads, tokens = raw["num_attention_heads"], raw["num_key_value_heads"], 32_000
    dim = hidden // heads
    weights = layers * (hidden * (heads + 2 * kv_heads) * dim + heads * dim * hidden + 3 * hidden * inner)
    pairs = tokens * (tokens + 1) // 2
    work = 2 * weights * tokens + 2 * hidden * raw["vocab_size"] + 4 * heads * dim * layers * pairs
    bound = work / 989.5e12  # H100 SXM5 dense bf16, half of the sparse 1,979 TFLOP/s of NVIDIA's datasheet
    assert bound == pytest.approx(0.723, abs=0.0005)
    node, calibration = node_of("h100-80gb-sxm"), calibration_of("h100-80gb-sxm")
    assert node.accelerator.peak_flops["bf16"] == 989.5e12
    starts = range(0, tokens, prompt_chunk)
    chunks = [(min(prompt_chunk, tokens - start), start) for start in starts]
    steps = [batch_shape(model_of("llama-3.1-8b-instruct"), [], [chunk]) for chunk in chunks]
    took = sum(seconds("llama-3.1-8b-instruct", step, node, calibration, 1) for step in steps)
    assert bound < took < 2 * bound
    perfect = {field: 0.0 for field in type(calibration.device).model_fields if field.endswith(("_launch", "_hop"))}
    perfect |= {field: 1.0 for field in type(calibration.device).model_fields if field.endswith("_compute")}
    ideal = calibration.model_copy(update={"device": calibration.device.model_copy(update=perfect)})
    assert sum(seconds("llama-3.1-8b-instruct", step, node, ideal, 1) for step in steps) > bound


@settings(max_examples=150, deadline=None)
@given(names, decodes, prefills, st.data(), st.booleans())
def test_more_work_is_never_faster(
    case: tuple[str, str, int], past: list[int], chunks: Chunks, data: st.DataObject, lag: bool
) -> None:
    name, accelerator, tp = case
    node, calibration, model = node_of(accelerator), calibration_of(accelerator), model_of(name)
    before = seconds(name, batch_shape(model, past, chunks), node, calibration, tp, lag=lag)
    more = data.draw(st.integers(1, 100_000))
    bigger: list[tuple[list[int], Chunks]] = [([*past, more], chunks), (past, [*chunks, (min(more, 8192), 17)])]
    if past:
        bigger.append(([past[0] + more, *past[1:]], chunks))
    if chunks:
        chunk, start = chunks[0]
        bigger += [(past, [(chunk, start + more), *chunks[1:]]), (past, [(chunk + more, start), *chunks[1:]])]
    for batch in bigger:
        assert seconds(name, batch_shape(model, *batch), node, calibration, tp, lag=lag) >= before * (1 - 1e-12)


@settings(deadline=None)
@given(st.sampled_from(MODELS), knots, st.integers(1, 256), st.integers(1, 10**6), st.integers(1, 10**6))
def test_more_context_is_never_faster_whatever_the_curve(
    name: str, curve: list[tuple[int, float]], sequences: int, context: int, more: int
) -> None:
    node, calibration = node_of("h100-80gb-sxm"), with_curve(calibration_of("h100-80gb-sxm"), curve)
    short, long = (load_shape(name, (sequences, tokens, 0, 0)) for tokens in (context, context + more))
    assert seconds(name, long, node, calibration, 1) >= seconds(name, short, node, calibration, 1) * (1 - 1e-12)


@settings(deadline=None)
@given(all_names, decodes, prefills, st.floats(1, 100), st.booleans())
def test_better_hardware_is_never_slower(
    case: tuple[str, str, int], past: list[int], chunks: Chunks, factor: float, lag: bool
) -> None:
    name, accelerator, tp = case
    node, calibration = node_of(accelerator), calibration_of(accelerator)
    step = batch_shape(model_of(name), past, chunks)
    before = seconds(name, step, node, calibration, tp, lag=lag)
    memory = node.accelerator.memory
    peaks = {dtype: rate * factor for dtype, rate in node.accelerator.peak_flops.items()}
    chip = node.accelerator.model_copy(update={"peak_flops": peaks})
    link = node.scale_up.model_copy(update={"bandwidth": node.scale_up.bandwidth * factor})
    near = node.scale_up.model_copy(update={"latency": node.scale_up.latency / factor})
    for better in (
        with_memory(node, read_bandwidth=memory.read_bandwidth * factor),
        with_memory(node, write_bandwidth=memory.write_bandwidth * factor),
        node.model_copy(update={"accelerator": chip}),
        node.model_copy(update={"scale_up": link}),
        node.model_copy(update={"scale_up": near}),
        node.model_copy(update={"scale_up": node.scale_up.model_copy(update={"topology": "switched"})}),
    ):
        assert seconds(name, step, better, calibration, tp, lag=lag) <= before * (1 + 1e-12)


@settings(max_examples=50, deadline=None)
@given(names, st.lists(st.tuples(decodes, prefills), min_size=1, max_size=4), st.booleans())
def test_sensitivities_and_parts_add_up(
    case: tuple[str, str, int], batches: list[tuple[list[int], Chunks]], lag: bool
) -> None:
    name, accelerator, tp = case
    context = {"model": model_of(name), "node": node_of(accelerator), "tp": tp}
    context["calibration"] = calibration_of(accelerator)
    step = stacked([batch_shape(model_of(name), *batch) for batch in batches])
    estimate = step_estimate(step, async_scheduling=lag, **context)
    np.testing.assert_allclose(sum(estimate.d_seconds.values()), estimate.seconds, rtol=1e-12)
    for field in ("flops", "bytes", "joules"):
        summed = sum(getattr(part, field) for part in gpu_parts(step, **context))
        np.testing.assert_allclose(getattr(estimate, field), summed, rtol=1e-12)
    # Async scheduling hides, it never adds.
    both = [step_estimate(step, async_scheduling=hidden, **context).seconds for hidden in (True, False)]
    assert np.all(both[0] <= both[1])


@settings(max_examples=50, deadline=None)
@given(names, st.lists(st.tuples(decodes, prefills), min_size=1, max_size=4))
def test_work_priced_once_per_number_of_tokens_costs_the_same(
    case: tuple[str, str, int], batches: list[tuple[list[int], Chunks]]
) -> None:
    name, accelerator, tp = case
    context = {"model": model_of(name), "node": node_of(accelerator), "tp": tp}
    context["calibration"] = calibration_of(accelerator)
    step = stacked([batch_shape(model_of(name), *batch) for batch in [*batches, batches[0]]])
    alike = Alike.by_tokens(step.tokens)
    assert len(alike.one) < len(step.tokens)
    for part, same in zip(gpu_parts(step, **context), gpu_parts(step, alike=alike, **context), strict=True):
        for field in ("seconds", "flops", "bytes", "joules"):
            np.testing.assert_allclose(getattr(part, field), getattr(same, field), rtol=1e-14)
        for field in ("bound_s", "d_seconds"):
            assert getattr(part, field).keys() == getattr(same, field).keys()
            for factor, seconds in getattr(part, field).items():
                np.testing.assert_allclose(seconds, getattr(same, field)[factor], rtol=1e-14)


@settings(deadline=None)
@given(parts, parts, parts)
def test_addition_is_associative(first: Estimate, second: Estimate, third: Estimate) -> None:
    one, other = (first + second) + third, first + (second + third)
    for field in ("seconds", "flops", "bytes", "joules"):
        assert getattr(one, field) == pytest.approx(getattr(other, field), rel=1e-12, abs=0)
    assert one.d_seconds == pytest.approx(dict(other.d_seconds), rel=1e-12, abs=0)
    assert sum(one.d_seconds.values()) == pytest.approx(one.seconds, rel=1e-12, abs=0)
    assert (first + second).seconds == (second + first).seconds == first.seconds + second.seconds


def test_the_bound_of_a_sum_does_not_depend_on_its_grouping() -> None:
    work = [Estimate(3.0, bound_s={"compute": 3.0}), *[Estimate(2.0, bound_s={"memory": 2.0})] * 2]
    assert (work[0] + (work[1] + work[2])).bound == "memory"
    assert reduce(Estimate.__add__, work).bound == "memory"


@settings(deadline=None)
@given(parts, parts)
def test_overlap_takes_the_longer(first: Estimate, second: Estimate) -> None:
    both = overlap(first, second)
    assert both.seconds == max(first.seconds, second.seconds)
    assert both.joules == first.joules + second.joules
    assert sum(both.d_seconds.values()) == pytest.approx(both.seconds, rel=1e-12, abs=0)
    longer = first if first.seconds >= second.seconds else second
    assert both.bound == longer.bound


def test_estimates_of_arrays_name_the_bound_of_each_row() -> None:
    first = Estimate(np.array([1.0, 3.0]), bound_s={"memory": np.array([1.0, 3.0])})
    second = Estimate(np.array([2.0, 2.0]), bound_s={"link": np.array([2.0, 2.0])})
    assert (first + second).bound.tolist() == ["link", "memory"]
    assert overlap(first, second).seconds.tolist() == [2.0, 3.0]


def test_samplers_that_stream_the_logits_more_often_take_longer() -> None:
    node, calibration = node_of("h100-80gb-sxm"), calibration_of("h100-80gb-sxm")
    step = load_shape("llama-3.1-8b-instruct", (128, 1000, 0, 0))
    engine = calibration.engine
    took = [
        seconds(
            "llama-3.1-8b-instruct", step, node,
            calibration.model_copy(update={"engine": engine.model_copy(update={"sampling_passes": passes})}), 1,
        )
        for passes in (100.0, 200.0)
    ]  # fmt: skip
    # 100 more passes over 128 rows of 128,256 fp32 logits, at the bandwidth that nothing exceeds.
    assert took[1] - took[0] >= 100 * 128 * 128256 * 4 / node.accelerator.memory.read_bandwidth


def test_only_samplers_that_sort_take_the_time_of_sorting() -> None:
    """Sorting is so many passes in so many kernels, each with its launch; without top-p it is few passes in one."""
    node, calibration = node_of("h100-80gb-sxm"), calibration_of("h100-80gb-sxm")
    update = {"sampling_passes": 60.0, "sampling_kernels": 101, "plain_sampling_passes": 5.0}
    calibration = calibration.model_copy(update={"engine": calibration.engine.model_copy(update=update)})
    model, step = catalog.model("llama-3.1-8b-instruct"), load_shape("llama-3.1-8b-instruct", (128, 1000, 0, 0))
    took = {
        kind: step_estimate(
            step, model=model, node=node, tp=1, calibration=calibration, async_scheduling=True,
            policy=ServingPolicy(sampling=kind),
        ).seconds
        for kind in ("sorted", "plain")
    }  # fmt: skip
    device, memory = calibration.device, node.accelerator.memory
    streamed = 55.0 * 128 * 128256 * 4 / (memory.read_bandwidth * device.elementwise_bandwidth)
    assert took["sorted"] - took["plain"] == pytest.approx(streamed + 100 * device.elementwise_launch)


def test_formats_fall_back_to_what_the_device_can_compute() -> None:
    p100, a100, h100 = (catalog.accelerator(name) for name in ("p100-16gb", "a100-80gb-sxm", "h100-80gb-sxm"))
    assert peak_flops(p100, "bf16") == p100.peak_flops["fp16"]
    assert peak_flops(a100, "fp8") == a100.peak_flops["bf16"]
    assert peak_flops(h100, "fp4") == h100.peak_flops["bf16"]
    with pytest.raises(InfeasibleError, match="no arithmetic for fp16") as caught:
        peak_flops(h100.model_copy(update={"peak_flops": {"fp64": 67e12}}), "fp16")
    assert caught.value.binding == "dtype"
