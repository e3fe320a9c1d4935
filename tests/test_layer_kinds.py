"""Every kind of layer, from a published configuration to operators, memory and a finished simulation."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from batches import Chunks, batch_shape
from hypothesis import given, settings
from hypothesis import strategies as st

import perfsim
from perfsim.cost.memory import MemoryPlan, memory_plan
from perfsim.cost.roofline import op_estimate
from perfsim.cost.step import step_estimate
from perfsim.cost.step_model import compile_steps
from perfsim.errors import InfeasibleError
from perfsim.ops.op import Op
from perfsim.ops.params import state_bytes_per_sequence, vision_params, weight_bytes_per_gpu
from perfsim.ops.step import FULL, Span, attended_pairs
from perfsim.ops.transformer import lower
from perfsim.serving.replica import plan_replica
from perfsim.spec import catalog
from perfsim.spec.curves import OperatorCurves
from perfsim.spec.load import find_calibration, load_scenario
from perfsim.spec.model import WEIGHT_BYTES, MixtureOfExperts, ModelArch
from perfsim.spec.policy import ParallelPlan, ServingPolicy

FOLDER = Path(__file__).resolve().parents[1] / "workloads" / "models"
PAST = [0, 77, 3999, 149_999]  # tokens before the one that is decoded
CHUNKS: Chunks = [(512, 0), (300, 5000), (1, 123_456)]
H100 = find_calibration(accelerator="h100-80gb-sxm", engine="vllm")

model = cache(catalog.model)


def published(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return content.get("text_config", content)


def ops(arch: ModelArch, past: list[int] = PAST, chunks: Chunks = CHUNKS, **options: Any) -> list[Op]:
    work = lower(arch, batch_shape(arch, past, chunks), **{"tp": 1, **options})
    return [item for item in work if isinstance(item, Op)]


def flops(items: list[Op], *names: str) -> float:
    return float(sum(op.count * op.flops for op in items if op.name in names))


def moved(items: list[Op], *names: str) -> float:
    return float(sum(op.count * (op.read_bytes + op.write_bytes) for op in items if op.name in names))


def pairs(span: Span, past: list[int] = PAST, chunks: Chunks = CHUNKS) -> float:
    """(new token, attended token) pairs of decodes and prefills."""
    return sum(span.attended(tokens) for tokens in past) + sum(attended_pairs(*chunk, span) for chunk in chunks)


# --- what is attended -------------------------------------------------------------------------------------------------


def test_llama_4_attends_its_chunk_in_three_layers_of_four() -> None:
    raw = published("meta-llama--Llama-4-Scout-17B-16E-Instruct")
    found = flops(ops(model("meta-llama--Llama-4-Scout-17B-16E-Instruct")), "decode_attention", "prefill_attention")
    per_pair = 4 * raw["num_attention_heads"] * raw["head_dim"]
    assert found == pytest.approx(per_pair * (12 * pairs(FULL) + 36 * pairs(Span("chunk", 8192))), rel=1e-12)


def test_a_lightning_indexer_scans_everything_and_picks_2048() -> None:
    raw, arch = published("deepseek-ai--DeepSeek-V3.2"), model("deepseek-ai--DeepSeek-V3.2")
    items, top = ops(arch), Span("top_k", raw["index_topk"])
    latent, rope, heads = raw["kv_lora_rank"], raw["qk_rope_head_dim"], raw["num_attention_heads"]
    attention = flops(items, "decode_attention", "prefill_attention")
    assert attention == pytest.approx(61 * pairs(top) * 2 * heads * (2 * latent + rope), rel=1e-12)
    scan = flops(items, "decode_index_scan", "prefill_index_scan")
    # A product of 128 per head, and the weighted sum over heads.
    assert scan == pytest.approx(61 * pairs(FULL) * 2 * raw["index_n_heads"] * (raw["index_head_dim"] + 1), rel=1e-12)
    keys = [op for op in items if op.name == "decode_index_scan"]
    assert [op.entry_bytes for op in keys] == [128 + 4 + 8] * len(keys)  # fp8, its scale; a score written and read
    assert {op.dtype for op in keys} == {"fp8"}


def test_layers_that_share_a_choice_do_not_scan() -> None:
    kinds = published("zai-org--GLM-5.2")["indexer_types"]
    scans = [op.count for op in ops(model("zai-org--GLM-5.2")) if op.name == "decode_index_scan"]
    assert sum(scans) == kinds.count("full") == 21


def test_blocks_are_picked_by_their_best_score() -> None:
    raw, arch = published("MiniMaxAI--MiniMax-M3"), model("MiniMaxAI--MiniMax-M3")
    sparse = raw["sparse_attention_config"]
    items, top = ops(arch), Span("top_k", sparse["sparse_topk_blocks"] * sparse["sparse_block_size"])
    per_pair = 4 * raw["num_attention_heads"] * raw["head_dim"]
    attention = flops(items, "decode_attention", "prefill_attention")
    assert attention == pytest.approx(per_pair * (3 * pairs(FULL) + 57 * pairs(top)), rel=1e-12)
    scan = next(op for op in items if op.name == "decode_index_scan")
    assert scan.entry_bytes == 128 * 2 + 8 / 128  # 16-bit keys of every token, one score per block


def test_deepseek_v4_attends_a_window_and_summaries() -> None:
    raw, arch = published("deepseek-ai--DeepSeek-V4-Flash"), model("deepseek-ai--DeepSeek-V4-Flash")
    ratios = raw["compress_ratios"][: raw["num_hidden_layers"]]
    near = pairs(Span("window", 128))
    # Of every fourth token's summary the 512 best, of every 128th all: in the smooth form without floors.
    far = {0: 0.0, 4: pairs(Span("top_k", 4 * raw["index_topk"])) / 4, 128: pairs(FULL) / 128}
    attended = sum(near + far[ratio] for ratio in ratios)
    items = ops(arch)
    found = flops(items, "decode_attention", "prefill_attention")
    assert found == pytest.approx(4 * raw["num_attention_heads"] * raw["head_dim"] * attended, rel=1e-12)
    scan = flops(items, "decode_index_scan", "prefill_index_scan")
    per_score = 2 * raw["index_n_heads"] * (raw["index_head_dim"] + 1)
    assert scan == pytest.approx(ratios.count(4) * pairs(FULL) / 4 * per_score, rel=1e-12)
    # One kernel attends both: 43 layers launch it once each.
    assert sum(op.count for op in items if op.name == "decode_attention") == 43
    exact = sum(min((tokens + 1) // 4, 512) for tokens in PAST)
    smooth = sum(Span("top_k", 2048).attended(tokens) for tokens in PAST) / 4
    assert exact <= smooth <= exact + len(PAST)


# --- fixed states -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layers", "state"),
    [
        # Layers, and numbers of one state: heads x key width x value width; Mamba-2: heads x head width x state width.
        ("Qwen--Qwen3.5-27B", 48, 48 * 128 * 128),
        ("moonshotai--Kimi-K3", 69, 96 * 128 * 128),
        ("nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", 23, 64 * 64 * 128),
        ("mistralai--Mamba-Codestral-7B-v0.1", 64, 128 * 64 * 128),
    ],
)
def test_a_recurrent_layer_moves_its_state_once_per_token_and_sequence(name: str, layers: int, state: int) -> None:
    arch = model(name)
    short, long = (ops(arch, [tokens] * 8, []) for tokens in (10, 100_000))
    updates = [op for op in short if op.name == "state_update"]
    assert sum(op.count for op in updates) == layers
    # Decay, a read, a rank-one update, a read of every number: 6 or 7 operations.
    assert 6 * 8 * layers * state <= flops(short, "state_update") <= 7 * 8 * layers * state
    assert flops(short, "state_update") == flops(long, "state_update")
    held = state_bytes_per_sequence(arch)
    assert 2 * 8 * held <= moved(short, "state_update") <= 2.1 * 8 * held
    prompt = ops(arch, [], [(4096, 0)])
    assert [float(op.flops) for op in prompt if op.name == "state_update"] == [0.0] * len(updates)
    # The chunked form does more per token than the recurrence, but within a small factor, and is linear in tokens.
    per_token = flops(prompt, "chunk_scan") / 4096
    assert flops(short, "state_update") / 8 / 2 < per_token < 8 * flops(short, "state_update") / 8
    assert flops(ops(arch, [], [(8192, 50_000)]), "chunk_scan") == pytest.approx(2 * 4096 * per_token, rel=1e-12)


def test_flops_of_the_chunked_delta_rule() -> None:
    raw, chunk = published("Qwen--Qwen3.5-27B"), 64
    heads, key, value = raw["linear_num_value_heads"], raw["linear_key_head_dim"], raw["linear_value_head_dim"]
    products = 3 * chunk * key + 2 * chunk * value + 3 * key * value  # per token, in multiply-adds
    per_token = heads * (2 * products + chunk * chunk / 3)
    found = flops(ops(model("Qwen--Qwen3.5-27B"), [], [(1000, 0)]), "chunk_scan")
    assert found == pytest.approx(48 * 1000 * per_token, rel=1e-12)


# --- the K/V cache in eight bits --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sixteen", "eight"),
    [
        ("llama-3.1-8b-instruct", 2 * 8 * 128 * 2, 2 * 8 * 128),
        ("deepseek-ai--DeepSeek-V3", 576 * 2, 576),
        ("deepseek-ai--DeepSeek-V3.2", 576 * 2, 512 + 4 * 4 + 64 * 2),  # vLLM's fp8_ds_mla: 656 bytes
        ("deepseek-ai--DeepSeek-V4-Flash", 584, 584),  # one layout, always in eight bits
        ("XiaomiMiMo--MiMo-V2-Flash", {8 * (192 + 128) * 2, 4 * (192 + 128) * 2}, {8 * (192 + 128), 4 * (192 + 128)}),
    ],
)
def test_bytes_of_a_cached_entry(name: str, sixteen: Any, eight: Any) -> None:
    for cached, expected in (("auto", sixteen), ("fp8", eight)):
        entries = {op.entry_bytes for op in ops(model(name), kv_cache_dtype=cached) if op.name == "decode_attention"}
        assert entries == (expected if isinstance(expected, set) else {expected})


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["openai--gpt-oss-20b", "deepseek-ai--DeepSeek-V3.2", "google--gemma-4-26B-A4B"]),
    st.sampled_from(["a100-80gb-sxm", "h100-80gb-sxm", "mi300x-192gb"]),
    st.lists(st.integers(0, 10**6), max_size=6),
    st.lists(st.tuples(st.integers(1, 8192), st.integers(0, 10**6)), max_size=3),
)  # fmt: skip
def test_a_smaller_cache_is_never_slower(name: str, gpu: str, past: list[int], chunks: Chunks) -> None:
    # Of equal kernels: those that were measured may well be slower for a cache of 8 bits.
    device = H100.device.model_copy(update={"curves": OperatorCurves()})
    accelerator, power = catalog.accelerator(gpu), H100.power
    for wide, narrow in zip(
        ops(model(name), past, chunks), ops(model(name), past, chunks, kv_cache_dtype="fp8"), strict=True
    ):
        before, after = (op_estimate(op, accelerator, device, power).seconds for op in (wide, narrow))
        assert after <= before * (1 + 1e-12)


# --- memory -----------------------------------------------------------------------------------------------------------


def plan(name: str, gpu: str = "b300-288gb-sxm", tp: int = 1, **changes: Any) -> MemoryPlan:
    arch = model(name)
    limits = {
        "max_num_batched_tokens": 8192,
        "max_num_seqs": 256,
        "max_model_len": 32768,
        "enable_prefix_caching": False,
    }
    return memory_plan(
        model=arch, accelerator=catalog.accelerator(gpu), parallel=ParallelPlan(tp=tp), engine=H100.engine,
        policy=ServingPolicy(**limits | changes),
    )  # fmt: skip


def test_blocks_of_a_hybrid_model_hold_a_state() -> None:
    # 16 full layers: 2 x 4 heads x 256 in 16 bits are 4 KiB per token; 48 states of 3.06 MiB fill 783 such tokens, in
    # steps of 16. The 48 layers make three groups of 16.
    found = plan("Qwen--Qwen3.5-27B")
    assert (found.block_size, found.window_blocks) == (784, 3)
    assert found.kv_cache / found.kv_blocks == 16 * 4096 * 784
    assert plan("Qwen--Qwen3.5-27B", enable_prefix_caching=True).window_blocks == 6  # a checkpoint beside each state
    assert plan("Qwen--Qwen3.5-27B", kv_cache_dtype="fp8").block_size == 1568
    assert plan("Qwen--Qwen3.5-27B", block_size=1024).block_size == 1024


def test_a_recurrent_model_has_a_block_per_sequence() -> None:
    found = plan("mistralai--Mamba-Codestral-7B-v0.1", "h100-80gb-sxm")
    assert (found.block_size, found.window_blocks) == (32768, 0)
    assert found.kv_cache / found.kv_blocks == state_bytes_per_sequence(model("mistralai--Mamba-Codestral-7B-v0.1"))


def test_chunks_and_windows_are_held_beside_the_growing_layers() -> None:
    # 36 of 48 layers keep a chunk of 8,192: three groups of twelve layers.
    assert plan("meta-llama--Llama-4-Scout-17B-16E-Instruct").span_blocks == ((8192 // 16 + 1, 3),)
    # What the context never reaches is not held: four times twelve layers of 2,000 tokens, then a chunk at most.
    config = plan_replica(load_scenario(overrides=[
        "model=meta-llama--Llama-4-Scout-17B-16E-Instruct", "hardware=b300-8x-sxm", "parallel.tp=8",
    ])).config  # fmt: skip
    assert [config.beside(tokens) for tokens in (1, 2000, 8192, 10**6)] == [3, 3 * 125, 3 * 512, 3 * 513]
    # Five full layers of 2 x 512 x 2 numbers, 25 windowed ones of 8 x 256 x 2: ten times as much per token.
    assert plan("google--gemma-4-26B-A4B").span_blocks == ((1024 // 16 + 1, 10),)


def test_eight_bits_hold_twice_the_tokens() -> None:
    for name in ("llama-3.1-8b-instruct", "deepseek-v2-lite"):
        sixteen, eight = plan(name, "h100-80gb-sxm"), plan(name, "h100-80gb-sxm", kv_cache_dtype="fp8")
        assert eight.kv_blocks in (2 * sixteen.kv_blocks, 2 * sixteen.kv_blocks + 1)


def test_deepseek_v4_caches_a_tenth_of_its_predecessor() -> None:
    before, after = (plan(name, tp=8).kv_cache / plan(name, tp=8).kv_blocks for name in
                     ("deepseek-ai--DeepSeek-V3.2", "deepseek-ai--DeepSeek-V4-Pro"))  # fmt: skip
    assert after < before / 10


# --- all models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", catalog.list_models())
def test_weights_that_a_step_reads_are_those_in_memory(name: str) -> None:
    """An empty step reads every matrix but the embedding and the experts; vectors are all that is left."""
    arch = model(name)
    for tp, most in ((1, 0.03), (4, 0.05)):
        try:
            total = weight_bytes_per_gpu(arch, tp=tp)
        except InfeasibleError:
            continue
        read = sum(float(op.count * op.read_bytes) for op in ops(arch, [], [], tp=tp))
        lookup = 0 if arch.tie_word_embeddings else -(-arch.vocab_size // tp) * arch.hidden_size
        unread = (lookup + vision_params(arch)) * WEIGHT_BYTES[arch.dtype]
        for group in arch.layers:
            if isinstance(group.mlp, MixtureOfExperts):
                wide, width = group.mlp.latent_size or arch.hidden_size, group.mlp.moe_intermediate_size // tp
                numbers = group.count * group.mlp.num_experts * (3 if group.mlp.gated else 2) * wide * width
                unread += numbers * WEIGHT_BYTES[arch.expert_dtype]
        # Indexer keys and residual-stream weights are stored narrower than they are used.
        assert -0.025 <= (total - unread - read) / (total - unread) <= most


@pytest.mark.parametrize("name", catalog.list_models())
def test_every_model_compiles_to_what_it_is_explained_as(name: str) -> None:
    arch, node = model(name), catalog.node("dgx-h100")
    for cached in ("auto", "fp8"):
        steps = compile_steps(
            model=arch, node=node, tp=4, calibration=H100, max_num_batched_tokens=512, max_num_seqs=16,
            async_scheduling=False, policy=ServingPolicy(kv_cache_dtype=cached),
        )  # fmt: skip
        for past, chunks in ((PAST, [(256, 5000), (3, 0)]), (PAST, []), ([], [(512, 70_000)])):
            step = batch_shape(arch, past, chunks)
            explained = step_estimate(
                step,
                model=arch,
                node=node,
                tp=4,
                calibration=H100,
                async_scheduling=False,
                policy=ServingPolicy(kv_cache_dtype=cached),
            )
            whole = (tuple(map(int, sums)) for sums in (step.decode_context, step.prefill_pairs, step.prefill_context))
            context, work, read = whole
            seconds = steps.step_seconds(
                int(step.tokens), int(step.logits), len(past), context, int(step.prefill_tokens), work, read,
                longest=(int(step.decode_longest), int(step.prefill_longest)),
            )  # fmt: skip
            assert seconds == pytest.approx(float(explained.seconds), rel=1e-12, abs=0)


def one_per_architecture() -> list[str]:
    first: dict[str, str] = {}
    for name in catalog.list_models():
        first.setdefault(model(name).architecture, name)
    return list(first.values())


@pytest.mark.parametrize("name", one_per_architecture())
def test_every_architecture_simulates(name: str) -> None:
    """Bookkeeping, conservation and the explained step times are checked inside."""
    length = min(model(name).max_position_embeddings, 16384)
    for node, tp in (("dgx-h100", 1), ("dgx-h100", 8), ("b300-8x-sxm", 8)):
        overrides = [
            f"model={name}", f"hardware={node}", f"parallel.tp={tp}", "workload.num_requests=16",
            f"policy.max_model_len={length}", "policy.kv_cache_dtype=fp8",
        ]  # fmt: skip
        try:
            result = perfsim.simulate(load_scenario(overrides=overrides))
        except InfeasibleError:
            continue
        counts = result.metrics["counts"]  # models of 2,048 tokens reject a few
        assert counts["completed"] >= 8
        assert counts["completed"] + counts["rejected"] == 16
        return
    pytest.fail(f"{name} fits no node")
