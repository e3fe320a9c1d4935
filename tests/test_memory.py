"""Laws of the memory plan: what is where on a GPU, how many KV blocks are left, and what does not fit."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfsim.cost.memory import MemoryPlan, memory_plan
from perfsim.errors import InfeasibleError
from perfsim.ops.params import absorbed_bytes_per_gpu, kv_bytes_per_token, weight_bytes, weight_bytes_per_gpu
from perfsim.serving.replica import plan_replica
from perfsim.spec import catalog
from perfsim.spec.calibration import EngineProfile
from perfsim.spec.load import find_calibration, load_scenario
from perfsim.spec.policy import ParallelPlan, ServingPolicy

ENGINE: EngineProfile = find_calibration(accelerator="h100-80gb-sxm", engine="vllm").engine
FITTING = (
    "llama-3.1-8b-instruct",
    "llama-2-7b-hf",
    "Qwen--Qwen3-32B-FP8",
    "qwen3-30b-a3b",
    "deepseek-v2-lite",
    "openai--gpt-oss-20b",
)


def plan(model: str, accelerator: str = "h100-80gb-sxm", **changes: Any) -> MemoryPlan:
    arch = catalog.model(model)
    parallel = ParallelPlan(**{key: changes.pop(key) for key in ("tp", "dp", "ep", "pp") if key in changes})
    limits = {"max_num_batched_tokens": 8192, "max_num_seqs": 256, "max_model_len": arch.max_position_embeddings}
    policy = ServingPolicy(**limits | changes)
    return memory_plan(
        model=arch, accelerator=catalog.accelerator(accelerator), parallel=parallel, engine=ENGINE, policy=policy
    )


@pytest.mark.parametrize("model", FITTING)
@settings(max_examples=30, deadline=None)
@given(utilization=st.floats(0.75, 1), block_size=st.sampled_from([1, 16, 64, 128]), tp=st.sampled_from([1, 2, 4]))
def test_the_cache_takes_what_is_left(model: str, utilization: float, block_size: int, tp: int) -> None:
    found = plan(model, gpu_memory_utilization=utilization, block_size=block_size, tp=tp)
    block = found.kv_cache / found.kv_blocks
    usable = utilization * 80 * 2**30 * (1 - ENGINE.reserved_fraction)
    left = usable - found.weights - found.activations - found.runtime - found.kv_cache
    assert -1e-3 <= left < block
    arch = catalog.model(model)
    stored = weight_bytes(arch) + absorbed_bytes_per_gpu(arch, tp=1)
    assert found.weights <= stored < tp * found.weights * (1 + 1e-12)
    assert kv_bytes_per_token(arch) * block_size <= tp * block
    if tp == 1:
        assert block == kv_bytes_per_token(arch) * block_size
    # vLLM keeps one block, the null block, for itself.
    assert found.usable_blocks == found.kv_blocks - 1


def test_a_block_of_llama() -> None:
    # 32 layers, K and V of 8 heads of 128 in bf16: 128 KiB per token.
    found = plan("llama-3.1-8b-instruct")
    assert found.kv_cache / found.kv_blocks == 16 * 131072
    halves = plan("llama-3.1-8b-instruct", tp=2)
    assert halves.kv_cache / halves.kv_blocks == 8 * 131072
    assert halves.runtime > found.runtime  # collectives want buffers
    assert halves.kv_blocks > 2 * found.kv_blocks


@pytest.mark.parametrize("model", FITTING)
@settings(max_examples=30, deadline=None)
@given(first=st.floats(0.75, 1), second=st.floats(0.75, 1))
def test_more_utilization_never_means_fewer_blocks(model: str, first: float, second: float) -> None:
    low, high = sorted((first, second))
    few, many = (plan(model, gpu_memory_utilization=value).kv_blocks for value in (low, high))
    assert few <= many
    if high - low > 0.01:
        assert few < many


@pytest.mark.parametrize("model", FITTING)
@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(512, 8192), more=st.integers(0, 8192), seqs=st.integers(1, 256), further=st.integers(0, 256))
def test_bigger_steps_never_leave_more_blocks(model: str, tokens: int, more: int, seqs: int, further: int) -> None:
    base = plan(model, max_num_batched_tokens=tokens, max_num_seqs=seqs)
    assert plan(model, max_num_batched_tokens=tokens + more, max_num_seqs=seqs).kv_blocks <= base.kv_blocks
    assert plan(model, max_num_batched_tokens=tokens, max_num_seqs=seqs + further).kv_blocks <= base.kv_blocks


def test_more_memory_means_more_blocks() -> None:
    blocks = [plan("llama-3.1-8b-instruct", gpu).kv_blocks for gpu in ("l40s-48gb", "h100-80gb-sxm", "h200-141gb-sxm")]
    assert blocks[0] < blocks[1] < blocks[2]
    quantised = plan("Qwen--Qwen3-32B-FP8").kv_blocks
    assert quantised > 3 * plan("Qwen--Qwen3-32B").kv_blocks


def test_overrides_replace_the_sum() -> None:
    assert plan("llama-3.1-8b-instruct", kv_cache_blocks=1234).kv_blocks == 1234
    assert plan("llama-3.1-8b-instruct", kv_cache_memory=1e9).kv_blocks == int(1e9 // (16 * 131072))
    scenario = load_scenario(overrides=["policy.kv_cache_blocks=1000", "policy.watermark=0.01"])
    replica = plan_replica(scenario)
    assert (replica.config.total_blocks, replica.config.watermark_blocks) == (999, 10)


@pytest.mark.parametrize(
    ("model", "accelerator", "tp"),
    [
        ("llama-3.1-70b-instruct", "h100-80gb-sxm", 1),
        ("llama-3.1-70b-instruct", "a100-80gb-sxm", 1),
        ("llama-3.1-8b-instruct", "p100-16gb", 1),
        ("deepseek-ai--DeepSeek-V3", "h100-80gb-sxm", 8),
    ],
)
def test_what_does_not_fit_names_the_memory(model: str, accelerator: str, tp: int) -> None:
    with pytest.raises(InfeasibleError, match="HBM capacity binds") as caught:
        plan(model, accelerator, tp=tp)
    assert caught.value.binding == "HBM capacity"
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    assert catalog.model(model).name in str(caught.value)


def test_enough_gpus_make_it_fit() -> None:
    assert plan("llama-3.1-70b-instruct", tp=2).kv_blocks < plan("llama-3.1-70b-instruct", tp=4).kv_blocks
    assert plan("deepseek-ai--DeepSeek-V3", "h200-141gb-sxm", tp=8).kv_blocks > 1000
    assert plan("openai--gpt-oss-120b").kv_blocks > 1000


@pytest.mark.parametrize("override", [{"kv_cache_blocks": 1000}, {"kv_cache_memory": 1e9}])
def test_a_given_cache_size_does_not_make_weights_fit(override: dict[str, Any]) -> None:
    # 141 GB of weights are loaded before any cache is made; vLLM runs out of memory there, whatever it was told.
    with pytest.raises(InfeasibleError) as caught:
        plan("llama-3.1-70b-instruct", **override)
    assert caught.value.binding == "HBM capacity"


@pytest.mark.parametrize(("block_size", "blocks"), [(16, 9), (64, 3), (128, 2), (1, 129)])
def test_windows_hold_blocks_of_their_own(block_size: int, blocks: int) -> None:
    # gpt-oss: every second of 24 layers attends 128 tokens. A sequence holds the blocks that 128 tokens can touch.
    found = plan("openai--gpt-oss-20b", block_size=block_size)
    assert found.span_blocks == ((blocks, 1),)
    full_layers, kv_heads, dim = 12, 8, 64
    assert found.kv_cache / found.kv_blocks == full_layers * 2 * kv_heads * dim * 2 * block_size
    assert plan("llama-3.1-8b-instruct", block_size=block_size).span_blocks == ()


def test_a_cache_smaller_than_its_windows_is_no_cache() -> None:
    with pytest.raises(InfeasibleError, match="kv_cache_blocks"):
        plan("openai--gpt-oss-20b", kv_cache_blocks=2)
    # The null block, one that all layers share, and one for the windows.
    assert plan("openai--gpt-oss-20b", kv_cache_blocks=3).kv_blocks == 3


def test_latent_attention_keeps_its_expansion_twice() -> None:
    # DeepSeek-V3: 61 layers, 128 heads, a latent of 512 expanded to 128 + 128; copies in bf16 although stored as fp8.
    arch, copies = catalog.model("deepseek-ai--DeepSeek-V3"), 61 * 128 * 512 * (128 + 128) * 2
    for tp in (1, 8):
        assert absorbed_bytes_per_gpu(arch, tp=tp) == copies / tp
    found = plan("deepseek-ai--DeepSeek-V3", "h200-141gb-sxm", tp=8)
    assert found.weights == pytest.approx(weight_bytes_per_gpu(arch, tp=8) + copies / 8, rel=1e-12)
    half = absorbed_bytes_per_gpu(arch, tp=1, pp=2)
    assert half == pytest.approx(copies * 31 / 61, rel=1e-12)
    assert absorbed_bytes_per_gpu(catalog.model("llama-3.1-8b-instruct"), tp=1) == 0


def test_a_recurrent_model_alone_keeps_no_checkpoints() -> None:
    # vLLM caches no prefixes of attention-free models, so a sequence holds one state whatever is asked for.
    on, off = (plan("mistralai--Mamba-Codestral-7B-v0.1", enable_prefix_caching=value) for value in (True, False))
    assert (on.kv_blocks, on.window_blocks) == (off.kv_blocks, off.window_blocks)
    assert on.window_blocks == 0


def test_windowed_layers_alone_keep_their_whole_context() -> None:
    found = plan("microsoft--Phi-mini-MoE-instruct")  # 32 layers, all windowed, K and V of 8 heads of 128
    assert found.kv_cache / found.kv_blocks == 32 * 2 * 8 * 128 * 2 * 16
    assert found.window_blocks == 0
