"""Feed-forward blocks of one layer shape, dense or mixture of experts, on one GPU.

Dense blocks are sharded over the `tp` GPUs of a rank. Experts belong to all `tp * dp` GPUs: each one is sharded over
all of them (`ep` = 1), or whole experts are spread over them (`ep` = tp * dp) and tokens travel to their experts.
Neglected: uneven load among the GPUs of an expert-parallel group; every GPU gets the mean.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from perfsim.ops.exchange import combine, dispatch
from perfsim.ops.gemm import compute_dtype, gemm
from perfsim.ops.op import Collective, Driver, Num, Op
from perfsim.ops.params import shared_expert_shards
from perfsim.ops.step import StepShape
from perfsim.spec.model import ACTIVATION_BYTES, WEIGHT_BYTES, DenseMLP, LayerGroup, MixtureOfExperts, ModelArch
from perfsim.spec.policy import All2AllBackend


def mlp_ops(
    model: ModelArch, group: LayerGroup, step: StepShape, *, tp: int, dp: int = 1, ep: int = 1, popularity: float = 0.0,
    backend: All2AllBackend = "all_to_all",
) -> Iterator[Op | Collective]:  # fmt: skip
    """Kernels and exchanges of `group.count` feed-forward blocks up to, and without, the sum over `tp`.

    With expert parallelism over data-parallel ranks, `tp` GPUs send equal shares of their tokens to the experts, by the
    exchange that `backend` names, and gather the results, so that nothing is left to sum (DeepSeek-V3,
    arXiv:2412.19437, 3.4; vLLM's expert parallelism).
    Each of them routes its own share, and computes whole shared experts for it (`is_sequence_parallel` in
    vllm/model_executor/models/deepseek_v2.py, 0.32).
    """
    mlp = group.mlp
    if mlp is None:
        return
    if isinstance(mlp, DenseMLP):
        yield from _dense(model, group.count, step.tokens, mlp.intermediate_size / tp, gated=mlp.gated)
        return
    shards = shared_expert_shards(tp=tp, dp=dp, ep=ep)
    own = step.tokens * (shards / tp)
    yield gemm(model, "router", group.count, own, mlp.num_experts, model.hidden_size, weight_dtype=model.dtype)
    latent, dtype = mlp.latent_size, model.linear_dtype
    if latent:  # every token is projected before it visits its experts, and back afterwards; on every GPU
        yield gemm(model, "latent_down", group.count, own, latent, model.hidden_size, weight_dtype=dtype)
    if dp > 1:
        yield from dispatch(model, group.count, mlp, step, tp=tp, dp=dp, ep=ep, backend=backend)
    yield _experts(
        model, group.count, mlp, step.expert_tokens, tp * dp, ep, popularity, "group" if dp > 1 else "tokens"
    )
    if dp > 1:
        yield from combine(model, group.count, mlp, step, tp=tp, dp=dp, ep=ep, backend=backend)
    if latent:
        yield gemm(model, "latent_up", group.count, own, model.hidden_size, latent, weight_dtype=dtype)
    if mlp.shared_intermediate_size:
        yield from _dense(model, group.count, own, mlp.shared_intermediate_size / shards, gated=mlp.gated)


def sums_over_tp(group: LayerGroup, *, dp: int, ep: int) -> int:
    """How many of the layer's two blocks end with a sum over the `tp` GPUs."""
    if group.parallel:
        return 1
    mixer = group.attention is not None
    mlp = group.mlp is not None and not (isinstance(group.mlp, MixtureOfExperts) and dp > 1 and ep > 1)
    return int(mixer) + int(mlp)


def _dense(model: ModelArch, count: int, tokens: Num, width: float, *, gated: bool) -> Iterator[Op]:
    linear, up = model.linear_dtype, 2 if gated else 1
    yield gemm(model, "up_proj", count, tokens, up * width, model.hidden_size, weight_dtype=linear)
    yield gemm(model, "down_proj", count, tokens, model.hidden_size, width, weight_dtype=linear)


def _experts(
    model: ModelArch, count: int, moe: MixtureOfExperts, tokens: Num, gpus: int, ep: int, popularity: float,
    driver: Driver,
) -> Op:  # fmt: skip
    """The fused expert kernel: only experts that some token picked are read; every picked expert does its FLOPs."""
    matrices = 3 if moe.gated else 2
    width, act = moe.moe_intermediate_size / (gpus / ep), ACTIVATION_BYTES[model.dtype]
    hidden = moe.latent_size or model.hidden_size
    per_expert = matrices * hidden * width
    touched = distinct_experts(tokens, moe.num_experts, moe.num_experts_per_tok, popularity) / ep
    routed = tokens * (moe.num_experts_per_tok / ep)
    read = touched * (per_expert * WEIGHT_BYTES[model.expert_dtype]) + routed * ((hidden + width) * act)
    write = routed * ((matrices - 1) * width * act) + tokens * (hidden * act / ep)
    dtype = compute_dtype(model, model.expert_dtype)
    return Op(
        "moe", "experts", count, routed * (2.0 * per_expert), read, write, dtype, driver, pair_flops=2.0 * per_expert,
        tiles=touched, format=model.expert_dtype, depth=float(hidden * act),
    )  # fmt: skip


def distinct_experts(tokens: Num, num_experts: int, per_token: int, popularity: float) -> Num:
    """Expected number of experts that `tokens` tokens touch when each picks `per_token` of `num_experts`.

    E = sum_i 1 - (1 - q_i)^tokens, with q_i the chance that a token picks expert i: proportional to 1/rank^popularity,
    at most one, summing to `per_token` (0: uniform, then q = per_token / num_experts). Neglected: the dependence among
    one token's picks, correlation between tokens and between layers.
    """
    chance = _pick_chances(num_experts, per_token, popularity)
    stay_away = np.log1p(-np.minimum(chance, 1.0 - 1e-12))
    count, place = np.unique(np.asarray(tokens, dtype=np.float64), return_inverse=True)
    picked = stay_away[stay_away < 0.0]
    distinct = np.full(count.shape, float(picked.size))
    # exp(-38) is below the spacing of doubles at one: from so many tokens on every expert that can be picked is.
    unsure = int(np.searchsorted(count, -38.0 / picked.max())) if picked.size else count.size
    for start in range(0, unsure, 4096):  # bounds the (tokens x experts) table to a few MB
        part = slice(start, min(start + 4096, unsure))
        distinct[part] = -np.expm1(np.outer(count[part], stay_away)).sum(axis=1)
    return float(distinct[0]) if np.ndim(tokens) == 0 else distinct[place]


def _pick_chances(num_experts: int, per_token: int, popularity: float) -> NDArray[np.float64]:
    """Chances proportional to 1/rank^popularity, capped at one, with sum `per_token`; the first ones reach the cap."""
    shares = np.arange(1, num_experts + 1, dtype=np.float64) ** -popularity
    certain = 0
    while certain < min(per_token, num_experts):
        scale = (per_token - certain) / shares[certain:].sum()
        if scale * shares[certain] <= 1.0:
            return np.concatenate([np.ones(certain), scale * shares[certain:]])
        certain += 1
    return np.concatenate([np.ones(certain), np.zeros(num_experts - certain)])
