"""How the tokens of data-parallel ranks reach their experts and come back: what one GPU sends, per all-to-all backend.

Experts in slices (`ep` = 1) need all tokens everywhere: gathered, then summed and scattered. Whole experts need only
their own: sent by an all-to-all, by DeepEP's kernels, or gathered all the same (`allgather_reducescatter`).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from perfsim.ops.gemm import compute_dtype
from perfsim.ops.op import Collective, Direction, ExchangeKernels, Num, Routed
from perfsim.ops.step import StepShape
from perfsim.spec.model import ACTIVATION_BYTES, MixtureOfExperts, ModelArch
from perfsim.spec.policy import All2AllBackend

SCALE_BYTES = (
    4 / 128
)  # DeepEP's 8-bit dispatch: one fp32 scale per 128 values (deep_ep/buffer.py, low_latency_dispatch)


def dispatch(
    model: ModelArch, count: int, moe: MixtureOfExperts, step: StepShape, *, tp: int, dp: int, ep: int,
    backend: All2AllBackend,
) -> Iterator[Collective]:  # fmt: skip
    """Tokens to the GPUs of their experts; quantised first where the experts compute in 8 bits.

    DeepEP and vLLM's gather (vllm/model_executor/layers/fused_moe/prepare_finalize/naive_dp_ep.py, 0.32) send them in 8
    bits; SGLang's gather, which sends 16, is taken for vLLM's.
    """
    act, hidden = ACTIVATION_BYTES[model.dtype], moe.latent_size or model.hidden_size
    if ep == 1:
        yield Collective("all_gather", "expert_gather", count, step.tokens * (hidden * act), dp, stride=tp)
        return
    width = min(act, 1 if compute_dtype(model, model.expert_dtype) == "fp8" else 2)
    if backend == "allgather_reducescatter":
        part = step.expert_tokens * (hidden * width / ep)
        yield Collective("all_gather", "expert_gather", count, part, ep, "group")
    elif backend == "all_to_all":
        sent = step.tokens * (moe.num_experts_per_tok * hidden * width / tp)
        yield Collective("all_to_all", "expert_dispatch", count, sent, ep)
    else:
        row = hidden * (width + SCALE_BYTES if width == 1 else width)
        yield from _by_kernels("dispatch", count, moe, step, row, tp, ep, backend)


def combine(
    model: ModelArch, count: int, moe: MixtureOfExperts, step: StepShape, *, tp: int, dp: int, ep: int,
    backend: All2AllBackend,
) -> Iterator[Collective]:  # fmt: skip
    """Results of the experts back to where the tokens came from, in the activations' own format."""
    act, hidden = ACTIVATION_BYTES[model.dtype], moe.latent_size or model.hidden_size
    everything = step.expert_tokens * (hidden * act)
    if ep == 1:
        yield Collective("reduce_scatter", "expert_reduce", count, everything, dp, "group", stride=tp)
        return
    if backend == "allgather_reducescatter":
        yield Collective("reduce_scatter", "expert_reduce", count, everything, ep, "group")
    elif backend == "all_to_all":
        sent = step.tokens * (moe.num_experts_per_tok * hidden * act / tp)
        yield Collective("all_to_all", "expert_combine", count, sent, ep)
    else:
        yield from _by_kernels("combine", count, moe, step, hidden * act, tp, ep, backend)
    if tp > 1:
        yield Collective("all_gather", "gather_tokens", count, step.tokens * (hidden * act / tp), tp)


def _by_kernels(
    direction: Direction, count: int, moe: MixtureOfExperts, step: StepShape, row_bytes: float,
    tp: int, ep: int, backend: All2AllBackend,
) -> Iterator[Collective]:  # fmt: skip
    """DeepEP's kernels; `deepep_auto` takes the low-latency ones for steps without prompts, the normal ones for others.

    As SGLang's DeepEPMode.AUTO (sglang/srt/layers/moe/utils.py, 0.5.23), but by the rank's own batch, where SGLang asks
    whether any rank has a prompt; the slowest rank, which then has one, decides either way.
    """
    normal = np.minimum(step.prefill_tokens, 1.0)  # of whole tokens: whether there are any
    chosen: dict[ExchangeKernels, Num]
    if backend == "deepep_auto":
        chosen = {"low_latency": 1.0 - normal, "normal": normal}
    else:
        chosen = {"low_latency" if backend == "deepep_low_latency" else "normal": 1.0}
    tokens, picks = step.tokens / tp, moe.num_experts_per_tok
    for kernels, active in chosen.items():
        sent = copies(kernels, gpus=ep, experts=moe.num_experts, picks=picks)
        routed = Routed(kernels, direction, tokens, row_bytes, moe.num_experts, picks)
        name = f"expert_{direction}"
        yield Collective("all_to_all", name, count, tokens * (row_bytes * sent), ep, active=active, routed=routed)


def reached(experts: float, owned: float, picks: int) -> float:
    """The chance that at least one of `picks` distinct experts, drawn evenly, is among the `owned` of a GPU or a node.

    1 - C(experts - owned, picks) / C(experts, picks), for any real `owned`.

    >>> reached(8, 8, 2), round(reached(256, 32, 8), 4), reached(4, 1, 1)
    (1.0, 0.6629, 0.25)
    """
    missed = 1.0
    for pick in range(picks):
        missed *= max(0.0, 1.0 - owned / (experts - pick))
    return 1.0 - missed


def copies(kernels: ExchangeKernels, *, gpus: int, experts: float, picks: int) -> float:
    """Copies of a token, that for its own GPU included: one per pick, or (normal kernels) per GPU with an expert."""
    return float(picks) if kernels == "low_latency" else gpus * reached(experts, experts / gpus, picks)


def out_of_node(work: Collective, nodes: float) -> Num | None:
    """Bytes that a GPU sends to other nodes, of `nodes` in all, where that is not an even share of what it sends.

    As `across_bytes` says; normal kernels send a token once to every node with one of its experts. Else None.
    """
    routed = work.routed
    if work.across_bytes is not None or routed is None or routed.kernels == "low_latency":
        return work.across_bytes
    entered = (nodes - 1.0) * reached(routed.experts, routed.experts / nodes, routed.picks)
    return routed.tokens * (routed.row_bytes * entered)
