"""Lowering: one engine step of a decoder-only transformer under tensor parallelism, as operators of one GPU.

Sharding is Megatron's (Shoeybi et al., arXiv:1909.08053): QKV and up projections by columns, output and down
projections by rows, one all-reduce after each block, vocabulary-parallel embedding and head. K/V heads are replicated
when there are fewer than GPUs. Norms of q and k over all heads first sum their variances over the GPUs
(`vllm/model_executor/layers/minimax_rms_norm/rms_norm_tp.py`, vLLM 0.32). Neglected: the embedding lookup, position
encodings' tables and sampling of more than one token. Each term is what the algorithm must do; kernels that do more are
the business of `perfsim.cost`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from perfsim.ops.attention import attention_ops
from perfsim.ops.cache import CacheDType
from perfsim.ops.elementwise import elementwise_ops
from perfsim.ops.gemm import gemm
from perfsim.ops.mlp import mlp_ops, sums_over_tp
from perfsim.ops.op import Collective, Op
from perfsim.ops.step import StepShape, attention_spans
from perfsim.spec.model import ACTIVATION_BYTES, GroupedQueryAttention, ModelArch
from perfsim.spec.policy import All2AllBackend

LOGIT_BYTES = 4  # vLLM samples from fp32 logits
FP32_BYTES = 4


def lower(
    model: ModelArch, step: StepShape, *, tp: int, dp: int = 1, ep: int = 1, pp: int = 1,
    expert_popularity: float = 0.0, sampling_passes: float = 1.0, sampling_kernels: int = 1,
    kv_cache_dtype: CacheDType = "auto", all2all_backend: All2AllBackend = "all_to_all",
) -> list[Op | Collective]:  # fmt: skip
    """All work of one step on one of `tp` GPUs, in execution order; kernels of equal layers share one entry.

    `dp` ranks share the experts (see `mlp_ops`), which `all2all_backend` brings their tokens to. With `pp` stages it is
    the work of one GPU of each stage together.

    `expert_popularity` is the Zipf exponent of expert choice, `sampling_passes` how often the engine's sampler streams
    the logits, in `sampling_kernels` kernels, `kv_cache_dtype` how K and V are stored. Quantities of the result have
    the type of `step`'s.
    """
    spans = attention_spans(model)
    work: list[Op | Collective] = []
    for group in model.layers:
        work += attention_ops(model, group, step, spans, tp, kv_cache_dtype)
        work += mlp_ops(model, group, step, tp=tp, dp=dp, ep=ep, popularity=expert_popularity, backend=all2all_backend)
        work += elementwise_ops(model, group, step, tp)
        if model.hyper_connections:
            work.append(_stream_weights(model, group.count * group.blocks, step))
        if tp > 1:
            payload = step.tokens * (model.hidden_size * ACTIVATION_BYTES[model.dtype])
            sums = sums_over_tp(group, dp=dp, ep=ep)
            if sums:
                work.append(Collective("all_reduce", "all_reduce", sums * group.count, payload, tp))
            if isinstance(group.attention, GroupedQueryAttention) and group.attention.qk_norm == "all_heads":
                variances = step.tokens * (2.0 * FP32_BYTES)  # of q and of k, each over all heads
                work.append(Collective("all_reduce", "qk_norm", group.count, variances, tp))
    if pp > 1:
        hidden = step.tokens * (model.hidden_size * ACTIVATION_BYTES[model.dtype] / tp)
        work.append(Collective("send_recv", "pipeline", pp - 1, hidden, pp, stride=tp * dp))
    work += _head(model, step, tp, sampling_passes, sampling_kernels)
    return work


def _stream_weights(model: ModelArch, count: int, step: StepShape) -> Op:
    """Weights of mixing n residual streams, read off all of them: n to the block, n back, n x n among themselves.

    As in DeepSeek-V4 (`vllm/models/deepseek_v4/nvidia/model.py`): an fp32 matrix of n (n + 2) rows on every GPU.
    """
    streams, act = model.hyper_connections, ACTIVATION_BYTES[model.dtype]
    rows, wide = streams * (streams + 2), streams * model.hidden_size
    return Op(
        "gemm", "stream_weights", count, step.tokens * (2.0 * rows * wide),
        4.0 * rows * wide + step.tokens * (wide * act), step.tokens * (4.0 * rows), "fp32",
    )  # fmt: skip


def _head(
    model: ModelArch, step: StepShape, tp: int, sampling_passes: float, kernels: int
) -> Iterator[Op | Collective]:  # fmt: skip
    head = gemm(model, "lm_head", 1, step.rows, model.vocab_size / tp, model.hidden_size, weight_dtype=model.dtype)
    yield replace(head, kind="lm_head", driver="logits")
    if tp > 1:
        payload = step.rows * (model.vocab_size / tp * ACTIVATION_BYTES[model.dtype])
        yield Collective("all_gather", "gather_logits", 1, payload, tp, "logits")
    # The fp32 logits of every sampled position, on every GPU: sampling is not sharded.
    logits = step.rows * (model.vocab_size * LOGIT_BYTES * sampling_passes / kernels)
    flops = step.rows * (float(model.vocab_size) / kernels)
    yield Op("sampling", "sampling", kernels, flops, logits, 0.0 * logits, "fp32", "logits")
