"""Fitted curves: the fit and the cost model use one formula, and no coefficients that load break the laws."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from batches import batch_shape
from hypothesis import given, settings
from hypothesis import strategies as st

from perfsim.calibrate.forms import Form, form
from perfsim.calibrate.rows import Rows, named
from perfsim.cost.collective import collective_estimate
from perfsim.cost.roofline import op_estimate
from perfsim.cost.speed_of_light import op_seconds
from perfsim.cost.step import step_estimate
from perfsim.cost.step_model import compile_steps
from perfsim.cost.topology import fabric
from perfsim.ops.attention import Kernel, _attention_core
from perfsim.ops.gemm import gemm
from perfsim.ops.mlp import mlp_ops
from perfsim.ops.op import Collective, CollectiveKind, Op
from perfsim.ops.step import StepShape, attention_spans
from perfsim.ops.transformer import lower
from perfsim.spec import catalog
from perfsim.spec.calibration import Calibration, DeviceEfficiency
from perfsim.spec.curves import (
    DecodeCurve,
    ExpertCurve,
    GemmCurve,
    MixedCurve,
    OperatorCurves,
    PrefillCurve,
)
from perfsim.spec.load import find_calibration
from perfsim.spec.model import MixtureOfExperts, ModelArch

GPUS = ("h100-80gb-sxm", "l40s-48gb", "b200-180gb-sxm")
MODELS = ("llama-3.1-8b-instruct", "qwen3-30b-a3b", "deepseek-v2-lite", "google--gemma-4-26B-A4B")
fractions, microseconds = st.floats(0.02, 1), st.floats(0, 50e-6)
gemm_curves = st.builds(
    GemmCurve, launch=microseconds, ramp=microseconds, ramp_depth=st.floats(1, 2e4), bandwidth=fractions,
    ramp_sharpness=st.floats(1, 12), compute=fractions, depth_padding=st.floats(0, 4000), edge=st.floats(0, 2000),
    idle=st.floats(0, 1), idle_depth=st.floats(1, 1e6), tail=st.floats(0, 1), throttle=st.floats(0, 2),
    throttle_seconds=st.floats(1e-7, 1), sharpness=st.floats(1, 12), row_seconds=st.floats(0, 1e-7),
    quantise_bandwidth=st.none() | fractions, tallest=st.sampled_from([128.0, 256.0]),
)  # fmt: skip
decode_curves = st.builds(
    DecodeCurve, launch=microseconds, bandwidth=fractions, tile=microseconds, sharpness=st.floats(1, 12),
    ramp=microseconds, ramp_bytes=st.floats(1e5, 1e9), compute=st.none() | fractions,
    wide=st.floats(0, 1e-8), sm_bandwidth=st.none() | st.floats(1e9, 1e12), splits=st.floats(1, 512),
    packed=st.floats(1, 128),
)  # fmt: skip
prefill_curves = st.builds(
    PrefillCurve, launch=microseconds, compute=fractions, head_padding=st.floats(0, 300), bandwidth=fractions,
    critical_rows=st.floats(0, 300), tile=st.floats(0, 1e-7), kv_tile=st.floats(0, 1e-7), diagonal=st.floats(0, 500),
    packed=st.floats(1, 16), cut=st.floats(0, 1000),
)  # fmt: skip
expert_curves = st.builds(
    ExpertCurve, launch=microseconds, bandwidth=fractions, compute=fractions, expert_padding=st.floats(0, 300),
    passes=st.floats(0, 20), sharpness=st.floats(1, 12),
)  # fmt: skip
mixed_curves = st.builds(
    MixedCurve, rows=st.floats(8, 256), tail=st.floats(0, 2), empty=st.floats(0, 1e-5), last=st.floats(0, 2)
)
every_curve = st.builds(
    lambda g, d, p, m, x: OperatorCurves(
        gemm={"bf16": g}, decode={"bf16": d, "mla-bf16": d}, prefill={"bf16": p, "mla-bf16": p}, moe={"bf16": m},
        mixed={} if x is None else {"bf16": x},
    ),
    gemm_curves, decode_curves, prefill_curves, expert_curves, st.none() | mixed_curves,
)  # fmt: skip
# (decoding sequences, context of each, prefill chunk, its past)
loads = st.tuples(st.integers(0, 1024), st.integers(1, 10**7), st.integers(0, 16384), st.integers(0, 10**7))


@cache
def calibration_of(gpu: str) -> Calibration:
    return find_calibration(accelerator=gpu, engine="vllm")


def with_curves(gpu: str, curves: OperatorCurves) -> Calibration:
    calibration = calibration_of(gpu)
    device = calibration.device.model_copy(update={"curves": curves})
    return calibration.model_copy(update={"device": device})


def shape_of(model: ModelArch, load: tuple[int, int, int, int]) -> StepShape:
    sequences, context, chunk, past = load
    one = batch_shape(model, [], [(chunk, past)] if chunk else [])
    attended = tuple(float(sequences * span.attended(context - 1)) for span in attention_spans(model))
    return StepShape(
        float(sequences + chunk), float(sequences + bool(chunk)), float(sequences), attended, one.prefill_tokens,
        one.prefill_pairs, one.prefill_context, prefill_longest=one.prefill_longest,
    )  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(MODELS), st.sampled_from(GPUS), every_curve, loads)
def test_no_curve_beats_the_speed_of_light(
    name: str, gpu: str, curves: OperatorCurves, load: tuple[int, int, int, int]
) -> None:
    calibration, chip = with_curves(gpu, curves), catalog.accelerator(gpu)
    for work in lower(catalog.model(name), shape_of(catalog.model(name), load), tp=1):
        if isinstance(work, Op):
            took = op_estimate(work, chip, calibration.device, calibration.power).seconds
            assert np.all(took >= op_seconds(work, chip) * work.active * (1 - 1e-12)), work.name
            assert np.all(np.isfinite(took))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(MODELS), st.sampled_from(GPUS), every_curve, loads, st.integers(1, 10**5), st.integers(0, 3))
def test_more_work_is_never_faster_on_any_curve(
    name: str, gpu: str, curves: OperatorCurves, load: tuple[int, int, int, int], more: int, which: int
) -> None:
    if which >= 2 and not load[2]:
        return
    model, bigger = catalog.model(name), list(load)
    bigger[which] += more
    before, after = (
        step_estimate(
            shape_of(model, item), model=model, node=catalog.node(gpu), tp=1, calibration=with_curves(gpu, curves),
            async_scheduling=False,
        ).seconds
        for item in (load, (bigger[0], bigger[1], bigger[2], bigger[3]))
    )  # fmt: skip
    assert after >= before * (1 - 1e-12)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(MODELS), every_curve, st.lists(st.integers(0, 200_000), max_size=40), st.integers(0, 400),
       st.integers(0, 100_000), st.integers(1, 10**6))  # fmt: skip
def test_compiled_steps_and_jumps_follow_any_curve(
    name: str, curves: OperatorCurves, past: list[int], chunk: int, start: int, limit: int
) -> None:
    model, node, calibration = catalog.model(name), catalog.node("dgx-h100"), with_curves("h100-80gb-sxm", curves)
    steps = compile_steps(
        model=model, node=node, tp=2, calibration=calibration, max_num_batched_tokens=512, max_num_seqs=64,
        async_scheduling=False,
    )  # fmt: skip
    step = batch_shape(model, past, [(chunk, start)] if chunk else [])
    sums = [tuple(map(int, values)) for values in (step.decode_context, step.prefill_pairs, step.prefill_context)]
    longest = int(step.decode_longest), int(step.prefill_longest)
    took = steps.step_seconds(
        int(step.tokens), int(step.logits), len(past), sums[0], chunk, sums[1], sums[2], longest=longest
    )
    explained = step_estimate(step, model=model, node=node, tp=2, calibration=calibration, async_scheduling=False)
    assert took == pytest.approx(float(explained.seconds), rel=1e-11)
    if not past or len(attention_spans(model)) > 1:
        return
    run = steps.decode_run(len(past), sums[0], (len(past),), limit, longest=longest[0])
    for at in (0, run.max_steps // 2, run.max_steps - 1):
        alone = steps.step_seconds(
            len(past), len(past), len(past), (sums[0][0] + at * len(past),), 0, (0,), (0,), longest=(longest[0] + at, 0)
        )
        assert run.first_s + at * run.slope_s == pytest.approx(alone, rel=1e-11)


def measured(kind: str, stored: str, columns: dict[str, list[float]]) -> Rows:
    arrays = {name: np.array(values, dtype=np.float64) for name, values in columns.items()}
    first = next(iter(arrays.values()))
    return Rows("h100-80gb-sxm", "vllm", "1", kind, stored, "t", arrays, 0 * first + 1.0, named(first))


def without_cache(shape: Form) -> dict[str, float]:
    """Coefficients in the middle of their range, of a benchmark whose data never stay in the L2 cache."""
    values = {name: bounds[0] for name, bounds in shape.bounds.items()}
    return values | {"gain": 1e-12}


def seconds(op: Op, kind: str, curve: object, stored: str) -> float:
    curves = OperatorCurves.model_validate({kind: {stored: curve}})
    device: DeviceEfficiency = with_curves("h100-80gb-sxm", curves).device
    return float(op_estimate(op, catalog.accelerator("h100-80gb-sxm"), device, calibration_of(GPUS[0]).power).seconds)


CHIP, MODEL = "h100-80gb-sxm", "llama-3.1-8b-instruct"


@pytest.mark.parametrize("stored", ["bf16", "fp8"])
def test_the_fit_and_the_cost_model_agree_on_products(stored: str) -> None:
    m, n, k = 300.0, 6144.0, 4096.0
    rows = measured("gemm", stored, {"m": [m], "n": [n], "k": [k]})
    shape = form(rows)
    values = without_cache(shape)
    op = gemm(catalog.model(MODEL), "x", 1, m, n, k, weight_dtype=stored)
    predicted = shape.seconds(values, rows, catalog.accelerator(CHIP))[0]
    # Rows enter in the format of the product; the lowered op counts them as activations.
    assert seconds(op, "gemm", shape.curve(values), stored) == pytest.approx(
        predicted, rel=1e-9 if stored == "bf16" else 0.02
    )


@pytest.mark.parametrize("window", [0.0, 1024.0])
def test_the_fit_and_the_cost_model_agree_on_attention(window: float) -> None:
    heads, kv_heads, dim, batch, context, chip = 32.0, 8.0, 128.0, 24.0, 5000.0, catalog.accelerator(CHIP)
    moved = heads * dim * 2.0, heads * dim * 2.0
    for kind, new in (("decode", 1.0), ("prefill", 512.0)):
        columns = {
            "heads": heads, "tiles": kv_heads, "dim": dim, "window": window, "new": new, "sequences": batch,
            "context": context, "entry": 2 * kv_heads * dim, "query": 2 * heads * dim, "pair": 4 * heads * dim,
        }  # fmt: skip
        rows = measured(kind, "bf16", {name: [value] for name, value in columns.items()})
        shape = form(rows)
        values = without_cache(shape)
        attended = min(context, window or context)
        past = context - new
        pairs = sum(min(past + i + 1, window or context) for i in range(int(new)))
        step = StepShape(batch * new, batch, batch, (batch * attended,), batch * new, (batch * pairs,),
                         (batch * (new + min(past, (window or 1e9) - 1)),))  # fmt: skip
        ops = list(_attention_core(
            "bf16", 1, step, ((0, 1.0),), pair_flops=4 * heads * dim, decode_flops=4 * heads * dim,
            kv_entry=2 * kv_heads * dim * 2.0, prefill_bytes=moved, decode_bytes=moved,
            kernel=Kernel(heads, kv_heads, "bf16"),
        ))  # fmt: skip
        op = next(item for item in ops if item.kind.startswith(kind))
        predicted = shape.seconds(values, rows, chip)[0]
        assert seconds(op, kind, shape.curve(values), "bf16") == pytest.approx(predicted, rel=0.02)


@pytest.mark.parametrize("tokens", [1.0, 64.0, 4096.0])
@pytest.mark.parametrize(("name", "sizes"), [
    ("qwen3-30b-a3b", {"hidden": 2048, "inter": 768, "top": 8, "experts": 128}),
    ("nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", {"hidden": 2688, "inter": 1856, "top": 6, "experts": 128}),
])  # fmt: skip
def test_the_fit_and_the_cost_model_agree_on_experts(name: str, sizes: dict[str, int], tokens: float) -> None:
    """With a gate (three matrices) and without one (two)."""
    model = catalog.model(name)
    group = next(layers for layers in model.layers if isinstance(layers.mlp, MixtureOfExperts))
    step = StepShape(tokens, 0.0, 0.0, (0.0,), 0.0, (0.0,), (0.0,))
    columns = {**sizes, "ranks": 1, "tokens": tokens, "skew": 1.0}
    rows = measured("moe", "bf16", {name: [float(value)] for name, value in columns.items()})
    shape = form(rows)
    values = without_cache(shape)
    lowered = mlp_ops(model, group, step, tp=1, popularity=values["popularity"])
    op = next(item for item in lowered if isinstance(item, Op) and item.kind == "moe")
    curve = shape.curve(values)
    one_layer = seconds(op, "moe", curve, "bf16") / op.count
    assert one_layer == pytest.approx(shape.seconds(values, rows, catalog.accelerator(CHIP))[0], rel=0.01)


@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "all_to_all"])
@pytest.mark.parametrize("gpus", [2, 8])
def test_the_fit_and_the_cost_model_agree_on_collectives(kind: CollectiveKind, gpus: int) -> None:
    size = np.array([4096.0, 262144.0, 1e8])
    rows = measured("collective", kind, {"gpus": [gpus] * 3, "bytes": list(size)})
    shape = form(rows)
    values = {name: bounds[0] for name, bounds in shape.bounds.items()}
    families = sorted({name.partition(".")[0] for name in values})
    curves = OperatorCurves.model_validate(
        {"collective": {family: shape.curve(values, family=family) for family in families}}
    )
    estimate = collective_estimate(Collective(kind, kind, 1, size, gpus), fabric(catalog.node(CHIP)),
                                   with_curves(CHIP, curves).device)  # fmt: skip
    np.testing.assert_allclose(estimate.seconds, shape.seconds(values, rows, catalog.accelerator(CHIP)), rtol=1e-12)
