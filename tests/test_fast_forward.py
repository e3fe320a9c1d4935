"""The law the engine stands on: jumping over steps gives the schedule and the times of doing every step."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from batches import decode_knots
from hypothesis import given, settings
from hypothesis import strategies as st

from perfsim.cost.step_model import compile_steps
from perfsim.ops.step import attention_spans
from perfsim.serving.check import Ledger, check_conservation
from perfsim.serving.driver import ClosedLoop, run_open_loop
from perfsim.serving.engine import Engine, EngineConfig
from perfsim.serving.recorder import Recorder
from perfsim.serving.stepwise import StepwiseEngine
from perfsim.spec import catalog
from perfsim.spec.load import find_calibration
from perfsim.spec.model import (
    CompressedAttention,
    DenseMLP,
    GroupedQueryAttention,
    LayerGroup,
    LinearAttention,
    Mamba2,
    ModelArch,
    MultiHeadLatentAttention,
    SparseIndexer,
)
from perfsim.traffic import ClosedLoopSource, RequestChunk

BLOCK = 16
KINDS = ("gqa", "mla", "windowed", "chunked", "sparse", "compressed", "hybrid", "recurrent")


def tiny_model(kind: str) -> ModelArch:
    gqa = GroupedQueryAttention(num_attention_heads=8, num_key_value_heads=2, head_dim=64)
    mla = MultiHeadLatentAttention(
        num_attention_heads=8,
        q_lora_rank=None,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
    )
    mlp = DenseMLP(intermediate_size=2048)
    indexer = SparseIndexer(num_heads=4, head_dim=32, top_k=60)
    compressed = CompressedAttention(
        num_attention_heads=8, head_dim=64, qk_rope_head_dim=16, q_lora_rank=128, o_lora_rank=64, o_groups=2, window=40
    )
    linear = LinearAttention(
        num_key_heads=4, num_value_heads=8, key_head_dim=64, value_head_dim=64, conv_kernel=4, gate_rank=32
    )
    mamba = Mamba2(num_heads=16, head_dim=64, n_groups=2, state_size=64, conv_kernel=4)
    layers = {
        "gqa": (LayerGroup(count=24, attention=gqa, mlp=mlp),),
        "mla": (LayerGroup(count=24, attention=mla, mlp=mlp),),
        "windowed": (
            LayerGroup(count=12, attention=gqa, mlp=mlp),
            LayerGroup(count=12, attention=gqa.model_copy(update={"window": 40}), mlp=mlp),
        ),
        "chunked": (
            LayerGroup(count=6, attention=gqa, mlp=mlp),
            LayerGroup(count=18, attention=gqa.model_copy(update={"chunk": 48}), mlp=mlp),
        ),
        "sparse": (
            LayerGroup(count=12, attention=mla.model_copy(update={"indexer": indexer}), mlp=mlp),
            LayerGroup(
                count=12,
                attention=mla.model_copy(update={"indexer": indexer.model_copy(update={"shared": True})}),
                mlp=mlp,
            ),
        ),
        "compressed": (
            LayerGroup(count=4, attention=compressed, mlp=mlp),
            LayerGroup(count=10, attention=compressed.model_copy(update={"compress_ratio": 16}), mlp=mlp),
            LayerGroup(
                count=10,
                attention=compressed.model_copy(
                    update={"compress_ratio": 4, "indexer": indexer.model_copy(update={"top_k": 15})}
                ),
                mlp=mlp,
            ),
        ),
        "hybrid": (
            LayerGroup(count=6, attention=gqa, mlp=None),
            LayerGroup(count=18, attention=linear, mlp=mlp),
            LayerGroup(count=6, attention=None, mlp=mlp),
        ),
        "recurrent": (LayerGroup(count=24, attention=mamba, mlp=None),),
    }[kind]
    return ModelArch(
        name=kind, architecture="test", hidden_size=512, vocab_size=32000, layers=layers, max_position_embeddings=4096
    )


def compiled(kind: str, config: EngineConfig):
    """Step costs with breakpoints everywhere: uneven attention knots, a scheduler about as slow as the GPU."""
    calibration = find_calibration(accelerator="h100-80gb-sxm", engine="vllm")
    knots = ((32.0, 0.2), (64.0, 0.5), (128.0, 0.3), (512.0, 0.9))
    device = decode_knots(calibration.device, knots)
    engine = calibration.engine.model_copy(update={"schedule_host": 1.6e-3, "sequence_host": 1e-6})
    return compile_steps(
        model=tiny_model(kind), node=catalog.node("h100-80gb-sxm"), tp=1,
        calibration=calibration.model_copy(update={"device": device, "engine": engine}),
        max_num_batched_tokens=config.max_num_batched_tokens, max_num_seqs=config.max_num_seqs,
        async_scheduling=config.async_scheduling,
    )  # fmt: skip


@dataclass
class Log:
    """A sink that keeps everything, segments written out: one row per step, one inter-token gap per token."""

    requests: list[tuple[float, ...]] = field(default_factory=list)
    steps: list[np.ndarray] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    def add_requests(self, columns) -> None:
        self.requests += zip(*(columns[name].tolist() for name in sorted(columns)), strict=True)

    def add_gaps(self, seconds, weights) -> None:
        self.gaps += seconds.tolist()

    def add_segments(self, columns) -> None:
        counts = columns["steps"].astype(int)
        index = np.concatenate([np.arange(count) for count in counts])
        rows = {name: np.repeat(values, counts) for name, values in columns.items()}
        rows["first_s"] = rows["first_s"] + index * rows["slope_s"]
        for name in [name for name in rows if name.startswith("decode_context")]:
            rows[name] = rows[name] + index * rows[name.replace("context", "growth")]
        sums = [name for name in rows if name.startswith(("decode_context", "prefill_pairs", "prefill_context"))]
        kept = ("first_s", "tokens", "logits", "decode_sequences", "emitted", "prefill_tokens", "running", *sums)
        self.gaps += np.repeat(rows["first_s"], rows["gap_sequences"].astype(int)).tolist()
        self.steps.append(np.stack([rows[name] for name in kept], axis=1))


def run(kind: str, engine_type, config: EngineConfig, chunk: RequestChunk, clients: int, think: float):
    model = tiny_model(kind)
    log, ledger = Log(), Ledger()
    recorder = Recorder((log, ledger), windows=len(attention_spans(model)), chunk=64)
    loop = ClosedLoop(ClosedLoopSource(iter([chunk]), clients, think), ingress=0.002, egress=0.001, block_size=BLOCK)
    engine = engine_type(
        config=config, steps=compiled(kind, config), recorder=recorder, windows=attention_spans(model),
        on_finish=loop.on_finish if clients else None,
    )  # fmt: skip
    if clients:
        sent = loop.run(engine)
    else:
        sent = run_open_loop(engine, [chunk], ingress=0.002, block_size=BLOCK)
    recorder.flush()
    check_conservation(engine, ledger, sent=sent)
    return log, recorder


@st.composite
def scenarios(draw):
    count = draw(st.integers(1, 40))
    quantum = draw(st.sampled_from([0.0, 0.001, 0.05, 0.5]))
    gaps = draw(st.lists(st.floats(0.0, 0.08), min_size=count, max_size=count))
    arrivals = np.cumsum(gaps)
    if quantum:
        arrivals = np.floor(arrivals / quantum) * quantum
    prompts = np.array(draw(st.lists(st.integers(1, 400), min_size=count, max_size=count)))
    outputs = np.array(draw(st.lists(st.integers(1, 120), min_size=count, max_size=count)))
    hashes = None
    if draw(st.booleans()):  # prompts are paths in a small tree: id = (depth, branch)
        branch = draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
        hashes = [[b * 100 + i for i in range(-(-int(p) // 64))] for b, p in zip(branch, prompts, strict=True)]
    priority = None
    by_priority = draw(st.booleans())
    if by_priority:
        priority = np.array(draw(st.lists(st.integers(0, 2), min_size=count, max_size=count)))
    chunk = RequestChunk(arrivals, prompts, outputs, priority, hashes, 64 if hashes else 0)
    seqs = draw(st.integers(1, 24))
    mixed = draw(st.booleans())
    config = EngineConfig(
        max_num_batched_tokens=draw(st.integers(max(seqs, 8), 256)),
        max_num_seqs=seqs,
        max_model_len=4096,
        block_size=BLOCK,
        total_blocks=draw(st.integers(34, 120)),
        window_blocks=draw(st.sampled_from([0, 0, 2])),
        span_blocks=draw(st.sampled_from([(), (), ((4, 1),), ((2, 1), (9, 2))])),
        priority=by_priority,
        prefix_caching=draw(st.booleans()),
        mixed_steps=mixed,
        long_prefill_token_threshold=draw(st.sampled_from([0, 0, 24])) if mixed else 0,
        async_scheduling=draw(st.booleans()),
        reserve_full_isl=draw(st.booleans()),
        watermark_blocks=draw(st.sampled_from([0, 3])),
    )
    clients = draw(st.sampled_from([0, 0, 1, 5]))
    return draw(st.sampled_from(KINDS)), config, chunk, clients, draw(st.sampled_from([0.0, 0.03]))


@settings(max_examples=400, deadline=None)
@given(scenarios())
def test_fast_forward_equals_stepwise(scenario) -> None:
    kind, config, chunk, clients, think = scenario
    fast, fast_recorder = run(kind, Engine, config, chunk, clients, think)
    slow, slow_recorder = run(kind, StepwiseEngine, config, chunk, clients, think)
    assert fast_recorder.steps == slow_recorder.steps
    assert fast_recorder.rejected == slow_recorder.rejected
    assert len(fast.requests) == len(slow.requests)
    if fast.requests:
        np.testing.assert_allclose(sorted(fast.requests), sorted(slow.requests), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(np.concatenate(fast.steps), np.concatenate(slow.steps), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(sorted(fast.gaps), sorted(slow.gaps), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_preemption_and_stalls_really_happen(asynchronous: bool) -> None:
    """The generated scenarios would prove little if nothing ever ran out."""
    rng = np.random.default_rng(3)
    chunk = RequestChunk(np.zeros(30), rng.integers(50, 300, 30), rng.integers(50, 120, 30))
    config = EngineConfig(
        max_num_batched_tokens=64, max_num_seqs=24, max_model_len=4096, block_size=BLOCK, total_blocks=60,
        reserve_full_isl=False, async_scheduling=asynchronous,
    )  # fmt: skip
    log, recorder = run("gqa", Engine, config, chunk, 0, 0.0)
    slow, _ = run("gqa", StepwiseEngine, config, chunk, 0, 0.0)
    preemptions = sum(row[sorted(_request_columns()).index("preemptions")] for row in log.requests)
    assert preemptions > 10
    assert max(log.gaps) > 20 * np.median(log.gaps)
    assert recorder.segments < recorder.steps
    np.testing.assert_allclose(np.concatenate(log.steps), np.concatenate(slow.steps), rtol=1e-9)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_prompts_alone_go_first(asynchronous: bool) -> None:
    """Without mixed steps no decode shares a step with a prompt, and none runs while a prompt can."""
    chunk = RequestChunk(np.array([0.0, 0.0, 0.0, 0.3]), np.full(4, 100), np.full(4, 400))
    config = EngineConfig(
        max_num_batched_tokens=64, max_num_seqs=8, max_model_len=4096, block_size=BLOCK, total_blocks=400,
        mixed_steps=False, async_scheduling=asynchronous,
    )  # fmt: skip
    alone, _ = run("gqa", Engine, config, chunk, 0, 0.0)
    mixed, _ = run("gqa", Engine, replace(config, mixed_steps=True), chunk, 0, 0.0)

    def work(log: Log) -> tuple[np.ndarray, np.ndarray]:
        rows = np.concatenate(log.steps)
        return rows[:, 3], rows[:, 5]  # decodes, prompt tokens

    decodes, prompts = work(alone)
    assert not np.any((decodes > 0) & (prompts > 0))
    assert prompts[:5].tolist() == [64, 64, 64, 64, 44]  # three prompts
    assert prompts[5:].sum() == 100
    assert np.any(np.multiply(*work(mixed)) > 0)
    assert max(alone.gaps) > max(mixed.gaps)


def _request_columns() -> tuple[str, ...]:
    from perfsim.serving.recorder import REQUEST_COLUMNS

    return REQUEST_COLUMNS
