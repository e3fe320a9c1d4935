"""The compiled cost model is the explaining one: equal times for every step, and along every multi-step jump."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from batches import Chunks, batch_shape, decode_knots
from hypothesis import example, given, settings
from hypothesis import strategies as st

from perfsim.cost.step import step_estimate
from perfsim.cost.step_model import CompiledSteps, compile_steps
from perfsim.ops.step import StepShape, attention_spans
from perfsim.spec import catalog
from perfsim.spec.calibration import Calibration
from perfsim.spec.load import find_calibration

MODELS = (
    "llama-3.1-8b-instruct",
    "qwen3-30b-a3b",
    "deepseek-v2-lite",
    "deepseek-ai--DeepSeek-V3",
    "openai--gpt-oss-20b",
    "meta-llama--Llama-4-Scout-17B-16E-Instruct",
    "MiniMaxAI--MiniMax-M3",
    "deepseek-ai--DeepSeek-V3.2",
    "deepseek-ai--DeepSeek-V4-Flash",
    "google--gemma-4-26B-A4B",
    "moonshotai--Kimi-K3",
    "nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    "mistralai--Mamba-Codestral-7B-v0.1",
)
NODES = ("dgx-h100", "l40s-8x-pcie")  # switched NVLink, and a shared host path
MAX_TOKENS, MAX_SEQS = 2048, 256

# Bandwidth fractions that rise with the context, by less than the context does: time still grows.
RISING = ((64.0, 0.2), (256.0, 0.45), (1024.0, 0.62), (4096.0, 0.8), (65536.0, 0.9))
ONE_KNOT = ((128.0, 0.85),)
Case = tuple[str, str, int, tuple[tuple[float, float], ...], bool, float]

cases = st.tuples(
    st.sampled_from(MODELS), st.sampled_from(NODES), st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([RISING, ONE_KNOT]), st.booleans(), st.sampled_from([1e-3, 8e-3]),
)  # fmt: skip
pasts = st.lists(st.one_of(st.integers(0, 300), st.integers(0, 200_000)), max_size=64)
chunks = st.lists(st.tuples(st.integers(1, 400), st.integers(0, 100_000)), max_size=4)


@cache
def calibration_for(node: str, curve: tuple[tuple[float, float], ...], schedule: float) -> Calibration:
    """The packaged coefficients with another attention curve, and host times that every sum of the batch enters."""
    calibration = find_calibration(accelerator=catalog.node(node).accelerator.name, engine="vllm")
    device = decode_knots(calibration.device, curve)
    host = {"schedule_host": schedule, "sequence_host": 3e-6, "token_host": 2e-7}
    engine = calibration.engine.model_copy(update=host)
    return calibration.model_copy(update={"device": device, "engine": engine})


@cache
def compiled(case: Case) -> CompiledSteps:
    name, node, tp, curve, lag, schedule = case
    return compile_steps(
        model=catalog.model(name), node=catalog.node(node), tp=tp, calibration=calibration_for(node, curve, schedule),
        max_num_batched_tokens=MAX_TOKENS, max_num_seqs=MAX_SEQS, async_scheduling=lag,
    )  # fmt: skip


def explained(case: Case, step: StepShape) -> float:
    name, node, tp, curve, lag, schedule = case
    estimate = step_estimate(
        step, model=catalog.model(name), node=catalog.node(node), tp=tp,
        calibration=calibration_for(node, curve, schedule), async_scheduling=lag,
    )  # fmt: skip
    return float(estimate.seconds)


def simulated(case: Case, step: StepShape) -> float:
    """The same step as the engine asks for it, in whole numbers."""
    whole = [
        tuple(int(value) for value in sums) for sums in (step.decode_context, step.prefill_pairs, step.prefill_context)
    ]
    return compiled(case).step_seconds(
        int(step.tokens), int(step.logits), int(step.decode_sequences), whole[0], int(step.prefill_tokens), *whole[1:],
        longest=(int(step.decode_longest), int(step.prefill_longest)),
    )  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(cases, pasts, chunks)
def test_compiled_and_explained_steps_last_equally_long(case: Case, past: list[int], prefill: Chunks) -> None:
    step = batch_shape(catalog.model(case[0]), past, prefill)
    assert simulated(case, step) == pytest.approx(explained(case, step), rel=1e-12, abs=0)


def decode_sums(name: str, past: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(attended tokens, their growth per step), each per window."""
    spans = attention_spans(catalog.model(name))
    context = tuple(sum(span.attended(tokens) for tokens in past) for span in spans)
    grown = tuple(sum(span.attended(tokens + 1) for tokens in past) for span in spans)
    growth = [after - before for after, before in zip(grown, context, strict=True)]
    # Where a chunk ends the next step drops; up to there every sequence grows.
    return context, tuple(len(past) if span.kind == "chunk" else more for span, more in zip(spans, growth, strict=True))


def window_steps(name: str, past: list[int], limit: int) -> int:
    """Steps until a window fills or a chunk begins; the engine never asks for more, as the growth changes there."""
    for span in attention_spans(catalog.model(name)):
        if span.kind == "chunk":
            left = [span.size - tokens % span.size for tokens in past]
        else:
            left = [span.size - tokens - 1 for tokens in past if tokens + 1 < span.size]
        limit = min([limit, *left])
    return limit


def seconds_at(case: Case, decodes: int, context: tuple[int, ...], growth: tuple[int, ...], step: int) -> float:
    zeros = (0,) * len(context)
    grown = tuple(start + step * more for start, more in zip(context, growth, strict=True))
    return compiled(case).step_seconds(decodes, decodes, decodes, grown, 0, zeros, zeros)


@settings(max_examples=300, deadline=None)
@given(cases, pasts.filter(bool), st.integers(1, 200_000))
def test_every_step_of_a_run_lasts_what_it_would_alone(case: Case, past: list[int], limit: int) -> None:
    context, growth = decode_sums(case[0], past)
    limit = window_steps(case[0], past, limit)
    run = compiled(case).decode_run(len(past), context, growth, limit)
    assert 1 <= run.max_steps <= limit
    last = run.max_steps - 1
    for step in {0, 1, 2, last // 3, last // 2, last - 1, last}:
        if 0 <= step <= last:
            alone = seconds_at(case, len(past), context, growth, step)
            assert run.first_s + step * run.slope_s == pytest.approx(alone, rel=1e-12, abs=0)


@settings(max_examples=60, deadline=None)
@given(cases, st.lists(st.integers(0, 5000), min_size=1, max_size=16))
def test_few_runs_cover_a_long_decode(case: Case, past: list[int]) -> None:
    """Runs end where the time has a kink and nowhere else: the knots of each curve, and the crossover."""
    total, done, runs = 100_000, 0, 0
    total = window_steps(case[0], past, total)
    context, growth = decode_sums(case[0], past)
    while done < total:
        grown = tuple(start + done * more for start, more in zip(context, growth, strict=True))
        run = compiled(case).decode_run(len(past), grown, growth, total - done)
        alone = seconds_at(case, len(past), context, growth, done + run.max_steps - 1)
        assert run.first_s + (run.max_steps - 1) * run.slope_s == pytest.approx(alone, rel=1e-12, abs=0)
        done += run.max_steps
        runs += 1
    assert done == total
    kinks = len(case[3]) * len({term.mix for term in compiled(case).decode}) + case[4]
    # A kink between two steps can end a run of one step more.
    assert runs <= 2 * kinks + 1


def test_a_run_ends_at_the_knot() -> None:
    case: Case = ("llama-3.1-8b-instruct", "dgx-h100", 1, RISING, False, 1e-3)
    # Ten sequences of 1,000 tokens reach the knot at 1,024 after 24 steps; step 24 is the last of the old slope.
    run = compiled(case).decode_run(10, (10_000,), (10,), 10_000)
    assert run.max_steps == 25
    after = compiled(case).decode_run(10, (10_250,), (10,), 10_000)
    assert after.slope_s != pytest.approx(run.slope_s, rel=0.01)
    beyond = run.first_s + 25 * run.slope_s
    assert seconds_at(case, 10, (10_000,), (10,), 25) != pytest.approx(beyond, rel=1e-9)
    assert compiled(case).decode_run(10, (10_000,), (10,), 7).max_steps == 7


def test_a_run_ends_where_the_gpu_overtakes_the_scheduler() -> None:
    case: Case = ("llama-3.1-8b-instruct", "dgx-h100", 1, ONE_KNOT, True, 2e-2)
    context = (64 * 256,)
    run = compiled(case).decode_run(64, context, (64,), 100_000)
    assert run.slope_s == 0.0
    assert 1 < run.max_steps < 100_000
    last, following = (seconds_at(case, 64, context, (64,), run.max_steps - back) for back in (1, 0))
    assert run.first_s == pytest.approx(last, rel=1e-12, abs=0)
    assert following > run.first_s * (1 + 1e-9)
    after = (context[0] + 64 * run.max_steps,)
    overtaken = compiled(case).decode_run(64, after, (64,), 100_000)
    assert overtaken.slope_s > 0.0
    assert overtaken.max_steps == 100_000
    assert overtaken.first_s == pytest.approx(run.first_s, rel=1e-3)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 20_000), st.floats(0.05, 1)), min_size=2, max_size=5, unique_by=lambda k: k[0]),
    st.integers(1, 64), st.integers(1, 20_000), st.sampled_from([0.0, 4e-3, 8e-3, 2e-2]),
)  # fmt: skip
@example([(1000, 0.05), (2000, 1.0)], 64, 1000, 2e-2)
def test_runs_are_exact_on_any_curve_that_loads(
    curve: list[tuple[int, float]], decodes: int, context: int, schedule: float
) -> None:
    knots = tuple((float(at), fraction) for at, fraction in sorted(curve))
    name, node = "llama-3.1-8b-instruct", "dgx-h100"
    steps = compile_steps(
        model=catalog.model(name), node=catalog.node(node), tp=1, calibration=calibration_for(node, knots, schedule),
        max_num_batched_tokens=64, max_num_seqs=64, async_scheduling=True,
    )  # fmt: skip
    start = decodes * context
    run = steps.decode_run(decodes, (start,), (decodes,), 50_000)
    for step in (0, run.max_steps // 2, run.max_steps - 1):
        alone = steps.step_seconds(decodes, decodes, decodes, (start + step * decodes,), 0, (0,), (0,))
        assert run.first_s + step * run.slope_s == pytest.approx(alone, rel=1e-12, abs=0)


@pytest.mark.parametrize("lag", [False, True])
def test_the_gpu_waits_for_the_host_time_of_sequences_and_hides_that_of_tokens(lag: bool) -> None:
    model, node = catalog.model("llama-3.1-8b"), catalog.node("h100-80gb-sxm")
    packaged = find_calibration(accelerator=node.accelerator.name, engine="vllm")

    def seconds(**host: float) -> tuple[float, float]:
        calibration = packaged.model_copy(update={"engine": packaged.engine.model_copy(update=host)})
        steps = compile_steps(
            model=model, node=node, tp=1, calibration=calibration, max_num_batched_tokens=64, max_num_seqs=64,
            async_scheduling=lag,
        )  # fmt: skip
        context = (64_000,)
        return (
            steps.decode_run(64, context, (64,), 1).first_s,
            steps.step_seconds(64, 64, 64, context, 0, (0,), (0,)),
        )

    plain = seconds(schedule_host=0.0)
    np.testing.assert_allclose(seconds(schedule_host=0.0, sequence_host=1e-5), np.add(plain, 64e-5), rtol=1e-9)
    hidden = 0.0 if lag else 64e-6
    np.testing.assert_allclose(seconds(schedule_host=0.0, token_host=1e-6), np.add(plain, hidden), rtol=1e-9)
