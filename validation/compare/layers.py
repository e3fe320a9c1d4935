"""Tables of a model's layers, one operator per row: LLMServingSim's two and Vidur's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from perfsim.ops.op import Op
from perfsim.ops.transformer import lower
from perfsim.spec.model import (
    ACTIVATION_BYTES,
    DenseMLP,
    GroupedQueryAttention,
    LayerGroup,
    MixtureOfExperts,
    ModelArch,
)
from validation.compare import facts
from validation.compare.facts import InexpressibleError
from validation.compare.formats import named_arch
from validation.compare.kernel_tables import compare_kernels
from validation.compare.lowered import Floats, Rows, calibration, prefills, seconds
from validation.compare.outcome import Outcome
from validation.compare.streams import bytes_moved, stream_seconds
from validation.compare.table import Table, read_table

LAYERS = frozenset({"hardware", "model", "tp", "op", "size", "size_meaning", "activated_experts", "time_us"})
LAYERS_VERSION = "0.19.0"  # of vLLM, whose kernels they are: meta.yaml of the source
OLD_LAYERS = frozenset({"hardware", "model", "tp", "layer_name", "input", "kv_cache", "time_us"})
LINEAR = frozenset({"gpu", "model", "tp", "n_head", "n_kv_head", "n_embd", "n_expanded_embd", "vocab_size", "gated",
                    "num_tokens", "op", "median_us"})  # fmt: skip
# Names of the tables -> ours. What is fused here and single there has no name: it is one kernel of another size.
PRODUCTS = {"qkv_proj": "qkv_proj", "attn_pre_proj": "qkv_proj", "o_proj": "o_proj", "attn_post_proj": "o_proj",
            "gate_up_proj": "up_proj", "mlp_up_proj": "up_proj", "down_proj": "down_proj", "mlp_down_proj": "down_proj",
            "lm_head": "lm_head", "moe": "experts", "sampler": "sampling"}  # fmt: skip
NORMS = ("layernorm", "final_layernorm", "input_layernorm", "post_layernorm", "post_attention_layernorm")


Record = Callable[[str, Rows, Floats], None]
"""What a fit of `streams` sees of a table: operator, rows, seconds that HBM would need for their bytes."""
Parts = dict[str, list[tuple[Floats, Rows]]]


def compare_layers(table: Table, record: Record | None = None) -> tuple[Table, Outcome]:
    """vLLM's layers, launched eagerly; tokens of prompts, or sequences for head and sampler."""
    size, touched = table.numbers("size"), table.numbers("activated_experts")

    def predict(values: Any, rows: Rows) -> Floats:
        hardware, name, tp, op = values
        accelerator, model = facts.device(hardware), named_arch(name)
        timed = _streamed("llmservingsim_layers", model, op, size[rows], rows, int(tp), accelerator, record)
        if timed is not None:
            return timed
        found = _operator(model, op, size[rows], tp=int(tp), accelerator=accelerator)
        if op == "moe":
            found = _with_experts(model, found, touched[rows])
        return np.asarray(seconds([found], accelerator=accelerator, version=LAYERS_VERSION))

    return compare_kernels(table, ("hardware", "model", "tp", "op"), predict, name="time_us")


def compare_old_layers(table: Table, record: Record | None = None) -> tuple[Table, Outcome]:
    """The older tables: q, k and v, gate and up apart."""
    tokens, cached = table.numbers("input"), table.numbers("kv_cache")

    def predict(values: Any, rows: Rows) -> Floats:
        hardware, name, tp, layer = values
        accelerator, model = facts.device(hardware.removesuffix("-1")), named_arch(name)
        if layer == "attn":
            step = prefills(model, sequences=np.ones(len(rows)), new=tokens[rows], past=cached[rows])
            ops = [op for op in lower(model, step, tp=int(tp)) if isinstance(op, Op) and op.kind == "prefill_attention"]
            return np.asarray(seconds([replace(op, count=1) for op in ops[:1]], accelerator=accelerator))
        name = "rotary_emb" if layer == "rope" else layer
        timed = _streamed("llmservingsim_v0_layers", model, name, tokens[rows], rows, int(tp), accelerator, record)
        if timed is not None:
            return timed
        found = _part(model, layer, tokens[rows], int(tp)) or _operator(
            model, name, tokens[rows], tp=int(tp), accelerator=accelerator
        )
        return np.asarray(seconds([found], accelerator=accelerator))

    return compare_kernels(table, ("hardware", "model", "tp", "layer_name"), predict, name="time_us")


def compare_linear(table: Table, record: Record | None = None) -> tuple[Table, Outcome]:
    """Vidur's operators of one layer in fp16, launched eagerly; the shapes stand in the table."""
    tokens = table.numbers("num_tokens")

    def predict(values: Any, rows: Rows) -> Floats:
        gpu, tp, heads, kv_heads, hidden, width, vocab, gated, op = values
        accelerator = facts.device(gpu)
        attention = GroupedQueryAttention(num_attention_heads=heads, num_key_value_heads=kv_heads,
                                          head_dim=hidden // heads)  # fmt: skip
        layer = LayerGroup(count=1, attention=attention, mlp=DenseMLP(intermediate_size=width, gated=gated))
        model = ModelArch(name="layer", architecture="measured layer", hidden_size=hidden, vocab_size=vocab,
                          layers=(layer,), max_position_embeddings=1 << 30, dtype="fp16", linear_dtype="fp16",
                          expert_dtype="fp16")  # fmt: skip
        name = {"attn_rope": "rotary_emb", "mlp_act": "act_fn"}.get(op, op)
        timed = _streamed("vidur_linear_ops", model, name, tokens[rows], rows, int(tp), accelerator, record)
        if timed is not None:
            return timed
        found = _operator(model, name, tokens[rows], tp=int(tp), accelerator=accelerator)
        return np.asarray(seconds([found], accelerator=accelerator))

    keys = ("gpu", "tp", "n_head", "n_kv_head", "n_embd", "n_expanded_embd", "vocab_size", "gated", "op")
    return compare_kernels(table, keys, predict, name="median_us")


def observed_streams(folder: Path) -> dict[str, dict[str, tuple[Floats, Floats]]]:
    """Per layer table and operator: seconds that HBM would need for its bytes, and those that were measured."""
    found: dict[str, dict[str, tuple[Floats, Floats]]] = {}
    for name, compare, column in (("llmservingsim_layers", compare_layers, "time_us"),
                                  ("llmservingsim_v0_layers", compare_old_layers, "time_us"),
                                  ("vidur_linear_ops", compare_linear, "median_us")):  # fmt: skip
        table = read_table(folder / f"{name}.parquet")
        measured = table.numbers(column) * 1e-6
        parts: Parts = {}

        def record(operator: str, rows: Rows, ideal: Floats, parts: Parts = parts) -> None:
            parts.setdefault(operator, []).append((ideal, rows))

        compare(table, record)
        found[name] = {
            operator: (np.concatenate([ideal for ideal, _ in each]),
                       np.concatenate([measured[rows] for _, rows in each]))
            for operator, each in parts.items()
        }  # fmt: skip
    return found


def _streamed(
    table: str, model: ModelArch, name: str, tokens: Floats, rows: Rows, tp: int, accelerator: str,
    record: Record | None,
) -> Floats | None:  # fmt: skip
    """Seconds of an elementwise kernel or a sampler as the table's benchmark timed it; None for all other operators."""
    numbers = None if name in PRODUCTS else _numbers(model, name, tp)
    eager = not accelerator.startswith("tpu")  # compiled as a whole there
    moved = bytes_moved(model, name, tokens, numbers) if eager else None
    if record is not None and moved is not None:
        record(name, rows, moved / facts.accelerator(accelerator).memory.read_bandwidth)
    return stream_seconds(table, name, moved, accelerator)


def _operator(model: ModelArch, name: str, tokens: Floats, *, tp: int, accelerator: str) -> Op:
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
    numbers = _numbers(model, name, tp)
    if numbers is None:
        raise InexpressibleError(f"operator '{name}' is not modelled on its own")
    act = ACTIVATION_BYTES[model.dtype]
    read, written = (tokens * side * act for side in numbers)
    return Op("elementwise", name, 1, 10.0 * tokens * model.hidden_size, read, written, "fp32")


def _numbers(model: ModelArch, name: str, tp: int) -> tuple[float, float] | None:
    """(read, written) per token by an elementwise kernel, as `perfsim.ops.elementwise` counts them."""
    hidden = float(model.hidden_size)
    attention = next((group.attention for group in model.layers if group.attention is not None), None)
    widths = [group.mlp.intermediate_size for group in model.layers if isinstance(group.mlp, DenseMLP)]
    experts = [g.mlp.moe_intermediate_size for g in model.layers if isinstance(g.mlp, MixtureOfExperts)]
    gated = any(getattr(group.mlp, "gated", False) for group in model.layers)
    if name in NORMS:
        return 2 * hidden, 2 * hidden
    if name == "add":
        return 2 * hidden, hidden
    if name in ("embedding", "emb"):
        return hidden, hidden
    if name == "act_fn" and widths:
        return (2 if gated else 1) * widths[0] / tp, widths[0] / tp
    if name == "act_fn" and experts:  # of one expert, whose gate is a product of its own
        return experts[0] / tp, experts[0] / tp
    if name in ("rotary_emb", "qk_norm") and isinstance(attention, GroupedQueryAttention):
        dim, kv = attention.head_dim, max(1.0, attention.num_key_value_heads / tp)
        positioned = attention.num_attention_heads / tp * dim + kv * dim
        return positioned, positioned
    return None


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
