"""What the columns of the tables hold, so that it does not matter which types their writer chose.

Of the columns that a comparison reads, those below hold text or truth values, the others numbers. Numbers as text,
text as bytes, truth values as 0 and 1 and codes of a dictionary become what they stand for; what stands for nothing of
the kind is an InputError. Columns that no comparison reads stay as they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from perfsim.errors import InputError
from validation.compare.table import Table
from validation.compare.values import decoded, plain, value_text, values_of

if TYPE_CHECKING:
    import pyarrow as pa

TEXTS = frozenset({
    "attn_dtype", "backend", "backend_version", "collective", "distribution", "experiment", "framework", "gemm_dtype",
    "gemm_quant_mode", "gemm_type", "gpu", "hardware", "image", "impl", "inter_link", "intra_link", "kernel_source",
    "kv_cache_dtype", "layer_name", "library", "measured", "mla_dtype", "mode", "model", "model_path", "moe_dtype",
    "moe_quant_mode", "notes", "op", "op_name", "origin", "parallel", "phase", "precision", "quant_dtype",
    "same_run_as", "size_meaning", "source", "spec_method", "stages", "system", "version", "vllm_version",
})  # fmt: skip
FLAGS = frozenset({
    "cpu_offload", "decode_dp_attention", "disagg", "ep", "exact_duplicate", "gated", "has_error", "is_prefill",
    "prefill_dp_attention", "prefix_caching",
})  # fmt: skip
# Columns that are read where a table has them; the required ones are in `kinds`.
_SIZES = ("attention_dp_size", "moe_tp_size", "moe_ep_size", "pp_size", "tp_size")
_LATENCIES = ("ttft", "tpot", "e2el")
OPTIONAL = frozenset({
    "backend_version", "exact_duplicate", "gemm_quant_mode", "measured", "moe_quant_mode", "origin", "precision",
    "same_config_tpot_spread", *(side + size for side in ("", "prefill_", "decode_") for size in _SIZES),
    "prefill_num_workers", "decode_num_workers",
    "image", "prefill_tp", "prefill_ep", "prefill_dp_attention", "num_prefill_gpu", "num_decode_gpu",
    "output_tput_per_gpu", "output_throughput", "request_throughput",
    *(f"{statistic}_{name}" for statistic in ("mean", "median", "p90", "p99") for name in _LATENCIES),
    "cpu_kv_blocks", "cpu_offload", "gpu_mem_util", "total_kv_blocks", "same_run_as", "n_success", "requests_per_s",
    "input_tokens_per_s", "tpot_derived_ms", "itl_mean_ms", "has_error",
    *(f"{name}_{level}_ms" for name in ("e2e", "ttft") for level in ("mean", "median", "p90", "p95", "p99")),
    "dp", "model", "num_kv_tokens", "prefix_caching", "queued_engine_s", "activated_experts", "gemm_type",
    "dispatch_sms", "combine_sms",
})  # fmt: skip


def typed(table: Table, required: frozenset[str]) -> Table:
    """The table with its columns as texts, truth values and numbers; InputError for one that holds something else."""
    data = table.data
    for position, field in enumerate(data.schema):
        if field.name not in required and field.name not in OPTIONAL:
            continue
        column = decoded(plain(data[field.name]))
        if field.name in TEXTS:
            column = _texts(table, field.name, column)
        elif field.name in FLAGS:
            column = _flags(table, field.name, column)
        else:
            column = _numbers(table, field.name, column)
        data = data.set_column(position, field.name, column)
    return replace(table, data=data)


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _texts(table: Table, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    import pyarrow as pa

    if _is_text(column.type) or pa.types.is_null(column.type):
        return column
    if pa.types.is_nested(column.type) or pa.types.is_binary(column.type):
        raise _wrong(table, name, column.type, "text")
    texts = [None if value is None else value_text(value) for value in values_of(column)]
    return pa.chunked_array([pa.array(texts, "string")])


def _flags(table: Table, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    import pyarrow as pa

    if pa.types.is_boolean(column.type) or pa.types.is_null(column.type):
        return column
    known = {"true": True, "false": False, "1": True, "0": False}
    found = []
    for value in column.to_pylist():
        text = None if value is None else value_text(value).lower()
        if text is not None and text not in known:
            raise _wrong(table, name, column.type, "true or false")
        found.append(None if text is None else known[text])
    return pa.chunked_array([pa.array(found, "bool")])


def _numbers(table: Table, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    import pyarrow as pa
    import pyarrow.compute as pc

    kind, types = column.type, pa.types
    if types.is_integer(kind) or types.is_null(kind):
        return column
    if types.is_floating(kind):  # infinities are no values either
        return column if pc.all(pc.is_finite(column)).as_py() else pc.if_else(pc.is_finite(column), column, None)
    try:
        if not (_is_text(kind) or types.is_boolean(kind) or types.is_decimal(kind)):
            raise _wrong(table, name, kind, "numbers")
        return column.cast("int8") if types.is_boolean(kind) else column.cast("float64")
    except pa.ArrowException:
        raise _wrong(table, name, kind, "numbers") from None


def _wrong(table: Table, name: str, kind: pa.DataType, expected: str) -> InputError:
    return InputError(f"--table: column '{name}' of '{table.path.name}' holds {kind}, expected {expected}")
