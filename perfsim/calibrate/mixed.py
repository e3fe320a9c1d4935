"""What decodes pay for riding with prompt chunks in one kernel: fitted to steps that mix both.

FlashAttention-2 shares a K/V head's reads among its query heads only while every sequence has one new token. With a
chunk in the batch each query head reads for itself, and finds part of it in the L2 cache.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from perfsim.calibrate.fit import Fitted
from perfsim.calibrate.rows import Array, Rows, number, read
from perfsim.spec.catalog import accelerator

DEVICE, HARDWARE = "rtx-pro-6000-blackwell-96gb", "RTXPRO6000"
# GPUs on which vLLM 0.24 (A100: 0.14) was timed with this kernel; the mixed steps come from one of them.
SAME_KERNEL = frozenset({"a100-80gb-sxm", "l40s-48gb", DEVICE})
HEADS = {  # query and K/V heads, head size, as the models' configurations have them
    "meta-llama/Llama-3.1-8B": (32, 8, 128), "Qwen/Qwen3-32B": (64, 8, 128),
    "Qwen/Qwen3-30B-A3B-Instruct-2507": (32, 4, 128),
}  # fmt: skip
LEAST_SECONDS = 60e-6  # of decodes alone: in shorter ones the launch, which both share, hides the effect


def reread(folder: Path, decode: Fitted, prefill: Fitted) -> tuple[float, float]:
    """(share of a K/V head's reads that each further query head repeats, its standard error) in mixed steps.

    The median over rows of (measured - prefill) / decode = 1 + share x (query heads per K/V head - 1); the error is
    that of the mean over models and shardings.
    """
    names = ["hardware", "model", "tp", "prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us"]
    raw = read(folder, "llmservingsim_attention_mixed", names)
    shares: list[Array] = []
    for model, (heads, kv_heads, dim) in HEADS.items():
        for tp in (1, 2):
            at = (raw["hardware"] == HARDWARE) & (raw["model"] == model) & (raw["tp"] == tp)
            at &= (raw["prefill_chunk"] > 0) & (raw["n_decode"] > 0)
            chunk, past, count, context = (number(raw[name][at]) for name in names[3:7])
            layout = heads / tp, kv_heads / tp, float(dim)
            alone = _seconds(decode, layout, 0 * chunk + 1.0, count, context)
            own = _seconds(prefill, layout, chunk, 0 * chunk + 1.0, chunk + past)
            long = alone > LEAST_SECONDS
            ratio = (number(raw["time_us"][at])[long] * 1e-6 - own[long]) / alone[long]
            shares.append((ratio - 1.0) / (heads / kv_heads - 1.0))
    each = [float(np.median(part)) for part in shares]
    return float(np.median(np.concatenate(shares))), float(np.std(each, ddof=1) / np.sqrt(len(each)))


def _seconds(fitted: Fitted, layout: tuple[float, float, float], new: Array, sequences: Array, context: Array) -> Array:
    heads, kv_heads, dim = layout
    one = np.ones(len(new))
    columns = {
        "heads": heads * one, "tiles": kv_heads * one, "dim": dim * one, "window": 0 * one, "new": new,
        "sequences": sequences, "context": context, "entry": 2 * kv_heads * dim * one, "query": 2 * heads * dim * one,
        "pair": 4 * heads * dim * one,
    }  # fmt: skip
    kind = fitted.form.kind
    rows = Rows(DEVICE, "vllm", "", kind, "bf16", "", columns, one, np.array(["mixed"] * len(new)))
    return fitted.form.seconds(fitted.values, rows, accelerator(DEVICE))
