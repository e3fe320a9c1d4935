"""Multi-LoRA: both engines skip and admit alike, adapters cost what they read and compute, slots are reloaded."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fast_forward import BLOCK, Log, tiny_model

from perfsim.cost.adapters import adapter_load_seconds
from perfsim.cost.step import step_estimate
from perfsim.cost.step_model import compile_steps
from perfsim.errors import InputError
from perfsim.ops.lora import adapter_bytes, lora_ops
from perfsim.ops.step import StepShape, attention_spans
from perfsim.run import estimate, simulate
from perfsim.serving.adapters import AdapterSlots
from perfsim.serving.check import Ledger, check_conservation
from perfsim.serving.driver import run_open_loop
from perfsim.serving.engine import Engine, EngineConfig
from perfsim.serving.recorder import Recorder
from perfsim.serving.stepwise import StepwiseEngine
from perfsim.spec import catalog
from perfsim.spec.load import find_calibration
from perfsim.spec.policy import LoraServing, ServingPolicy, SpeculativeDecoding
from perfsim.spec.scenario import Scenario
from perfsim.traffic import RequestChunk

NODE = catalog.node("dgx-h100")
CALIBRATION = find_calibration(accelerator="h100-80gb-sxm", engine="vllm")
LORA = LoraServing(num_adapters=8, max_loras=2, max_lora_rank=16)


class LoraLog(Log):
    """Per step also the tokens with an adapter, the distinct adapters and the loading time."""

    def __init__(self) -> None:
        super().__init__()
        self.adapted: list[np.ndarray] = []

    def add_segments(self, columns) -> None:
        super().add_segments(columns)
        counts = columns["steps"].astype(int)
        rows = np.stack([columns[name] for name in ("lora_tokens", "lora_adapters", "load_s")], axis=1)
        self.adapted.append(np.repeat(rows, counts, axis=0))


def run(kind: str, engine_type, config: EngineConfig, chunk: RequestChunk):
    model = tiny_model(kind)
    spans = attention_spans(model)
    speculative = None
    if config.acceptance:
        speculative = SpeculativeDecoding(
            method="ngram", num_speculative_tokens=len(config.acceptance), acceptance=config.acceptance
        )
    policy = ServingPolicy(lora=LORA, speculative=speculative)
    steps = compile_steps(
        model=model, node=NODE, tp=2, calibration=CALIBRATION, async_scheduling=config.async_scheduling,
        max_num_batched_tokens=config.max_num_batched_tokens, max_num_seqs=config.max_num_seqs, policy=policy,
    )  # fmt: skip
    log, ledger = LoraLog(), Ledger()
    recorder = Recorder((log, ledger), windows=len(spans), chunk=64)
    engine = engine_type(config=config, steps=steps, recorder=recorder, windows=spans)
    sent = run_open_loop(engine, [chunk], ingress=0.002, block_size=BLOCK)
    recorder.flush()
    check_conservation(engine, ledger, sent=sent)
    return log, recorder, engine


@st.composite
def scenarios(draw):
    count = draw(st.integers(1, 30))
    gaps = draw(st.lists(st.floats(0.0, 0.06), min_size=count, max_size=count))
    arrivals = np.floor(np.cumsum(gaps) / 0.02) * 0.02
    prompts = np.array(draw(st.lists(st.integers(1, 300), min_size=count, max_size=count)))
    outputs = np.array(draw(st.lists(st.integers(1, 90), min_size=count, max_size=count)))
    adapters = np.array(draw(st.lists(st.integers(-1, 4), min_size=count, max_size=count)))
    branch = draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    hashes = None
    if draw(st.booleans()):
        hashes = [[b * 100 + i for i in range(-(-int(p) // 64))] for b, p in zip(branch, prompts, strict=True)]
    by_priority = draw(st.booleans())
    priority = np.array(draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))) if by_priority else None
    chunk = RequestChunk(
        arrivals, prompts, outputs, priority, hashes, 64 if hashes else 0, adapter=adapters
    )  # fmt: skip
    seqs = draw(st.integers(1, 24))
    config = EngineConfig(
        max_num_batched_tokens=draw(st.integers(max(seqs, 8), 200)),
        max_num_seqs=seqs,
        max_model_len=4096,
        block_size=BLOCK,
        total_blocks=draw(st.integers(30, 110)),
        priority=by_priority,
        prefix_caching=draw(st.booleans()),
        long_prefill_token_threshold=draw(st.sampled_from([0, 0, 24])),
        async_scheduling=draw(st.booleans()),
        reserve_full_isl=draw(st.booleans()),
        max_loras=draw(st.integers(1, 3)),
        adapter_load=draw(st.sampled_from([0.0, 0.003])),
        acceptance=draw(st.sampled_from([(), (), (0.8, 0.4)])),
    )
    return draw(st.sampled_from(("gqa", "windowed"))), config, chunk


@settings(max_examples=150, deadline=None)
@given(scenarios())
def test_fast_equals_stepwise(scenario) -> None:
    """With preemption, prefix hits per adapter, drafts and loading; never more adapters in a step than allowed."""
    kind, config, chunk = scenario
    fast, fast_recorder, engine = run(kind, Engine, config, chunk)
    slow, slow_recorder, other = run(kind, StepwiseEngine, config, chunk)
    assert fast_recorder.steps == slow_recorder.steps
    assert engine.slots.loads == other.slots.loads
    if fast.requests:
        np.testing.assert_allclose(sorted(fast.requests), sorted(slow.requests), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(np.concatenate(fast.steps), np.concatenate(slow.steps), rtol=1e-9, atol=1e-12)
        ours, theirs = (np.concatenate(log.adapted) for log in (fast, slow))
        np.testing.assert_allclose(ours, theirs, rtol=1e-9)
        assert ours[:, 1].max() <= config.max_loras
    np.testing.assert_allclose(sorted(fast.gaps), sorted(slow.gaps), rtol=1e-9, atol=1e-9)


CONFIG = EngineConfig(
    max_num_batched_tokens=256, max_num_seqs=8, max_model_len=4096, block_size=BLOCK, total_blocks=400,
    async_scheduling=False, max_loras=1, adapter_load=0.01,
)  # fmt: skip


def test_a_request_whose_adapter_does_not_fit_is_passed() -> None:
    """Adapters 0, 1, 0, none arrive at once and one fits: the last two overtake the second, which waits."""
    chunk = RequestChunk(np.zeros(4), np.full(4, 50), np.full(4, 40), adapter=np.array([0, 1, 0, -1]))
    for kind in (Engine, StepwiseEngine):
        log, _, _ = run("gqa", kind, CONFIG, chunk)
        started = sorted(log.requests, key=lambda row: row[_column("request_index")])
        first = [row[_column("first_token_s")] for row in started]
        finish = [row[_column("finish_s")] for row in started]
        assert first[0] == first[2] == first[3]
        assert first[1] > finish[0]
        assert np.concatenate(log.adapted)[:, 1].max() == 1


def _column(name: str) -> int:
    from perfsim.serving.recorder import REQUEST_COLUMNS

    return sorted(REQUEST_COLUMNS).index(name)


def test_adapters_never_share_a_prefix() -> None:
    """Three equal prompts in turn, two of them under one adapter: only its second request finds anything."""
    chunk = RequestChunk(
        np.array([0.0, 5.0, 10.0]), np.full(3, 128), np.full(3, 4), None, [[1, 2]] * 3, 64, adapter=np.array([0, -1, 0])
    )
    log, _, engine = run("gqa", Engine, replace(CONFIG, prefix_caching=True), chunk)
    cached = [row[_column("cached_tokens")] for row in sorted(log.requests, key=lambda row: row[_column("arrival_s")])]
    assert cached == [0, 0, 112]
    assert engine.slots.loads == 1


def test_slots_drop_the_least_recently_used() -> None:
    slots = AdapterSlots(2, load_s=0.5)
    assert slots.use({1, 2}) == 1.0
    assert slots.use({1}) == 0.0
    assert slots.use({3}) == 0.5  # in place of 2
    assert slots.use({1}) == 0.0
    assert slots.use({2, 3}) == 0.5  # 3 stays, because the step needs it
    assert slots.loads == 4


def test_a_step_waits_for_its_adapter() -> None:
    chunk = RequestChunk(np.zeros(1), np.array([50]), np.array([20]), adapter=np.array([3]))
    log, _, _ = run("gqa", Engine, CONFIG, chunk)
    quick, _, _ = run("gqa", Engine, replace(CONFIG, adapter_load=0.0), chunk)
    seconds, faster = (np.concatenate(log.steps)[:, 0] for log in (log, quick))
    np.testing.assert_allclose(seconds - faster, [0.01] + [0.0] * 19, atol=1e-12)


def test_kernels_read_each_adapter_once_and_compute_for_every_token() -> None:
    model = tiny_model("gqa")
    hidden, qkv, width, layers = 512, 8 * 64 + 2 * 2 * 64, 2048, 24
    shape = StepShape(64.0, 4.0, 4.0, (100.0,), 60.0, (9.0,), (9.0,), lora_tokens=50.0, lora_adapters=3.0)
    ops = list(lora_ops(model, shape, LORA, tp=1))
    weights = layers * 16 * ((3 + 1 + 2) * hidden + width + hidden * 2 + qkv + 2 * width)
    # 3 A's for q, k, v, one for o (512 = 8 heads of 64 inputs), 2 for gate and up, one for down; a B for each output.
    assert adapter_bytes(model, LORA, tp=1) == 2 * weights
    assert sum(op.count * op.flops for op in ops) == pytest.approx(2 * 50 * weights)
    none = StepShape(64.0, 4.0, 4.0, (100.0,), 60.0, (9.0,), (9.0,), lora_tokens=50.0, lora_adapters=0.0)
    read, without = (sum(op.count * op.read_bytes for op in lora_ops(model, s, LORA, tp=1)) for s in (shape, none))
    assert read - without == pytest.approx(3 * 2 * weights)


def test_compiled_equals_explained() -> None:
    model, policy = tiny_model("windowed"), ServingPolicy(lora=LORA)
    steps = compile_steps(
        model=model, node=NODE, tp=2, calibration=CALIBRATION, async_scheduling=False, max_num_batched_tokens=512,
        max_num_seqs=64, policy=policy,
    )  # fmt: skip
    for lora in ((0, 0), (1, 1), (40, 2), (400, 1)):
        shape = StepShape(
            409.0, 11.0, 9.0, (3000.0, 300.0), 400.0, (9000.0, 8000.0), (500.0, 400.0), lora_tokens=lora[0],
            lora_adapters=lora[1],
        )  # fmt: skip
        explained = step_estimate(
            shape, model=model, node=NODE, tp=2, calibration=CALIBRATION, async_scheduling=False, policy=policy
        )
        quick = steps.step_seconds(409, 11, 9, (3000, 300), 400, (9000, 8000), (500, 400), lora)
        assert quick == pytest.approx(float(explained.seconds), rel=1e-12)
        assert (explained.d_seconds["lora"] > 0) == (lora[1] > 0)


def scenario(**changes) -> Scenario:
    return Scenario.load("default").replace(**changes)


SERVED = {"num_adapters": 20, "max_loras": 4, "max_lora_rank": 16}


def test_simulation_with_adapters() -> None:
    """`simulate` itself checks that explained and simulated step times agree, and that the books balance."""
    adapted = scenario(**{"policy.lora": SERVED})
    result, plain = simulate(adapted), simulate(scenario())
    assert result.to_json() == simulate(adapted).to_json()
    assert result.breakdown["lora"] > 0.0
    assert result.breakdown["adapter_loading"] > 0.0
    slots = 4 * adapter_bytes(adapted.model, adapted.policy.lora, tp=1)
    assert result.memory["weights"] - plain.memory["weights"] == pytest.approx(slots)
    assert result.value("ttft.mean") > plain.value("ttft.mean")
    load = adapter_load_seconds(adapted.model, adapted.policy.lora, adapted.hardware, tp=1)
    assert load > adapter_bytes(adapted.model, adapted.policy.lora, tp=1) / adapted.hardware.host_link.bandwidth


def test_what_cannot_be_is_refused_in_one_line() -> None:
    with pytest.raises(InputError, match="an estimate knows no adapters"):
        estimate(scenario(**{"policy.lora": SERVED}))
    with pytest.raises(InputError, match="max_cpu_loras"):
        simulate(scenario(**{"policy.lora": SERVED | {"max_cpu_loras": 5}}))
