"""What the lowering says there is to do, against counts made by hand from published configurations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batches import Chunks, batch_shape, decodes, prefills, stacked
from hypothesis import given, settings
from hypothesis import strategies as st

from perfsim.ops.mlp import distinct_experts
from perfsim.ops.op import Beside, Collective, Op
from perfsim.ops.step import FULL, Span, StepShape, attended_pairs, context_read
from perfsim.ops.transformer import lower
from perfsim.spec import catalog
from perfsim.spec.model import WEIGHT_BYTES, ModelArch

FOLDER = Path(__file__).resolve().parents[1] / "workloads" / "models"
DENSE = ("llama-2-7b-hf", "llama-3.1-8b-instruct", "qwen2.5-7b-instruct", "Qwen--Qwen3-32B-FP8", "yi-34b")
MODELS = (*DENSE, "qwen3-30b-a3b", "mixtral-8x7b-v0.1", "deepseek-ai--DeepSeek-V3", "openai--gpt-oss-20b")
KINDS = (
    "meta-llama--Llama-4-Scout-17B-16E-Instruct", "deepseek-ai--DeepSeek-V3.2", "deepseek-ai--DeepSeek-V4-Flash",
    "Qwen--Qwen3.5-27B", "mistralai--Mamba-Codestral-7B-v0.1", "moonshotai--Kimi-K3",
)  # fmt: skip
MATMULS = {"gemm", "lm_head", "moe"}


def ops(model: ModelArch, step: StepShape, *, tp: int = 1, popularity: float = 0.0) -> list[Op]:
    return [item for item in lower(model, step, tp=tp, expert_popularity=popularity) if isinstance(item, Op)]


def flops(items: list[Op], *kinds: str) -> float:
    return float(sum(item.count * item.flops for item in items if item.kind in kinds))


def published(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return content


spans = st.one_of(st.just(FULL), st.builds(Span, st.sampled_from(["window", "chunk", "top_k"]), st.integers(1, 500)))


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(0, 400), spans)
def test_attended_pairs_and_context_read_count_what_a_loop_counts(chunk: int, past: int, span: Span) -> None:
    seen: set[int] = set()
    pairs = 0
    for token in range(past, past + chunk):
        first = {
            "full": 0, "window": token + 1 - span.size, "top_k": token + 1 - span.size,
            "chunk": token // max(1, span.size) * span.size,
        }[span.kind]  # fmt: skip
        attended = range(max(0, first), token + 1)
        assert span.attended(token) == len(attended)
        pairs += len(attended)
        seen.update(attended)
    assert attended_pairs(chunk, past, span) == pairs
    # Picks may lie anywhere: between the tail, as if they were a window, and all there is.
    read = context_read(chunk, past, span)
    assert len(seen) <= read <= min(pairs, past + chunk) if span.kind == "top_k" else read == len(seen)


@settings(deadline=None)
@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(0, 10**7), spans)
def test_two_chunks_attend_what_one_does(first: int, second: int, past: int, span: Span) -> None:
    parts = attended_pairs(first, past, span) + attended_pairs(second, past + first, span)
    assert attended_pairs(first + second, past, span) == parts


@pytest.mark.parametrize("name", DENSE)
@settings(max_examples=20, deadline=None)
@given(past=decodes, chunks=prefills)
def test_dense_flops_are_two_per_weight_and_token_plus_attention(name: str, past: list[int], chunks: Chunks) -> None:
    raw, model = published(name), catalog.model(name)
    layers, hidden, inner = raw["num_hidden_layers"], raw["hidden_size"], raw["intermediate_size"]
    heads, kv_heads = raw["num_attention_heads"], raw.get("num_key_value_heads", raw["num_attention_heads"])
    dim = raw.get("head_dim") or hidden // heads
    step = batch_shape(model, past, chunks)
    weights = layers * (hidden * (heads + 2 * kv_heads) * dim + heads * dim * hidden + 3 * hidden * inner)
    linear = 2 * (weights * step.tokens + hidden * raw["vocab_size"] * step.logits)
    items = ops(model, step)
    assert flops(items, *MATMULS) == pytest.approx(linear, rel=1e-12, abs=0)
    # Scores and weighted sum: two products of head_dim per head and attended pair.
    pairs = sum(tokens + 1 for tokens in past)
    pairs += sum(start * chunk + chunk * (chunk + 1) // 2 for chunk, start in chunks)
    attention = flops(items, "decode_attention", "prefill_attention")
    assert attention == pytest.approx(4 * heads * dim * layers * pairs, rel=1e-12, abs=0)


@settings(deadline=None)
@given(past=decodes, chunks=prefills)
def test_windowed_layers_attend_their_window(past: list[int], chunks: Chunks) -> None:
    model = catalog.model("openai--gpt-oss-20b")  # 12 full layers and 12 of window 128; 64 heads of 64
    items = ops(model, batch_shape(model, past, chunks))
    pairs = 0
    for span in (FULL, Span("window", 128)):
        pairs += sum(tokens + 1 if span == FULL else min(tokens + 1, 128) for tokens in past)
        pairs += sum(attended_pairs(chunk, start, span) for chunk, start in chunks)
    attention = flops(items, "decode_attention", "prefill_attention")
    assert attention == pytest.approx(12 * pairs * 4 * 64 * 64, rel=1e-12, abs=0)


def test_flops_of_an_mla_mixture_of_experts() -> None:
    raw, model = published("deepseek-ai--DeepSeek-V3"), catalog.model("deepseek-ai--DeepSeek-V3")
    hidden, heads, latent, rope = 7168, 128, raw["kv_lora_rank"], raw["qk_rope_head_dim"]
    nope, value, rank = raw["qk_nope_head_dim"], raw["v_head_dim"], raw["q_lora_rank"]
    step = batch_shape(model, [999, 4999], [(512, 1024)])
    items = ops(model, step)
    # Decode attends the latent itself: scores over latent + rope, weighted sum over latent (arXiv:2405.04434, 2.1.2).
    assert flops(items, "decode_attention") == 61 * 6000 * 2 * heads * (latent + rope + latent)
    pairs = attended_pairs(512, 1024)
    assert flops(items, "prefill_attention") == 61 * pairs * 2 * heads * (nope + rope + value)
    shared, routed, inner = raw["n_shared_experts"], raw["num_experts_per_tok"], raw["moe_intermediate_size"]
    per_token = 61 * (hidden * (rank + latent + rope) + rank * heads * (nope + rope) + heads * value * hidden)
    per_token += 3 * 3 * hidden * raw["intermediate_size"]
    per_token += 58 * (hidden * raw["n_routed_experts"] + (shared + routed) * 3 * hidden * inner)
    expanded = 1536 + 2  # every entry a chunk attends is expanded; a decode absorbs the same product once
    per_entry = 61 * latent * heads * (nope + value)
    matmuls = per_token * 514 + per_entry * expanded + 3 * hidden * raw["vocab_size"]
    assert flops(items, *MATMULS) == pytest.approx(2 * matmuls, rel=1e-12, abs=0)


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "mixtral-8x7b-v0.1", "openai--gpt-oss-20b"])
@settings(deadline=None)
@given(tokens=st.integers(1, 10_000))
def test_every_token_pays_for_its_experts_only(name: str, tokens: int) -> None:
    raw, model = published(name), catalog.model(name)
    inner = raw.get("moe_intermediate_size", raw["intermediate_size"])
    expert = 3 * raw["hidden_size"] * inner
    work = 2 * tokens * raw["num_experts_per_tok"] * expert * raw["num_hidden_layers"]
    for popularity in (0.0, 1.0):
        items = ops(model, batch_shape(model, [], [(tokens, 0)]), popularity=popularity)
        assert flops(items, "moe") == pytest.approx(work, rel=1e-12, abs=0)


def test_only_picked_experts_are_read() -> None:
    model = catalog.model("mixtral-8x7b-v0.1")
    expert = 3 * 4096 * 14336 * WEIGHT_BYTES["bf16"]
    routed = (4096 + 14336) * 2 * 2  # activations of the two visits of one token
    for tokens, experts in ((0, 0.0), (1, 2.0), (2, 8 * (1 - 0.75**2)), (10**6, 8.0)):
        step = batch_shape(model, [], [(tokens, 0)]) if tokens else batch_shape(model, [], [])
        moe = next(op for op in ops(model, step) if op.kind == "moe")
        assert moe.read_bytes == pytest.approx(experts * expert + tokens * routed, rel=1e-9)


@pytest.mark.parametrize("name", [*MODELS, *KINDS])
@settings(max_examples=10, deadline=None)
@given(past=decodes, chunks=prefills)
def test_shards_add_up_to_the_whole(name: str, past: list[int], chunks: Chunks) -> None:
    model, step = catalog.model(name), batch_shape(catalog.model(name), past, chunks)
    whole = ops(model, step)
    # What vLLM copies instead of dividing: the router, projections to latents, indexers, compressors, residual streams.
    copied = {
        "router", "kv_a_proj", "qkv_a_proj", "index_q_proj", "index_k_proj", "decode_index_scan", "prefill_index_scan",
        "compressor", "stream_weights", "latent_down", "latent_up",
    }  # fmt: skip
    for tp in (2, 4):
        for one, shard in zip(whole, ops(model, step, tp=tp), strict=True):
            assert (one.name, one.count) == (shard.name, shard.count)
            if one.name == "mixer_gates":  # one number per head is divided, a rank is not
                assert one.flops <= tp * shard.flops <= tp * one.flops
            elif one.kind in MATMULS | {"decode_attention", "prefill_attention", "recurrence"}:
                share = 1 if one.name in copied else tp
                assert share * shard.flops == pytest.approx(one.flops, rel=1e-12, abs=0)


@pytest.mark.parametrize("name", MODELS)
def test_weights_read_are_the_weights_stored(name: str) -> None:
    model = catalog.model(name)
    empty = batch_shape(model, [], [])  # reads every matrix but the experts', of which it picks none
    for tp in (1, 2, 4):
        read = sum(op.count * op.read_bytes for op in ops(model, empty, tp=tp))
        assert read == pytest.approx(sum(_stored(model, tp)), rel=1e-9)


def _stored(model: ModelArch, tp: int) -> Iterator[float]:
    """Bytes of all matrices but the routed experts' on one GPU, counted from the shapes of their parts."""
    hidden, linear = model.hidden_size, WEIGHT_BYTES[model.linear_dtype]
    yield model.vocab_size * hidden * WEIGHT_BYTES[model.dtype] / tp
    for group in model.layers:
        attention, mlp = group.attention, group.mlp
        heads = attention.num_attention_heads
        if attention.kind == "gqa":
            yield group.count * linear * hidden * attention.head_dim * 2 * (heads + attention.num_key_value_heads) / tp
        else:
            latent, rope = attention.kv_lora_rank, attention.qk_rope_head_dim
            nope, value, rank = attention.qk_nope_head_dim, attention.v_head_dim, attention.q_lora_rank
            assert rank is not None
            sharded = heads * (rank * (nope + rope) + latent * (nope + value) + value * hidden)
            yield group.count * linear * (sharded / tp + hidden * (rank + latent + rope))
        if mlp.kind == "dense":
            yield group.count * linear * 3 * hidden * mlp.intermediate_size / tp
            continue
        yield group.count * hidden * mlp.num_experts * WEIGHT_BYTES[model.dtype]
        yield group.count * linear * 3 * hidden * mlp.shared_intermediate_size / tp


def test_two_all_reduces_per_layer_and_one_gather() -> None:
    model = catalog.model("llama-3.1-70b-instruct")
    step = batch_shape(model, [10, 20], [(100, 0)])
    assert not any(isinstance(item, Collective) for item in lower(model, step, tp=1))
    messages = [item for item in lower(model, step, tp=8) if isinstance(item, Collective)]
    summary = [(m.kind, m.count, m.bytes, m.group) for m in messages]
    assert summary == [("all_reduce", 160, 102 * 8192 * 2, 8), ("all_gather", 1, 3 * 128256 / 8 * 2, 8)]


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 300), st.data())
def test_uniform_experts_are_counted_exactly(tokens: int, num_experts: int, data: st.DataObject) -> None:
    per_token = data.draw(st.integers(1, num_experts))
    # A given expert is missed by a token with chance (E - k) / E, independently of other tokens.
    exact = num_experts * (1 - ((num_experts - per_token) / num_experts) ** tokens)
    assert distinct_experts(float(tokens), num_experts, per_token, 0.0) == pytest.approx(exact, rel=1e-9, abs=1e-9)


@settings(deadline=None)
@given(st.integers(1, 300), st.floats(0, 4), st.data())
def test_distinct_experts_grow_within_bounds(num_experts: int, popularity: float, data: st.DataObject) -> None:
    per_token = data.draw(st.integers(1, num_experts))
    tokens = np.array([0, 1, 2, 3, 5, 10, 100, 1000, 10**5, 10**7], dtype=np.float64)
    touched = np.asarray(distinct_experts(tokens, num_experts, per_token, popularity))
    assert touched[0] == 0.0
    assert np.all(np.diff(touched) >= 0)
    assert np.all(touched <= np.minimum(num_experts, per_token * tokens) * (1 + 1e-12))


@pytest.mark.parametrize(("num_experts", "per_token"), [(8, 2), (32, 4), (128, 8), (256, 8)])
@pytest.mark.parametrize("popularity", [0.0, 0.5, 1.0, 2.0])
def test_one_token_reads_all_the_experts_it_visits(num_experts: int, per_token: int, popularity: float) -> None:
    # The router picks k different experts, however popular the first one is, so one token reads k of them.
    assert distinct_experts(1.0, num_experts, per_token, popularity) == pytest.approx(per_token, rel=1e-9)


def numbers_of(work: Op) -> list[object]:
    """The fields of an operator, with those of the prompts beside it in place of them."""
    fields = [getattr(work, field) for field in work.__dataclass_fields__]
    return [part for field in fields for part in (field if isinstance(field, Beside) else [field])]


@pytest.mark.parametrize("name", [*MODELS, *KINDS])
@pytest.mark.parametrize("tp", [1, 4])
@settings(max_examples=5, deadline=None)
@given(batches=st.lists(st.tuples(decodes, prefills), min_size=1, max_size=4))
def test_one_step_and_many_are_lowered_alike(name: str, tp: int, batches: list[tuple[list[int], Chunks]]) -> None:
    model = catalog.model(name)
    steps = [batch_shape(model, *batch) for batch in batches]
    many = lower(model, stacked(steps), tp=tp, expert_popularity=1.0)
    for row, step in enumerate(steps):
        for one, all_ in zip(lower(model, step, tp=tp, expert_popularity=1.0), many, strict=True):
            for alone, among in zip(numbers_of(one), numbers_of(all_), strict=True):
                if isinstance(among, np.ndarray):
                    assert among.shape == (len(steps),)
                    assert among[row] == pytest.approx(alone, rel=1e-12, abs=0)
                else:
                    assert among == alone
