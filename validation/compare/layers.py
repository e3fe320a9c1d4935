"""Tables of a model's layers, one operator per row: LLMServingSim's two and Vidur's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perfsim.calibrate import elementwise_rows as kernels
from perfsim.ops.op import Op
from perfsim.ops.transformer import lower
from perfsim.spec.model import (
    ACTIVATION_BYTES,
    DenseMLP,
    GroupedQueryAttention,
    MixtureOfExperts,
    ModelArch,
)
from validation.compare import facts
from validation.compare.facts import InexpressibleError
from validation.compare.formats import named_arch
from validation.compare.kernel_tables import compare_kernels
from validation.compare.lowered import Floats, Rows, calibration, prefills, seconds
from validation.compare.outcome import Outcome
from validation.compare.streams import stream_seconds
from validation.compare.table import Table

LAYERS = frozenset({"hardware", "model", "tp", "op", "size", "size_meaning", "activated_experts", "time_us"})
LAYERS_VERSION = "0.19.0"  # of vLLM, whose kernels they are: meta.yaml of the source
OLD_LAYERS = frozenset({"hardware", "model", "tp", "layer_name", "input", "kv_cache", "time_us"})
LINEAR = frozenset({"gpu", "model", "tp", "n_head", "n_kv_head", "n_embd", "n_expanded_embd", "vocab_size", "gated",
                    "num_tokens", "op", "median_us"})  # fmt: skip
# Names of the tables -> ours. What is fused here and single there has no name: it is one kernel of another size.
PRODUCTS = {"qkv_proj": "qkv_proj", "attn_pre_proj": "qkv_proj", "o_proj": "o_proj", "attn_post_proj": "o_proj",
            "gate_up_proj": "up_proj", "mlp_up_proj": "up_proj", "down_proj": "down_proj", "mlp_down_proj": "down_proj",
            "lm_head": "lm_head", "moe": "experts", "sampler": "sampling"}  # fmt: skip
FITTED, KEPT_OUT = "fitted half", "kept-out half"
Halves = NDArray[np.str_]
"""Per row: whether its shape was fitted (`perfsim.calibrate.elementwise`); empty for all but elementwise kernels."""


def compare_layers(table: Table) -> tuple[Table, Outcome]:
    """vLLM's layers, launched eagerly; tokens of prompts, or sequences for head and sampler."""
    size, touched = table.numbers("size"), table.numbers("activated_experts")
    halves = np.full(len(table), "", dtype="<U16")

    def predict(values: Any, rows: Rows) -> Floats:
        hardware, name, tp, op = values
        accelerator, model = facts.device(hardware), named_arch(name)
        timed = _timed(kernels.LAYERS, model, op, size[rows], rows, int(tp), accelerator, halves)
        if timed is not None:
            return timed
        found = _operator(kernels.LAYERS, model, op, size[rows], tp=int(tp), accelerator=accelerator)
        if op == "moe":
            found = _with_experts(model, found, touched[rows])
        return np.asarray(seconds([found], accelerator=accelerator, version=LAYERS_VERSION))

    found = compare_kernels(table, ("hardware", "model", "tp", "op"), predict, name="time_us")
    return _by_half(found, "time_us", halves)


def compare_old_layers(table: Table) -> tuple[Table, Outcome]:
    """The older tables: q, k and v, gate and up apart."""
    tokens, cached = table.numbers("input"), table.numbers("kv_cache")
    halves = np.full(len(table), "", dtype="<U16")

    def predict(values: Any, rows: Rows) -> Floats:
        hardware, name, tp, layer = values
        accelerator, model = facts.device(hardware.removesuffix("-1")), named_arch(name)
        if layer == "attn":
            step = prefills(model, sequences=np.ones(len(rows)), new=tokens[rows], past=cached[rows])
            ops = [op for op in lower(model, step, tp=int(tp)) if isinstance(op, Op) and op.kind == "prefill_attention"]
            return np.asarray(seconds([replace(op, count=1) for op in ops[:1]], accelerator=accelerator))
        timed = _timed(kernels.OLD_LAYERS, model, layer, tokens[rows], rows, int(tp), accelerator, halves)
        if timed is not None:
            return timed
        found = _part(model, layer, tokens[rows], int(tp)) or _operator(
            kernels.OLD_LAYERS, model, layer, tokens[rows], tp=int(tp), accelerator=accelerator
        )
        return np.asarray(seconds([found], accelerator=accelerator))

    found = compare_kernels(table, ("hardware", "model", "tp", "layer_name"), predict, name="time_us")
    return _by_half(found, "time_us", halves)


def compare_linear(table: Table) -> tuple[Table, Outcome]:
    """Vidur's operators of one layer in fp16, launched eagerly; the shapes stand in the table."""
    tokens = table.numbers("num_tokens")
    halves = np.full(len(table), "", dtype="<U16")

    def predict(values: Any, rows: Rows) -> Floats:
        gpu, tp, heads, kv_heads, hidden, width, vocab, gated, op = values
        accelerator = facts.device(gpu)
        model = kernels.linear_arch(
            heads=heads, kv_heads=kv_heads, hidden=hidden, width=width, vocab=vocab, gated=gated
        )
        timed = _timed(kernels.LINEAR, model, op, tokens[rows], rows, int(tp), accelerator, halves)
        if timed is not None:
            return timed
        found = _operator(kernels.LINEAR, model, op, tokens[rows], tp=int(tp), accelerator=accelerator)
        return np.asarray(seconds([found], accelerator=accelerator))

    found = compare_kernels(table, kernels.LINEAR_KEYS, predict, name="median_us")
    return _by_half(found, "median_us", halves)


def _timed(
    table: str, model: ModelArch, op: str, tokens: Floats, rows: Rows, tp: int, accelerator: str, halves: Halves
) -> Floats | None:  # fmt: skip
    """Seconds of an elementwise kernel or a sampler as the table's benchmark timed it; None for all other operators."""
    kernel = kernels.kernel_of(table, op, model, tp)
    found = None if kernel is None else stream_seconds(kernel, accelerator, tokens)
    if found is None:
        return None
    halves[rows] = np.where(found.kept_out, KEPT_OUT, FITTED)
    return found.seconds


def _by_half(found: tuple[Table, Outcome], name: str, halves: Halves) -> tuple[Table, Outcome]:
    """With two more metrics: elementwise kernels of shapes that were fitted, and of those that were not."""
    table, outcome = found
    everything = outcome.values[name]
    for half in (FITTED, KEPT_OUT):
        own = everything.take(halves[everything.rows] == half)
        if len(own.rows):
            outcome.values[f"{name}, {half}"] = own
    return table, outcome


def _operator(table: str, model: ModelArch, name: str, tokens: Floats, *, tp: int, accelerator: str) -> Op:
    """One kernel of one layer on one of `tp` GPUs."""
    if name in PRODUCTS:
        engine = calibration(accelerator, "vllm").engine
        step = replace(prefills(model, sequences=np.ones(len(tokens)), new=tokens, past=0 * tokens), logits=tokens)
        ops = lower(model, step, tp=tp, expert_popularity=engine.expert_popularity,
                    sampling_passes=engine.sampling_passes)  # fmt: skip
        found = [op for op in ops if isinstance(op, Op) and op.name == PRODUCTS[name]]
        if not found:
            raise InexpressibleError(f"operator '{name}' is not part of this model")
        return replace(found[0], count=1)
    kernel = kernels.kernel_of(table, name, model, tp)
    if kernel is None:
        raise InexpressibleError(f"operator '{name}' is not modelled on its own")
    read, written = tokens * kernel.read, tokens * kernel.written
    return Op("elementwise", name, 1, 10.0 * tokens * model.hidden_size, read, written, "fp32")


def _part(model: ModelArch, layer: str, tokens: Floats, tp: int) -> Op | None:
    """A product that is half or a third of a fused one; None when it is not one of these."""
    attention = next((group.attention for group in model.layers if group.attention is not None), None)
    widths = [group.mlp.intermediate_size for group in model.layers if isinstance(group.mlp, DenseMLP)]
    if not isinstance(attention, GroupedQueryAttention):
        return None
    kv = max(1.0, attention.num_key_value_heads / tp) * attention.head_dim
    sides: Mapping[str, float] = {"q_proj": attention.num_attention_heads / tp * attention.head_dim, "k_proj": kv,
                                  "v_proj": kv, **({"gate_proj": widths[0] / tp, "up_proj": widths[0] / tp}
                                                   if widths else {})}  # fmt: skip
    from perfsim.ops.gemm import gemm

    expert = next((group.mlp for group in model.layers if isinstance(group.mlp, MixtureOfExperts)), None)
    if expert is not None and layer in ("expert.w1", "expert.w2", "expert.w3"):  # of one expert, for all the tokens
        width, hidden = expert.moe_intermediate_size / tp, float(model.hidden_size)
        columns, depth = (hidden, width) if layer == "expert.w2" else (width, hidden)
        return gemm(model, layer, 1, tokens, columns, depth, weight_dtype=model.expert_dtype)
    if layer not in sides:
        return None
    return gemm(model, layer, 1, tokens, sides[layer], model.hidden_size, weight_dtype=model.attention_weights)


def _with_experts(model: ModelArch, work: Op, touched: Floats) -> Op:
    """The fused experts when exactly `touched` of them are picked, as the table says."""
    if not np.isfinite(touched).all():
        raise InexpressibleError("number of activated experts not stated")
    change = (touched - work.tiles) * work.pair_flops / 2.0 * ACTIVATION_BYTES[model.dtype]
    return replace(work, tiles=touched, read_bytes=work.read_bytes + change)
