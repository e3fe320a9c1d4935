"""Attention in batches as engines form them: a prefill chunk beside decodes, decodes of unequal context."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from perfsim.spec.model import GroupedQueryAttention
from validation.compare import facts
from validation.compare.facts import InexpressibleError
from validation.compare.kernel_tables import compare_kernels, merged
from validation.compare.lowered import (
    Floats,
    Rows,
    attention_kernels,
    decodes,
    joined,
    one_layer,
    prefills,
    seconds,
)
from validation.compare.outcome import Outcome
from validation.compare.table import Table

MIXED = frozenset({"hardware", "model", "tp", "prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us"})
SKEWED = frozenset({"hardware", "model", "tp", "n", "nb", "pc", "kp", "kvs", "kv_big", "kv_mean", "t_mean_us",
                    "t_max_us", "t_skew_us"})  # fmt: skip
FRONTIER = frozenset({"gpu", "model", "n_embd", "n_q_head", "n_kv_head", "num_tensor_parallel_workers", "batch_size",
                      "prefill_chunk_size", "kv_cache_size", "is_prefill", "op", "time_us"})  # fmt: skip
KINDS = ("prefill_attention", "decode_attention")


# Iterations that the table with unequal contexts adds up: its times of equal batches (median of 90,000) are 3.00 times
# those of llmservingsim_attention_mixed, whose sidecar states the 3 iterations that both were timed with.
SKEWED_ITERATIONS = 3.0


def compare_mixed(table: Table) -> tuple[Table, Outcome]:
    """One layer's attention on one shard, launched eagerly."""
    chunk, past, count, context = (
        table.numbers(name) for name in ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
    )

    def predict(values: Any, rows: Rows) -> Floats:
        return _batch(values, chunk[rows], past[rows], count[rows], context[rows])

    return compare_kernels(table, ("hardware", "model", "tp"), predict, name="time_us")


def compare_skewed(table: Table) -> tuple[Table, Outcome]:
    """`n` decodes at the mean length, at the long one, and `nb` long ones among short ones."""
    count, long, chunk, past = (table.numbers(name) for name in ("n", "nb", "pc", "kp"))
    short, most, mean = (table.numbers(name) for name in ("kvs", "kv_big", "kv_mean"))
    unequal = (long * most + (count - long) * short) / count
    contexts = {"t_mean_us": (mean, mean), "t_max_us": (most, most), "t_skew_us": (unequal, most)}
    found: Outcome | None = None
    for name, (context, longest) in contexts.items():

        def predict(values: Any, rows: Rows, context: Floats = context, longest: Floats = longest) -> Floats:
            sizes = chunk[rows], past[rows], count[rows], context[rows]
            return SKEWED_ITERATIONS * _batch(values, *sizes, longest=longest[rows])

        _, outcome = compare_kernels(table, ("hardware", "model", "tp"), predict, name=name)
        found = outcome if found is None else merged(found, outcome)
    return table, found or Outcome([])


def compare_frontier(table: Table) -> tuple[Table, Outcome]:
    """Vidur-style profiles of one layer's attention on one shard."""
    batch, chunk, past = (table.numbers(name) for name in ("batch_size", "prefill_chunk_size", "kv_cache_size"))

    def predict(values: Any, rows: Rows) -> Floats:
        gpu, op, hidden, heads, kv_heads, tp = values
        accelerator = facts.device(gpu)
        if op not in ("attn_prefill", "attn_decode"):
            raise InexpressibleError(f"operator '{op}' is not modelled on its own")
        model = one_layer(
            attention=GroupedQueryAttention(num_attention_heads=heads, num_key_value_heads=kv_heads,
                                            head_dim=hidden // heads),
            hidden=hidden,
        )  # fmt: skip
        if op == "attn_decode":
            step = decodes(model, sequences=batch[rows], context=past[rows] + 1)
        else:
            step = prefills(model, sequences=batch[rows], new=chunk[rows], past=past[rows])
        ops = attention_kernels(model, step, kinds=[op.replace("attn_", "") + "_attention"], tp=tp)
        return np.asarray(seconds(ops, accelerator=accelerator))

    keys = ("gpu", "op", "n_embd", "n_q_head", "n_kv_head", "num_tensor_parallel_workers")
    return compare_kernels(table, keys, predict, name="time_us")


def _batch(
    values: Any, chunk: Floats, past: Floats, count: Floats, context: Floats, *, longest: Floats | None = None
) -> Floats:
    """Attention of one layer on one shard: `count` decodes beside a chunk of new tokens after `past` ones.

    `context` is the mean of the decodes', of which `longest` is the longest.
    """
    hardware, name, tp = values
    accelerator, model = facts.device(hardware), facts.arch(facts.model(name))
    step = joined(
        decodes(model, sequences=count, context=context),
        prefills(model, sequences=np.minimum(chunk, 1.0), new=chunk, past=past),
    )
    step = replace(step, decode_longest=context if longest is None else longest)
    ops = attention_kernels(model, step, kinds=KINDS, tp=int(tp))
    return np.asarray(seconds(ops, accelerator=accelerator))
