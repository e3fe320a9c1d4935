"""Steps on kernels that read a context on one SM: the longest context, tiles, decodes that ride along."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_run import synthetic

from perfsim.calibrate.mixed_file import with_section
from perfsim.cost.mixed import MixedKernel, plain_beside, plain_prompts
from perfsim.cost.roofline import op_estimate
from perfsim.ops.op import Beside, Op
from perfsim.ops.step import StepShape
from perfsim.ops.transformer import lower
from perfsim.run import simulate
from perfsim.serving.batch import DecodeBatch
from perfsim.serving.request import Request
from perfsim.spec import catalog
from perfsim.spec.load import find_calibration
from perfsim.spec.operators_file import FOLDER
from perfsim.spec.yaml import load_yaml
from validation.ops.predict import CALIBRATION

CARD = "rtx-pro-6000-blackwell-96gb"
MODEL = catalog.model("llama-3.1-8b-instruct")  # 32 query and 8 K/V heads


def attention(decodes: float, context: float, chunk: float = 0.0, past: float = 0.0, longest: float = 0.0) -> float:
    """Seconds of one step's attention."""
    calibration, chip = find_calibration(accelerator=CARD, engine="vllm"), catalog.accelerator(CARD)
    step = StepShape(
        decodes + chunk, decodes + bool(chunk), decodes, (decodes * context,), chunk,
        (chunk * past + chunk * (chunk + 1) / 2,), (chunk and chunk + past,), decode_longest=longest,
        prefill_longest=chunk and chunk + past,
    )  # fmt: skip
    ops = [op for op in lower(MODEL, step, tp=1) if isinstance(op, Op) and op.kind.endswith("attention")]
    return sum(float(op_estimate(op, chip, calibration.device, calibration.power).seconds) for op in ops)


def test_a_long_context_takes_one_sm_whatever_else_there_is() -> None:
    """LLMServingSim's profiler on this card: 369, 370 and 700 us per layer for 16, 128 and 512 tokens after 16,384.

    The model adds the time of reading K and V (37 us), which the kernel overlaps.
    """
    few, tile, many = (attention(0, 0, chunk, 16384) / 32 for chunk in (16, 128, 512))
    assert tile == pytest.approx(few, rel=0.02)
    assert 369e-6 < few < (369 + 37) * 1e-6
    assert many > 1.3 * tile


def test_few_decodes_ride_for_free_beside_a_long_chunk() -> None:
    """There, 8 decodes of 1,024 tokens add less than a tenth to the chunk (364 us); alone they take 37 us."""
    chunk, both = attention(0, 0, 16, 16384), attention(8, 1024, 16, 16384)
    assert chunk < both < 1.1 * chunk
    assert attention(128, 1024, 16, 0) > 1.4 * attention(128, 1024)  # 672 and 405 us


def test_decodes_wait_for_the_longest_once_contexts_are_not_split() -> None:
    """There, 32 decodes wait for none, 64 wait 15 us longer for 1,500 entries more than the mean."""
    assert attention(32, 1024, longest=8000) == attention(32, 1024)
    waits = [(attention(64, 1024, longest=1024.0 + more) - attention(64, 1024)) / 32 for more in (0, 1500, 3000)]
    assert waits[0] == 0
    assert 10e-6 < waits[1] < 30e-6
    assert waits[2] == pytest.approx(2 * waits[1])


def test_fast_and_stepwise_agree_where_the_longest_counts() -> None:
    scenario = synthetic(160, 40, 900, 60, hardware="rtx-pro-6000")
    fast, slow = simulate(scenario), simulate(scenario, stepwise=True)
    assert fast.simulation["steps"] == slow.simulation["steps"]
    for path in ("ttft.mean", "tpot.mean", "e2e.p99", "makespan_s"):
        assert slow.value(path) == pytest.approx(fast.value(path), rel=1e-9), path


def test_a_section_takes_the_place_of_the_one_before_and_of_nothing_else(tmp_path: Path) -> None:
    path, other = CALIBRATION / FOLDER / f"{CARD}.yaml", tmp_path / "other.yaml"
    text = path.read_text(encoding="utf-8")
    other.write_text(with_section(text, ["    mixed: {}"]), encoding="utf-8")
    before, after = load_yaml(path), load_yaml(other)
    assert before["backends"]["vllm"].pop("mixed")
    assert after["backends"]["vllm"].pop("mixed") == {}
    assert before == after
    assert with_section(text, ["    mixed: {}"]).count("# mixed:") == text.count("# mixed:") == 1


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_longest_of_a_batch_is_that_of_its_sequences(seed: int) -> None:
    draw, batch = np.random.default_rng(seed), DecodeBatch(block_size=16, windows=())
    running: list[Request] = []
    for order in range(300):
        if running and draw.random() < 0.45:
            gone = running.pop(int(draw.integers(len(running))))
            batch.leave(gone)
        else:
            request = Request(order, 0.0, 0.0, int(draw.integers(1, 5000)), 1 << 20)
            request.computed, request.order = request.prompt, order
            batch.join(request)
            running.append(request)
        if running:
            batch.advance(int(draw.integers(0, 30)))
        assert batch.longest == max((batch.computed(request) + 1 for request in running), default=0)


RATES = st.floats(1e-12, 1e-3)
FACTORS = st.just(0.0) | RATES
KERNELS = st.builds(
    MixedKernel, launch=FACTORS, per_pair=RATES, per_token=FACTORS, critical=FACTORS, serial=RATES,
    tail=st.floats(0, 2), entry=RATES, sequence=FACTORS, empty=FACTORS, read=RATES, read_sequence=FACTORS,
    arithmetic=FACTORS, waves=st.floats(1e-3, 1), rereads=st.sampled_from([0.0, 3.0, 7.0]), rows=st.just(64.0),
    held=st.just(float("inf")) | st.floats(1e-9, 1e-3), last=FACTORS, unsplit=st.floats(1, 1000),
)  # fmt: skip
SHAPES = st.tuples(*[st.integers(1, 10**top) for top in (3, 6, 6, 5, 9, 6, 6)])


@given(KERNELS, st.lists(SHAPES, min_size=1, max_size=8))
def test_plain_numbers_cost_what_arrays_do(kernel: MixedKernel, shapes: list[tuple[int, ...]]) -> None:
    decodes, attended, context, tokens, pairs, entries, longest = np.array(shapes, float).T
    prompts = Beside(tokens, pairs, entries, longest, 0.0)
    added, shared = kernel.decodes(decodes, attended, context, prompts), kernel.shared(prompts)
    beside, alone = plain_beside(kernel), plain_prompts(kernel)
    for row, shape in enumerate(shapes):
        close = 1e-12 * float(shared[row])  # what is added may be the difference of two long times
        assert beside(*shape) == pytest.approx((added[row], shared[row]), rel=1e-12, abs=close), shape
        whole = alone(shape[3], shape[4], shape[6])
        assert whole == pytest.approx(kernel.prompts(tokens, pairs, longest)[row], rel=1e-12), shape
