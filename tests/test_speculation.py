"""Speculative decoding: the fast engine does what single steps would, emissions follow the formula, drafts cost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fast_forward import BLOCK, KINDS, Log, tiny_model

from perfsim.cost.step import step_estimate
from perfsim.cost.step_model import compile_steps
from perfsim.errors import InputError
from perfsim.ops.speculation import draft_work
from perfsim.ops.step import StepShape, attention_spans
from perfsim.run import estimate, simulate
from perfsim.serving.acceptance import Acceptance, mean_emission
from perfsim.serving.check import Ledger, check_conservation
from perfsim.serving.driver import ClosedLoop, run_open_loop
from perfsim.serving.engine import Engine, EngineConfig
from perfsim.serving.recorder import Recorder
from perfsim.serving.stepwise import StepwiseEngine
from perfsim.spec import catalog
from perfsim.spec.load import find_calibration
from perfsim.spec.policy import ServingPolicy, SpeculativeDecoding
from perfsim.spec.scenario import Scenario
from perfsim.traffic import ClosedLoopSource, RequestChunk

NODE = catalog.node("dgx-h100")
CALIBRATION = find_calibration(accelerator="h100-80gb-sxm", engine="vllm")


def drafting(method: str = "eagle", tokens: int = 3, *acceptance: float) -> SpeculativeDecoding:
    size = 1e8 if method == "draft_model" else None
    return SpeculativeDecoding(
        method=method, num_speculative_tokens=tokens, acceptance=acceptance or (0.7,), draft_parameters=size
    )


def compiled(kind: str, config: EngineConfig, speculative: SpeculativeDecoding):
    return compile_steps(
        model=tiny_model(kind), node=NODE, tp=2, calibration=CALIBRATION, async_scheduling=config.async_scheduling,
        max_num_batched_tokens=config.max_num_batched_tokens, max_num_seqs=config.max_num_seqs,
        policy=ServingPolicy(speculative=speculative),
    )  # fmt: skip


def run(kind: str, engine_type, config: EngineConfig, chunk: RequestChunk, clients: int = 0):
    spans = attention_spans(tiny_model(kind))
    log, ledger = Log(), Ledger()
    recorder = Recorder((log, ledger), windows=len(spans), chunk=64)
    loop = ClosedLoop(ClosedLoopSource(iter([chunk]), clients, 0.01), ingress=0.002, egress=0.001, block_size=BLOCK)
    speculative = drafting("eagle", len(config.acceptance), *config.acceptance)
    engine = engine_type(
        config=config, steps=compiled(kind, config, speculative), recorder=recorder, windows=spans,
        on_finish=loop.on_finish if clients else None,
    )  # fmt: skip
    sent = loop.run(engine) if clients else run_open_loop(engine, [chunk], ingress=0.002, block_size=BLOCK)
    recorder.flush()
    check_conservation(engine, ledger, sent=sent)
    return log, recorder, engine, ledger


@st.composite
def scenarios(draw):
    count = draw(st.integers(1, 30))
    gaps = draw(st.lists(st.floats(0.0, 0.06), min_size=count, max_size=count))
    quantum = draw(st.sampled_from([0.0, 0.05, 0.5]))
    arrivals = np.cumsum(gaps)
    if quantum:
        arrivals = np.floor(arrivals / quantum) * quantum
    prompts = np.array(draw(st.lists(st.integers(1, 300), min_size=count, max_size=count)))
    outputs = np.array(draw(st.lists(st.integers(1, 90), min_size=count, max_size=count)))
    hashes = None
    if draw(st.booleans()):
        branch = draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
        hashes = [[b * 100 + i for i in range(-(-int(p) // 64))] for b, p in zip(branch, prompts, strict=True)]
    priority = np.array(draw(st.lists(st.integers(0, 2), min_size=count, max_size=count)))
    by_priority = draw(st.booleans())
    chunk = RequestChunk(arrivals, prompts, outputs, priority if by_priority else None, hashes, 64 if hashes else 0)
    seqs = draw(st.integers(1, 24))
    drafts = draw(st.integers(1, 5))
    config = EngineConfig(
        max_num_batched_tokens=draw(st.integers(max(seqs, 8), 200)),
        max_num_seqs=seqs,
        max_model_len=4096,
        block_size=BLOCK,
        total_blocks=draw(st.integers(30, 110)),
        priority=by_priority,
        prefix_caching=draw(st.booleans()),
        long_prefill_token_threshold=(threshold := draw(st.sampled_from([0, 0, 24]))),
        mixed_steps=threshold > 0 or draw(st.booleans()),
        async_scheduling=draw(st.booleans()),
        reserve_full_isl=draw(st.booleans()),
        acceptance=tuple(draw(st.lists(st.sampled_from([0.0, 0.3, 0.8, 1.0]), min_size=drafts, max_size=drafts))),
        lookahead=draw(st.sampled_from([0, drafts])),
        seed=draw(st.integers(0, 3)),
    )
    return draw(st.sampled_from(KINDS)), config, chunk, draw(st.sampled_from([0, 0, 4]))


@settings(max_examples=150, deadline=None)
@given(scenarios())
def test_fast_equals_stepwise(scenario) -> None:
    """With preemption, prefix hits, drafts cut by the budget, priorities and closed loops; books balance in both."""
    kind, config, chunk, clients = scenario
    fast, fast_recorder, engine, _ = run(kind, Engine, config, chunk, clients)
    slow, slow_recorder, other, _ = run(kind, StepwiseEngine, config, chunk, clients)
    assert fast_recorder.steps == slow_recorder.steps
    assert fast_recorder.rejected == slow_recorder.rejected
    assert engine.cut_off_tokens == other.cut_off_tokens
    assert engine.preemptions == other.preemptions
    if fast.requests:
        np.testing.assert_allclose(sorted(fast.requests), sorted(slow.requests), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(np.concatenate(fast.steps), np.concatenate(slow.steps), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(sorted(fast.gaps), sorted(slow.gaps), rtol=1e-9, atol=1e-9)


def pressed(**changes) -> tuple[EngineConfig, RequestChunk]:
    rng = np.random.default_rng(3)
    chunk = RequestChunk(np.zeros(30), rng.integers(50, 300, 30), rng.integers(50, 120, 30))
    config = EngineConfig(
        max_num_batched_tokens=64, max_num_seqs=24, max_model_len=4096, block_size=BLOCK, total_blocks=80,
        reserve_full_isl=False, acceptance=(0.8, 0.6, 0.4), lookahead=3, async_scheduling=False,
    )  # fmt: skip
    return replace(config, **changes), chunk


def test_preemption_stalls_and_cut_drafts_really_happen() -> None:
    config, chunk = pressed()
    log, _, engine, _ = run("gqa", Engine, config, chunk)
    assert engine.preemptions > 5
    assert max(log.gaps) > 10 * np.median(log.gaps)
    config, _ = pressed(max_num_batched_tokens=30, total_blocks=300)
    chunk = RequestChunk(np.zeros(30), np.full(30, 10), np.full(30, 100))
    log, _, _, _ = run("gqa", Engine, config, chunk)
    slow, _, _, _ = run("gqa", StepwiseEngine, config, chunk)
    np.testing.assert_allclose(np.concatenate(log.steps), np.concatenate(slow.steps), rtol=1e-9)
    tokens, decodes, prefill = (np.concatenate(log.steps)[:, column] for column in (1, 3, 5))
    drafts = tokens - decodes - prefill
    assert ((drafts > 0) & (drafts < 3 * decodes)).any()


def test_emissions_follow_the_formula() -> None:
    """Leviathan et al., equation 1: (1 - a^(k+1)) / (1 - a) tokens per verification, for a chance a at every draft."""
    for chance, drafts in ((0.8, 5), (0.3, 2)):
        drawn = Acceptance((chance,) * drafts, seed=1).accepted(0, 200_000)
        expected = (1 - chance ** (drafts + 1)) / (1 - chance)
        assert mean_emission((chance,) * drafts) == pytest.approx(expected)
        assert 1 + drawn.mean() == pytest.approx(expected, abs=5 * drawn.std() / len(drawn) ** 0.5)
    unequal = (0.9, 0.5, 0.1)
    drawn = Acceptance(unequal, seed=2).accepted(7, 200_000)
    for position in range(3):  # the chance at each position, given that it was reached
        reached = drawn >= position
        assert (drawn[reached] > position).mean() == pytest.approx(unequal[position], abs=0.01)


def test_draws_belong_to_the_request() -> None:
    acceptance = Acceptance((0.6, 0.6), seed=4)
    np.testing.assert_array_equal(acceptance.accepted(5, 10), acceptance.accepted(5, 1000)[:10])
    assert (acceptance.accepted(5, 100) != acceptance.accepted(6, 100)).any()
    assert (acceptance.accepted(5, 100) != Acceptance((0.6, 0.6), seed=5).accepted(5, 100)).any()


@pytest.mark.parametrize(("chance", "per_step"), [(1.0, 4), (0.0, 1)])
def test_certain_acceptance(chance: float, per_step: int) -> None:
    """Chance 1 gives k + 1 tokens per step, chance 0 one; every output token comes out once either way."""
    chunk = RequestChunk(np.zeros(1), np.array([100]), np.array([41]))
    config, _ = pressed(acceptance=(chance,) * 3, max_num_batched_tokens=256)
    log, _, engine, ledger = run("gqa", Engine, config, chunk)
    assert len(log.gaps) == 40 // per_step
    assert ledger.rejected == (40 // per_step) * (4 - per_step)
    assert engine.cut_off_tokens == 0


def test_rejected_drafts_cost_and_change_nothing_else() -> None:
    chunk = RequestChunk(np.linspace(0, 1, 20), np.full(20, 100), np.full(20, 60))
    config, _ = pressed(acceptance=(0.0,) * 3, max_num_batched_tokens=256, total_blocks=400)
    drafted, _, _, ledger = run("gqa", Engine, config, chunk)
    plain_config = replace(config, acceptance=(), lookahead=0)
    plain = Log()
    recorder = Recorder((plain,), windows=1)
    steps = compile_steps(
        model=tiny_model("gqa"), node=NODE, tp=2, calibration=CALIBRATION, async_scheduling=False,
        max_num_batched_tokens=256, max_num_seqs=24,
    )  # fmt: skip
    run_open_loop(Engine(config=plain_config, steps=steps, recorder=recorder), [chunk], ingress=0.002, block_size=BLOCK)
    recorder.flush()
    assert np.mean(drafted.gaps) > 1.02 * np.mean(plain.gaps)
    assert len(drafted.gaps) == len(plain.gaps) == 20 * 59
    assert ledger.rejected == 3 * 20 * 59


@pytest.mark.parametrize("method", ["ngram", "eagle", "draft_model", "mtp"])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_equals_explained(method: str, kind: str) -> None:
    """The table of the event loop prices a step as the sum of its operators does, the drafter's included."""
    model = tiny_model(kind).model_copy(update={"num_nextn_predict_layers": 1})
    policy = ServingPolicy(speculative=drafting(method, 3))
    steps = compile_steps(
        model=model, node=NODE, tp=2, calibration=CALIBRATION, async_scheduling=False, max_num_batched_tokens=512,
        max_num_seqs=64, policy=policy,
    )  # fmt: skip
    windows = len(attention_spans(model))
    # All sums of a decode step with 9 sequences, one of them short of drafts; with two prefill chunks; prefills alone.
    for tokens, logits, decodes, context, new in ((34, 9, 9, 3000, 0), (36 + 90, 11, 9, 3000, 90), (90, 2, 0, 0, 90)):
        contexts, pairs, entries = (context,) * windows, (new * 40,) * windows, (new * 2,) * windows
        shape = StepShape(tokens, logits, decodes, contexts, new, pairs, entries, None, 4)
        explained = step_estimate(
            shape, model=model, node=NODE, tp=2, calibration=CALIBRATION, async_scheduling=False, policy=policy
        )
        quick = steps.step_seconds(tokens, logits, decodes, contexts, new, pairs, entries)
        assert quick == pytest.approx(float(explained.seconds), rel=1e-12)
        assert ("drafting" in explained.d_seconds) == (method != "ngram")


def test_drafter_reads_its_weights_once_per_pass() -> None:
    model = tiny_model("gqa")
    shape = StepShape(40.0, 10.0, 10.0, (5000.0,), 0.0, (0.0,), (0.0,), None, 4)
    work = draft_work(model, shape, drafting("draft_model", 3), tp=1)
    assert sum(op.count for op in work) == 3
    assert sum(op.count * op.read_bytes for op in work) == pytest.approx(3 * 1e8 * 2)
    assert sum(op.count * op.flops for op in work) == pytest.approx(2e8 * (40 + 2 * 10))
    heads = [op for op in draft_work(model, shape, drafting("eagle", 3), tp=1) if op.name == "draft_lm_head"]
    assert sum(op.count for op in heads) == 3
    assert draft_work(model, shape, drafting("ngram", 3), tp=1) == []


def scenario(**changes) -> Scenario:
    return Scenario.load("default").replace(**changes)


EAGLE = {"method": "eagle", "num_speculative_tokens": 3, "acceptance": [0.8, 0.6, 0.5]}


def test_result_reports_acceptance_and_agrees_with_its_explanation() -> None:
    """`simulate` itself checks that explained and simulated step times agree, and that the books balance."""
    drafted = scenario(**{"policy.speculative": EAGLE})
    result = simulate(drafted)
    length = result.value("speculation.mean_acceptance_length")
    assert length == pytest.approx(mean_emission((0.8, 0.6, 0.5)), rel=0.02)
    assert result.value("speculation.accepted_fraction") == pytest.approx((length - 1) / 3)
    assert result.to_json() == simulate(drafted).to_json()
    plain = simulate(scenario())
    assert "speculation" not in plain.to_dict()["metrics"]
    assert result.value("tpot.mean") < plain.value("tpot.mean")


def test_memory_holds_the_drafter() -> None:
    plain, drafted = (simulate(s).to_dict()["memory"] for s in (scenario(), scenario(**{"policy.speculative": EAGLE})))
    assert drafted["weights"] > plain["weights"]
    assert drafted["kv_cache"] + drafted["weights"] == pytest.approx(plain["kv_cache"] + plain["weights"], rel=1e-3)


def test_estimate_knows_drafts() -> None:
    low = {"workload.arrivals.rate": 2.0, "policy.speculative": EAGLE}
    closed, replayed = estimate(scenario(**low)), simulate(scenario(**low))
    assert closed.value("tpot.mean") == pytest.approx(replayed.value("tpot.mean"), rel=0.1)


def test_what_cannot_be_is_refused_in_one_line() -> None:
    with pytest.raises(InputError, match="no multi-token-prediction layers"):
        simulate(scenario(**{"policy.speculative": EAGLE | {"method": "mtp"}}))
    with pytest.raises(InputError, match="long_prefill_token_threshold"):
        simulate(scenario(**{"policy.speculative": EAGLE, "policy.long_prefill_token_threshold": 3}))
