"""Norms, activations, rotary embeddings and samplers of three tables of layers, by device, software and family.

Each table ran software of its own. `vllm` are the kernels of vLLM 0.19.0, `pytorch` those of PyTorch that two tables
call (lookups of embeddings, LayerNorm). `unfused` are modules of several kernels: in LLMServingSim's older tables an
RMSNorm of one token takes 17 us, a rotary embedding 25 us. `vidur` are the kernels of its profiler, launched eagerly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from perfsim.calibrate.layer_rows import MODELS
from perfsim.calibrate.rows import Array, Rows, groups, number, read
from perfsim.errors import InputError
from perfsim.spec.catalog import model
from perfsim.spec.model import (
    ACTIVATION_BYTES,
    DenseMLP,
    GroupedQueryAttention,
    LayerGroup,
    MixtureOfExperts,
    ModelArch,
)

LAYERS, OLD_LAYERS, LINEAR = "llmservingsim_layers", "llmservingsim_v0_layers", "vidur_linear_ops"
TABLES = (LAYERS, OLD_LAYERS, LINEAR)
VERSIONS = {"vllm": "0.19.0", "pytorch": "not stated", "unfused": "not stated", "vidur": "not stated"}
DEVICES = {  # names of the tables; TPUs compile a layer as a whole
    "RTXPRO6000": "rtx-pro-6000-blackwell-96gb", "RTX4090": "rtx-4090-24gb", "H100": "h100-80gb-sxm",
    "A6000": "rtx-a6000-48gb", "RTX3090": "rtx-3090-24gb", "a100": "a100-80gb-sxm", "h100": "h100-80gb-sxm",
    "a40": "a40-48gb",
}  # fmt: skip
OLD_MODELS = {
    "meta-llama/Llama-3.1-8B": "llama-3.1-8b-instruct", "meta-llama/Llama-3.1-70B": "meta-llama/Llama-3.1-70B",
    "mistralai/Mixtral-8x7B-v0.1": "mistralai/Mixtral-8x7B-v0.1",
    "microsoft/Phi-mini-MoE-instruct": "microsoft/Phi-mini-MoE-instruct",
}  # fmt: skip
LINEAR_KEYS = ("gpu", "tp", "n_head", "n_kv_head", "n_embd", "n_expanded_embd", "vocab_size", "gated", "op")
NORMS = {"layernorm": "norm", "final_layernorm": "final_norm", "input_layernorm": "norm", "post_layernorm": "norm",
         "post_attention_layernorm": "norm"}  # fmt: skip
OTHERS = {"embedding": "embedding", "emb": "embedding", "act_fn": "activation", "mlp_act": "activation", "add": "add",
          "rotary_emb": "rotary", "rope": "rotary", "attn_rope": "rotary", "qk_norm": "head_norm",
          "sampler": "sampler"}  # fmt: skip
LOGITS = 4.0  # bytes of a logit in the sampler
HALF = 128  # of 256: the share of shapes that no fit sees


@dataclass(frozen=True)
class Kernel:
    """An elementwise kernel: whose it is, its family, and the bytes that it reads and writes per token."""

    backend: str
    family: str
    read: float
    written: float

    @property
    def width(self) -> float:
        """Bytes per token."""
        return self.read + self.written


def kernel_of(table: str, op: str, arch: ModelArch, tp: int) -> Kernel | None:
    """What `op` of a table is on one of `tp` GPUs; None for products, attention and what the model does not have.

    vLLM's norms add and write the residual, those of the other tables do not. Nothing is cut over GPUs that the times
    of a table do not show to be: its norms of q and k are those of one GPU, experts stay whole.
    """
    family = NORMS.get(op, OTHERS.get(op, ""))
    numbers = _numbers(table, op, arch, tp)
    if not family or numbers is None:
        return None
    backend = {LAYERS: "vllm", OLD_LAYERS: "unfused", LINEAR: "vidur"}[table]
    if op in NORMS and table != LAYERS:
        backend, family = ("pytorch", "layer_norm") if arch.norm_bias else (backend, "norm")
    elif family == "embedding" and table != LAYERS:
        backend = "pytorch"
    size = LOGITS if family == "sampler" else ACTIVATION_BYTES[arch.dtype]
    return Kernel(backend, family, numbers[0] * size, numbers[1] * size)


def _numbers(table: str, op: str, arch: ModelArch, tp: int) -> tuple[float, float] | None:
    """(read, written) per token, as `perfsim.ops.elementwise` counts them where the kernel is the same."""
    hidden = float(arch.hidden_size)
    attention = next((group.attention for group in arch.layers if group.attention is not None), None)
    widths = [group.mlp.intermediate_size / tp for group in arch.layers if isinstance(group.mlp, DenseMLP)]
    experts = [g.mlp.moe_intermediate_size for g in arch.layers if isinstance(g.mlp, MixtureOfExperts)]
    gated = any(getattr(group.mlp, "gated", False) for group in arch.layers)
    family = NORMS.get(op, OTHERS.get(op))
    if op in NORMS:
        return (2 * hidden, 2 * hidden) if table == LAYERS else (hidden, hidden)
    if family == "add":
        return 2 * hidden, hidden
    if family == "embedding":
        return hidden, hidden
    if family == "activation" and (widths or experts):
        width = float((widths or experts)[0])
        return (2 if gated else 1) * width, width
    if family == "sampler":
        return float(arch.vocab_size), 0.0
    if family in ("rotary", "head_norm") and isinstance(attention, GroupedQueryAttention):
        shards = tp if family == "rotary" else 1
        heads = attention.num_attention_heads / shards + max(1.0, attention.num_key_value_heads / shards)
        return heads * attention.head_dim, heads * attention.head_dim
    return None


def linear_arch(
    *, heads: int, kv_heads: int, hidden: int, width: int, vocab: int, gated: bool
) -> ModelArch:  # fmt: skip
    """A layer of Vidur's table, in fp16. Its only model without a gate, Phi-2, has LayerNorm."""
    attention = GroupedQueryAttention(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=hidden // heads)
    layer = LayerGroup(count=1, attention=attention, mlp=DenseMLP(intermediate_size=width, gated=gated))
    return ModelArch(name="layer", architecture="measured layer", hidden_size=hidden, vocab_size=vocab,
                     layers=(layer,), max_position_embeddings=1 << 30, dtype="fp16", linear_dtype="fp16",
                     expert_dtype="fp16", norm_bias=not gated)  # fmt: skip


def kernel_rows(device: str, kernel: Kernel, table: str, tokens: Array, seconds: Array) -> Rows:
    """Rows of one kernel; a shape is what it moves per token, and the tokens."""
    width = np.full(len(tokens), kernel.width)
    shape = np.array([f"{kernel.width:g}x{size:g}" for size in tokens], dtype=np.str_)
    columns = {"tokens": tokens, "width": width, "bytes": tokens * width}
    return Rows(
        device, kernel.backend, VERSIONS[kernel.backend], "stream", kernel.family, table, columns, seconds, shape
    )


def held_out_half(rows: Rows) -> np.ndarray:
    """A fixed half of the shapes, by SHA-256 of device, family and shape: copies of a row are in the same half."""
    names, place = np.unique(rows.shape, return_inverse=True)
    out = [hashlib.sha256(f"{rows.device} {rows.format} {name}".encode()).digest()[0] < HALF for name in names]
    return np.asarray(out, dtype=bool)[place]


def elementwise_rows(folder: Path) -> list[Rows]:
    """All rows of the three tables, by software, device and family; InputError when a table is not there or empty."""
    found: dict[tuple[str, str, str], list[Rows]] = {}
    for part in (*_of_models(folder, LAYERS), *_of_models(folder, OLD_LAYERS), *_of_linear(folder)):
        found.setdefault((part.backend, part.device, part.format), []).append(part)
    if not found:
        raise InputError(f"{folder}: no elementwise kernels in {', '.join(TABLES)}")
    return [_joined(parts) for _, parts in sorted(found.items())]


def _of_models(folder: Path, table: str) -> Iterator[Rows]:
    name, size = ("op", "size") if table == LAYERS else ("layer_name", "input")
    keys, models = ("hardware", "model", "tp", name), MODELS if table == LAYERS else OLD_MODELS
    raw = read(folder, table, [*keys, size, "time_us"])
    for (hardware, known, tp, op), at in groups(raw, keys):
        if hardware in DEVICES and known in models:
            kernel = kernel_of(table, op, model(models[known]), int(tp))
            yield from _measured(DEVICES[hardware], kernel, table, raw[size][at], raw["time_us"][at])


def _of_linear(folder: Path) -> Iterator[Rows]:
    raw = read(folder, LINEAR, [*LINEAR_KEYS, "num_tokens", "median_us"])
    for (gpu, tp, heads, kv_heads, hidden, width, vocab, gated, op), at in groups(raw, LINEAR_KEYS):
        arch = linear_arch(heads=int(heads), kv_heads=int(kv_heads), hidden=int(hidden), width=int(width),
                           vocab=int(vocab), gated=gated == "True")  # fmt: skip
        if gpu in DEVICES:
            kernel = kernel_of(LINEAR, op, arch, int(tp))
            yield from _measured(DEVICES[gpu], kernel, LINEAR, raw["num_tokens"][at], raw["median_us"][at])


def _measured(device: str, kernel: Kernel | None, table: str, tokens: Any, micros: Any) -> Iterator[Rows]:
    if kernel is None:
        return
    keep = (number(tokens) > 0) & (number(micros) > 0)
    if keep.any():
        yield kernel_rows(device, kernel, table, number(tokens)[keep], number(micros)[keep] * 1e-6)


def _joined(parts: list[Rows]) -> Rows:
    first = parts[0]
    columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in first.columns}
    tables = ", ".join(sorted({part.table for part in parts}))
    return Rows(first.device, first.backend, first.version, "stream", first.format, tables, columns,
                np.concatenate([part.seconds for part in parts]),
                np.concatenate([part.shape for part in parts]))  # fmt: skip
