"""Products of one layer as an engine's profiler timed them: few shapes, many sizes, kernels of one engine version."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from perfsim.calibrate.rows import Array, Rows, named, number, read
from perfsim.errors import InputError
from perfsim.spec.catalog import accelerator, model
from perfsim.spec.hardware import Accelerator
from perfsim.spec.model import DenseMLP, GroupedQueryAttention, ModelArch

TABLE, SOURCE = "llmservingsim_layers", "casys-kaist/LLMServingSim@5daddb2, MIT"
BACKEND, VERSION, FORMAT = "vllm", "0.19.0", "bf16"
DEVICES = {"RTXPRO6000": "rtx-pro-6000-blackwell-96gb", "RTX4090": "rtx-4090-24gb"}
MODELS = {  # names of the table, and models of the catalogue with the same shapes
    "meta-llama/Llama-3.1-8B": "llama-3.1-8b-instruct", "Qwen/Qwen3-32B": "Qwen--Qwen3-32B",
    "Qwen/Qwen3-30B-A3B-Instruct-2507": "qwen3-30b-a3b",
}  # fmt: skip
HEAD = "lm_head"
BYTES = 2.0  # of a 16-bit number


def product_rows(folder: Path) -> Iterator[Rows]:
    """y[m, n] = x[m, k] @ W[k, n] per device, of which HBM was read: see `_from_memory`.

    Every size counts: powers of two alone fill tiles better than those between. Raises InputError when the table is not
    there.
    """
    raw = read(folder, TABLE, ["hardware", "model", "tp", "op", "size", "time_us"])
    for hardware, device in DEVICES.items():
        parts: list[tuple[Array, Array, Array, Array]] = []
        for name, ours in MODELS.items():
            for tp in sorted({int(value) for value in raw["tp"]}):
                of_model = (raw["hardware"] == hardware) & (raw["model"] == name) & (raw["tp"] == tp)
                products = _products(model(ours), tp)
                layer = BYTES * sum(n * k for op, (n, k) in products.items() if op != HEAD)
                for op, (n, k) in products.items():
                    at = np.flatnonzero(of_model & (raw["op"] == op))
                    m, seconds = number(raw["size"][at]), number(raw["time_us"][at]) * 1e-6
                    held = BYTES * n * k if op == HEAD else layer
                    keep = _from_memory(m, n, k, seconds, held, accelerator(device))
                    parts.append((m[keep], np.full(keep.sum(), n), np.full(keep.sum(), k), seconds[keep]))
        columns = {name: np.concatenate([part[at] for part in parts]) for at, name in enumerate("mnk")}
        if not len(columns["m"]):
            raise InputError(f"{folder / TABLE}.parquet: no products of {hardware}")
        yield Rows(
            device, BACKEND, VERSION, "gemm", FORMAT, TABLE, columns, np.concatenate([part[3] for part in parts]),
            named(columns["n"], columns["k"]),
        )  # fmt: skip


def _products(arch: ModelArch, tp: int) -> dict[str, tuple[float, float]]:
    """(n, k) of the products of one of `tp` shards; experts are no products."""
    attention, mlp, hidden = arch.layers[0].attention, arch.layers[0].mlp, float(arch.hidden_size)
    found = {HEAD: (arch.vocab_size / tp, hidden)}
    if isinstance(attention, GroupedQueryAttention):
        queries = attention.num_attention_heads * attention.head_dim / tp
        cached = 2 * attention.num_key_value_heads * attention.head_dim / tp
        found |= {"qkv_proj": (queries + cached, hidden), "o_proj": (hidden, queries)}
    if isinstance(mlp, DenseMLP):
        width = mlp.intermediate_size / tp
        found |= {"gate_up_proj": (2 * width, hidden), "down_proj": (hidden, width)}
    return found


def _from_memory(m: Array, n: float, k: float, seconds: Array, held: float, chip: Accelerator) -> np.ndarray:
    """Rows whose weights came from HBM: a layer is repeated, and what fits into the L2 cache stays there.

    `held` bytes of weights are read between two repetitions of one product. Left out are rows that are faster than HBM.
    """
    moved = BYTES * (n * k + m * (n + k))
    return (seconds > moved / chip.memory.read_bandwidth) & (held > (chip.l2_bytes or 0.0))
