"""Linear attention and Mamba-2: mixers with a fixed state per sequence, projections included, on one of `tp` GPUs.

Prefill runs the chunked form, decode the recurrence; both cost per token and per sequence, never per context. FLOPs
are those of full chunk tiles, as the open kernels compute them. Per token and head, with chunk C, key width k, value
width v (Mamba-2: state n = k, head p = v):

    gated delta rule   C (6k + 4v) + C^2 / 3 + 6 k v        K K', Q K', T K, T V, A V; an inverse; W S, K' V, Q S
    Mamba-2            2 C v + 4 k v, and 2 C k per group   A X; B' X, C S; C B'

Sources: Parallelizing Linear Transformers with the Delta Rule (arXiv:2406.06484, 3), Gated Delta Networks
(arXiv:2412.06464, 3), Mamba-2 (arXiv:2405.21060, 6); kernels: flash-linear-attention's chunk_gated_delta_rule (C = 64)
and mamba_ssm's mamba_chunk_scan_combined (C = 256 by default), both inside vLLM 0.32. Neglected: gate arithmetic, the
states that prefilling sequences beyond the first bring into a step and leave with.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from perfsim.ops.gemm import gemm
from perfsim.ops.op import Op
from perfsim.ops.params import state_bytes_per_layer
from perfsim.ops.step import StepShape
from perfsim.spec.model import ACTIVATION_BYTES, LayerGroup, LinearAttention, Mamba2, ModelArch

DELTA_CHUNK, SSD_CHUNK = 64, 256
DELTA_KERNELS, SSD_KERNELS = 6, 5  # launches of one chunked pass in the two libraries
DELTA_STEP_FLOPS, SSD_STEP_FLOPS = 7, 6  # per state element and token: decay, read, rank-one update, read


def recurrent_ops(
    model: ModelArch, group: LayerGroup, mixer: LinearAttention | Mamba2, step: StepShape, tp: int
) -> Iterator[Op]:
    """Projections and state kernels of the equal layers of `group`, whose attention is `mixer`."""
    state = float(state_bytes_per_layer(model, group, tp=tp))
    if isinstance(mixer, LinearAttention):
        yield from _linear(model, group.count, mixer, step, tp, state)
    else:
        yield from _mamba2(model, group.count, mixer, step, tp, state)


def _linear(
    model: ModelArch, count: int, mixer: LinearAttention, step: StepShape, tp: int, held: float
) -> Iterator[Op]:
    tokens, hidden, weights = step.tokens, model.hidden_size, model.attention_weights
    act, heads = ACTIVATION_BYTES[model.dtype], mixer.num_value_heads / tp
    keys, values, k, v = mixer.key_width / tp, mixer.value_width / tp, mixer.key_head_dim, mixer.value_head_dim
    gate = values if mixer.gate_rank is None else 0
    wide = 2 * keys + values + gate
    yield gemm(model, "mixer_in_proj", count, tokens, wide, hidden, weight_dtype=weights)
    # Write strengths, and decays: a number per head, or one per channel, at once or through `decay_rank`.
    decays = heads if mixer.decay == "head" else mixer.decay_rank or keys
    yield gemm(model, "mixer_gates", count, tokens, heads + decays, hidden, weight_dtype=weights)
    if mixer.decay == "channel" and mixer.decay_rank is not None:
        yield gemm(model, "decay_proj", count, tokens, keys, mixer.decay_rank, weight_dtype=weights)
    if mixer.gate_rank is not None:
        yield gemm(model, "gate_a_proj", count, tokens, mixer.gate_rank, hidden, weight_dtype=weights)
        yield gemm(model, "gate_b_proj", count, tokens, values, mixer.gate_rank, weight_dtype=weights)
    chunk, state = DELTA_CHUNK, heads * k * v
    flops = heads * (chunk * (6 * k + 4 * v) + chunk * chunk / 3) + 6 * state
    decay_bytes = 4.0 * (heads if mixer.decay == "head" else keys)
    entering = (2 * keys + values) * act + 4.0 * heads + decay_bytes
    between = heads * (k + v) * act + state * act / chunk  # W and U of every token, the state of every chunk
    yield from _state_kernels(
        model, count, step, held, kernels=DELTA_KERNELS, flops=flops, step_flops=DELTA_STEP_FLOPS * state,
        entering=entering, leaving=values * act, between=between,
    )  # fmt: skip
    yield gemm(model, "mixer_out_proj", count, tokens, hidden, values, weight_dtype=weights)


def _mamba2(model: ModelArch, count: int, mixer: Mamba2, step: StepShape, tp: int, held: float) -> Iterator[Op]:
    tokens, hidden, weights = step.tokens, model.hidden_size, model.attention_weights
    act, heads, inner = ACTIVATION_BYTES[model.dtype], mixer.num_heads / tp, mixer.inner_width / tp
    groups, n, p = max(1.0, mixer.n_groups / tp), mixer.state_size, mixer.head_dim
    columns = 2 * inner + 2 * groups * n + heads
    yield gemm(model, "mixer_in_proj", count, tokens, columns, hidden, weight_dtype=weights)
    chunk, state = SSD_CHUNK, heads * p * n
    flops = groups * 2 * chunk * n + heads * 2 * chunk * p + 4 * state
    between = 2 * 4.0 * state / chunk + 4.0 * groups * chunk  # fp32: states before and after passing, C B' tiles
    yield from _state_kernels(
        model, count, step, held, kernels=SSD_KERNELS, flops=flops, step_flops=SSD_STEP_FLOPS * state,
        entering=(inner + 2 * groups * n) * act + 4.0 * heads, leaving=inner * act, between=between,
    )  # fmt: skip
    yield gemm(model, "mixer_out_proj", count, tokens, hidden, inner, weight_dtype=weights)


def _state_kernels(
    model: ModelArch, count: int, step: StepShape, state: float, *, kernels: int,
    flops: float, step_flops: float, entering: float, leaving: float, between: float,
) -> Iterator[Op]:  # fmt: skip
    """The recurrence of all decodes, and the chunked pass over all new prompt tokens (its mean kernel).

    `state`: bytes per sequence; `flops` and `step_flops`: per token; `entering` and `leaving`: bytes per token;
    `between`: bytes per token that one kernel of the chunked pass writes and another reads.
    """
    decodes, new = step.decode_sequences, step.prefill_tokens
    yield Op(
        "recurrence", "state_update", count, decodes * step_flops, decodes * (state + entering),
        decodes * (state + leaving), "fp32", driver="decodes", active=np.minimum(decodes, 1.0),
    )  # fmt: skip
    running = np.minimum(new, 1.0)
    read = (new * (entering + between) + running * state) / kernels
    written = (new * (leaving + between) + running * state) / kernels
    yield Op(
        "recurrence", "chunk_scan", count * kernels, new * (flops / kernels), read, written, model.dtype,
        driver="prefill", active=running,
    )  # fmt: skip
