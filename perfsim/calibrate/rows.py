"""Measured operator rows, read from the public tables and sorted into groups that one curve describes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from perfsim.errors import InputError

Array = NDArray[np.float64]
Kind = Literal["gemm", "decode", "prefill", "moe", "collective", "stream"]

# aiconfigurator's names of systems, and the descriptors they were measured on. It also has Intel's B60: not described.
SYSTEMS = {
    "a100_sxm": "a100-80gb-sxm", "h100_sxm": "h100-80gb-sxm", "h200_sxm": "h200-141gb-sxm", "l40s": "l40s-48gb",
    "b200_sxm": "b200-180gb-sxm", "gb200": "gb200-186gb", "rtx_pro_6000_server": "rtx-pro-6000-blackwell-96gb",
}  # fmt: skip
FORMATS = {
    "bfloat16": "bf16", "fp8": "fp8", "fp8_block": "fp8_block", "nvfp4": "nvfp4", "int8_wo": "int8", "int4_wo": "int4",
    "w4a16_mxfp4": "mxfp4",
}  # fmt: skip
# Kernels that were timed before they were tuned: vLLM's 8-bit experts take 2.5 times as long as its 16-bit ones there.
UNTUNED = {("h100-80gb-sxm", "vllm", "moe", "fp8"), ("h200-141gb-sxm", "vllm", "moe", "fp8")}
# Kernels of aic_quantize. SGLang's takes ten times as long as its bytes; it is not one that stands for others.
STREAMS = {
    ("scale_matrix", "vllm"): "quantise", ("scale_matrix", "trtllm"): "quantise",
    ("scale_matrix", "sglang"): "quantise-slow", ("computescale", "trtllm"): "requantise",
}  # fmt: skip
HELD_OUT = 64  # of 256: the share of shapes that no fit ever sees


@dataclass(frozen=True)
class Rows:
    """Rows of one device, backend, kind of operator and number format: columns of equal length and measured seconds.

    `shape` names what stays together when rows are held out: every size of one matrix, head layout or expert block.
    """

    device: str
    backend: str
    version: str
    kind: Kind
    format: str
    table: str
    columns: dict[str, Array]
    seconds: Array
    shape: NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.seconds)

    def where(self, keep: NDArray[np.bool_] | NDArray[np.int64]) -> Rows:
        """The rows that a mask or an index picks."""
        columns = {name: values[keep] for name, values in self.columns.items()}
        return replace(self, columns=columns, seconds=self.seconds[keep], shape=self.shape[keep])

    def held_out(self) -> NDArray[np.bool_]:
        """A fixed quarter of the shapes, by SHA-256 of device and shape: the same for every backend and format."""
        names, place = np.unique(self.shape, return_inverse=True)
        out = [hashlib.sha256(f"{self.device} {name}".encode()).digest()[0] < HELD_OUT for name in names]
        return np.asarray(out, dtype=bool)[place]

    def digest(self) -> str:
        """SHA-256 over the sorted rows: shape, columns and seconds."""
        fields = [self.columns[name] for name in sorted(self.columns)]
        lines = sorted(
            f"{self.shape[row]} {' '.join(repr(float(field[row])) for field in fields)} {float(self.seconds[row])!r}"
            for row in range(len(self))
        )
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read(folder: Path, name: str, columns: list[str]) -> dict[str, NDArray[Any]]:
    """Columns of a Parquet table; InputError when it is not there or lacks one of them."""
    from pyarrow import parquet

    path = folder / f"{name}.parquet"
    if not path.is_file():
        raise InputError(f"{path}: no such table")
    missing = sorted(set(columns) - set(parquet.read_schema(path).names))
    if missing:
        raise InputError(f"{path}: no column {', '.join(missing)}")
    table = parquet.read_table(path, columns=columns)
    return {column: np.asarray(table[column].to_numpy(zero_copy_only=False)) for column in columns}


def groups(raw: dict[str, NDArray[Any]], keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], NDArray[np.int64]]]:
    """Row numbers by the values of `keys`, in sorted order."""
    joined = np.array(["\t".join(map(str, values)) for values in zip(*(raw[key] for key in keys), strict=True)])
    order = np.argsort(joined, kind="stable")
    names, starts = np.unique(joined[order], return_index=True)
    for name, places in zip(names, np.split(order, starts[1:]), strict=True):
        yield tuple(str(name).split("\t")), places


def number(values: NDArray[Any]) -> Array:
    """A column as floats; integers of 32 bits would overflow in products."""
    return values.astype(np.float64)


def named(*parts: Array) -> NDArray[np.str_]:
    """The names of shapes, from their numbers."""
    return np.array(["x".join(f"{value:g}" for value in values) for values in zip(*parts, strict=True)])


def gemm_rows(folder: Path) -> Iterator[Rows]:
    """aic_gemm: y[m, n] = x[m, k] @ W[k, n], per backend and format."""
    keys = ("system", "framework", "version", "gemm_dtype")
    raw = read(folder, "aic_gemm", [*keys, "m", "n", "k", "latency_us"])
    for (system, backend, version, dtype), at in groups(raw, keys):
        m, n, k = (number(raw[name][at]) for name in "mnk")
        yield from _known(
            system, backend, version, "gemm", FORMATS.get(dtype), "aic_gemm", {"m": m, "n": n, "k": k},
            raw["latency_us"][at], (n, k),
        )  # fmt: skip


def attention_rows(folder: Path, kind: Literal["decode", "prefill"]) -> Iterator[Rows]:
    """aic_attention_*: equal sequences, grouped queries, per backend and format of the cache.

    `new` tokens of each of `sequences` end at `context`; a sliding window limits what they attend. `entry` and `query`
    are the numbers in a cached entry and moved per new token, `pair` FLOPs per attended pair. Rows whose
    attention itself runs in fp8 are left out: no model is lowered to it.
    """
    keys = ("system", "framework", "version", "attn_dtype", "kv_cache_dtype")
    own = ["head_dim", "window_size", "num_heads", "num_key_value_heads", "isl", "batch_size", "step", "latency_us"]
    table = f"aic_attention_{kind}"
    raw = read(folder, table, [*keys, *own])
    for (system, backend, version, arithmetic, cached), at in groups(raw, keys):
        dim, window, heads, kv_heads, new, batch, past = (number(raw[name][at]) for name in own[:-1])
        kv_heads = np.where(kv_heads == 0, heads, kv_heads)  # the source writes 0 for as many as queries
        columns = {
            "heads": heads, "tiles": kv_heads, "dim": dim, "window": window, "new": new, "sequences": batch,
            "context": new + past, "entry": 2 * kv_heads * dim, "query": 2 * heads * dim, "pair": 4 * heads * dim,
        }  # fmt: skip
        stored = FORMATS.get(cached) if arithmetic == "bfloat16" else None
        yield from _known(
            system, backend, version, kind, stored, table, columns, raw["latency_us"][at],
            (heads, kv_heads, dim, window),
        )  # fmt: skip


def mla_rows(folder: Path) -> Iterator[Rows]:
    """aic_mla: kernels of DeepSeek-V3's latent attention, columns as in `attention_rows`.

    Decode attends the latent entry itself (576 numbers, 512 of them values), prefill expanded heads of 192 and 128.
    """
    keys = ("system", "framework", "version", "phase", "kv_cache_dtype")
    own = ["num_heads", "batch_size", "isl", "step", "latency_us"]
    raw = read(folder, "aic_mla", [*keys, *own])
    for (system, backend, version, phase, cached), at in groups(raw, keys):
        if phase not in ("decode", "prefill") or FORMATS.get(cached) is None:
            continue
        heads, batch, new, past = (number(raw[name][at]) for name in own[:-1])
        query, value = (576, 512) if phase == "decode" else (192, 128)
        one = np.ones(len(at))
        columns = {
            "heads": heads, "tiles": one, "dim": (query + value) / 2 * one, "window": 0 * one, "new": new,
            "sequences": batch, "context": new + past, "entry": 576 * one, "query": heads * (query + value),
            "pair": 2 * heads * (query + value),
        }  # fmt: skip
        kind: Kind = "decode" if phase == "decode" else "prefill"
        yield from _known(
            system,
            backend,
            version,
            kind,
            f"mla-{FORMATS[cached]}",
            "aic_mla",
            columns,
            raw["latency_us"][at],
            (heads, batch),
        )


def collective_rows(folder: Path) -> Iterator[Rows]:
    """collectives: one node, the newest version each; the format is the kind of collective.

    All-reduces as engines run them in CUDA graphs, and everything as nccl-tests timed NCCL, whose all-reduces are a
    backend of their own; its other kernels are those of every engine. `bytes` is what one GPU contributes to a gather
    and the whole vector elsewhere. L40S nodes of 4 and 8 GPUs are left out: their host had no peer-to-peer.
    """
    keys = ("system", "library", "framework", "op_name", "impl", "version")
    raw = read(folder, "collectives", [*keys, "source", "dtype", "num_nodes", "num_gpus", "bytes", "latency_us"])
    ours = (raw["source"] == "aiconfigurator") & (raw["num_nodes"] == 1) & (raw["dtype"] != "int8")
    raw = {name: values[ours] for name, values in raw.items()}
    for (system, library, framework, name, impl, version), at in groups(raw, keys):
        kind = {"alltoall": "all_to_all"}.get(name, name)
        engine = kind == "all_reduce" and impl.lower() in ("vllm_graph", "sglang_graph", "trtllm")
        if kind not in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all") or not (
            engine or library == "nccl"
        ):
            continue
        backend = framework if engine else "nccl" if kind == "all_reduce" else "vllm"
        gpus, size = number(raw["num_gpus"][at]), number(raw["bytes"][at])
        part = size / gpus if kind == "all_gather" else size
        keep = (gpus == 2) | (system != "l40s")
        yield from _known(
            system, backend, version if engine else f"nccl {version}", "collective", kind, "collectives",
            {"gpus": gpus[keep], "bytes": part[keep]}, raw["latency_us"][at][keep], (gpus[keep], size[keep]),
        )  # fmt: skip


def stream_rows(folder: Path) -> Iterator[Rows]:
    """aic_quantize: activations to 8 bits, with a given scale or after a pass that finds it.

    vLLM's times of that pass are left out: they are differences, of up to twice the rate that HBM has.
    """
    keys = ("system", "framework", "version", "op", "quant_dtype")
    raw = read(folder, "aic_quantize", [*keys, "m", "k", "latency_us"])
    for (system, backend, version, op, dtype), at in groups(raw, keys):
        kernel = STREAMS.get((op, backend)) if dtype == "fp8" else None
        m, k = number(raw["m"][at]), number(raw["k"][at])
        columns = {"rows": m, "width": k, "bytes": m * k * (5.0 if kernel == "requantise" else 3.0)}
        yield from _known(system, backend, version, "stream", kernel, "aic_quantize", columns, raw["latency_us"][at],
                          (k,))  # fmt: skip


def moe_rows(folder: Path) -> Iterator[Rows]:
    """aic_moe: gated fused experts of one rank; `skew` is the exponent of the measured routing, 0 for equal loads."""
    keys = ("system", "framework", "version", "moe_dtype", "distribution")
    own = ["hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size", "num_tokens", "latency_us"]
    raw = read(folder, "aic_moe", [*keys, "kernel_source", *own])
    gated = np.array([not str(name).endswith("nongated") for name in raw["kernel_source"]])
    for (system, backend, version, dtype, routing), found in groups(raw, keys):
        at = found[gated[found]]
        hidden, inter, top, experts, tp, ep, tokens = (number(raw[name][at]) for name in own[:-1])
        skew = float(routing.rpartition("_")[2]) if routing.startswith("power_law") else 0.0
        columns = {
            "hidden": hidden, "inter": inter / tp, "top": top, "experts": experts, "ranks": ep, "tokens": tokens,
            "skew": np.full(len(at), skew),
        }  # fmt: skip
        yield from _known(
            system, backend, version, "moe", FORMATS.get(dtype), "aic_moe", columns, raw["latency_us"][at],
            (hidden, columns["inter"], top, experts, ep),
        )  # fmt: skip


def _known(
    system: str, backend: str, version: str, kind: Kind, stored: str | None, table: str, columns: dict[str, Array],
    latency_us: NDArray[Any], shape: tuple[Array, ...],
) -> Iterator[Rows]:  # fmt: skip
    known = system in SYSTEMS and stored is not None and len(latency_us)
    if known and stored and (SYSTEMS[system], backend, kind, stored) not in UNTUNED:
        seconds = number(latency_us) * 1e-6
        yield Rows(SYSTEMS[system], backend, version, kind, stored, table, columns, seconds, named(*shape))


def newest(rows: list[Rows]) -> list[Rows]:
    """One group per device, backend, kind and format: the newest version, routings of experts put together."""
    found: dict[tuple[str, str, str, str], list[Rows]] = {}
    for group in rows:
        found.setdefault((group.device, group.backend, group.kind, group.format), []).append(group)
    return [
        _joined([g for g in same if g.version == max((h.version for h in same), key=_age)]) for same in found.values()
    ]


def _age(version: str) -> list[int]:
    """The numbers in a version, so that 0.5.14 is newer than 0.5.9."""
    return [int(part) for part in re.findall(r"\d+", version)]


def _joined(same: list[Rows]) -> Rows:
    first = same[0]
    columns = {name: np.concatenate([group.columns[name] for group in same]) for name in first.columns}
    seconds = np.concatenate([group.seconds for group in same])
    return replace(first, columns=columns, seconds=seconds, shape=np.concatenate([group.shape for group in same]))
