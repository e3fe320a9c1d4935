"""Kernels of a measured shape as perfsim lowers and prices them, for whole columns of rows at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perfsim.cost.roofline import op_estimate
from perfsim.ops.attention import attention_ops
from perfsim.ops.op import Op
from perfsim.ops.step import FULL, Span, StepShape, attention_spans
from perfsim.spec.calibration import Calibration
from perfsim.spec.load import find_calibration
from perfsim.spec.model import LayerGroup, ModelArch
from validation.compare import facts
from validation.compare.facts import InexpressibleError
from validation.compare.plans import ENGINES
from validation.compare.table import Table

Floats = NDArray[np.float64]
Rows = NDArray[np.intp]
LONGEST = 1 << 40  # positions of a model that stands for one kernel
# Number formats of the tables: (weights, expanded to 16 bits for the arithmetic).
WEIGHTS = {
    "bfloat16": ("bf16", False), "float16": ("fp16", False), "fp8": ("fp8", False), "fp8_block": ("fp8_block", False),
    "nvfp4": ("nvfp4", False), "int8_wo": ("int8", True), "int4_wo": ("int4", True), "w4a16_mxfp4": ("mxfp4", True),
    "w4a8_mxfp4_mxfp8": ("mxfp4", True),
    "sq": ("int8", False),
}  # fmt: skip

# Labels whose arithmetic no weight format of perfsim stands for: 4-bit weights times 8-bit activations.
ARITHMETIC = {"w4a8_mxfp4_mxfp8": "fp8"}


@cache
def calibration(accelerator: str, engine: str, version: str | None = None) -> Calibration:
    """The coefficients for a device and the kernels of an engine; `version` as in a scenario."""
    return find_calibration(accelerator=accelerator, engine=engine, version=version)


def seconds(ops: Iterable[Op], *, accelerator: str, engine: str = "vllm", version: str | None = None) -> Any:
    """Time of all `ops` one after the other on a device of the catalogue, by an engine's kernels."""
    found = calibration(accelerator, ENGINES.get(engine, engine), version)
    chip = facts.accelerator(accelerator)
    return sum(op_estimate(op, chip, found.device, found.power).seconds for op in ops)


def groups_of(table: Table, names: Sequence[str], keep: NDArray[np.bool_] | None = None) -> Iterator[tuple[Any, Rows]]:
    """(values of the columns `names`, rows that have them), every group once, in order of the values' codes."""
    codes, labels = [], []
    for name in names:
        values, found = _coded(table, name)
        labels.append(values)
        codes.append(found)
    rows = np.arange(len(table)) if keep is None else np.flatnonzero(keep)
    if not len(rows):
        return
    joined = np.zeros(len(rows), dtype=np.int64)
    for values, found in zip(labels, codes, strict=True):
        joined = joined * (len(values) + 1) + found[rows]
    order = np.argsort(joined, kind="stable")
    _, starts = np.unique(joined[order], return_index=True)
    for members in np.split(rows[order], starts[1:]):
        yield tuple(values[found[members[0]]] for values, found in zip(labels, codes, strict=True)), members


def _coded(table: Table, name: str) -> tuple[list[Any], NDArray[np.int64]]:
    """(distinct values with None at the end, code of every row); a missing column is None throughout."""
    import pyarrow as pa

    if name not in table.names:
        return [None], np.zeros(len(table), dtype=np.int64)
    data = table.data[name]
    if not pa.types.is_dictionary(data.type):
        data = data.dictionary_encode()
    data = data.unify_dictionaries().combine_chunks()
    if isinstance(data, pa.ChunkedArray):
        data = data.chunk(0)
    values = [*data.dictionary.to_pylist(), None]
    codes = data.indices.cast("int64").fill_null(len(values) - 1).to_numpy(zero_copy_only=False)
    return values, np.asarray(codes)


def one_layer(
    *, attention: Any = None, mlp: Any = None, hidden: int = 4096, weights: str = "bf16", weight_only: bool = False,
) -> ModelArch:  # fmt: skip
    """A model of one layer that stands for a kernel."""
    return ModelArch.model_validate({
        "name": "kernel", "architecture": "measured kernel", "hidden_size": hidden, "vocab_size": 1,
        "layers": (LayerGroup(count=1, attention=attention, mlp=mlp),), "max_position_embeddings": LONGEST,
        "linear_dtype": weights, "expert_dtype": weights, "weight_only": weight_only,
    })  # fmt: skip


def weights_of(label: str | None) -> tuple[str, bool]:
    """(weight format, whether the arithmetic stays at 16 bits) of a table's label."""
    if label not in WEIGHTS:
        raise InexpressibleError(f"number format '{label}' not modelled")
    return WEIGHTS[label]


def decodes(model: ModelArch, *, sequences: Floats, context: Floats) -> StepShape:
    """Steps in which `sequences` sequences decode one token each, with `context` tokens attended or in reach."""
    spans = attention_spans(model)
    attended = tuple(sequences * _limited(span, context) for span in spans)
    nothing = tuple(0.0 * sequences for _ in spans)
    return StepShape(sequences, sequences, sequences, attended, 0.0 * sequences, nothing, nothing)


def prefills(model: ModelArch, *, sequences: Floats, new: Floats, past: Floats) -> StepShape:
    """Steps in which `sequences` prompts compute `new` tokens each after `past` ones."""
    spans = attention_spans(model)
    tokens, nothing = sequences * new, tuple(0.0 * sequences for _ in spans)
    pairs = tuple(sequences * _pairs(span, new, past) for span in spans)
    read = tuple(sequences * (new + (past if span == FULL else np.minimum(past, span.size - 1.0))) for span in spans)
    return StepShape(tokens, sequences, 0.0 * sequences, nothing, tokens, pairs, read)


def joined(first: StepShape, second: StepShape) -> StepShape:
    """A step with the work of both: decodes and a prefill chunk, of one model."""
    sums = {}
    for name in ("tokens", "logits", "decode_sequences", "prefill_tokens"):
        sums[name] = getattr(first, name) + getattr(second, name)
    for name in ("decode_context", "prefill_pairs", "prefill_context"):
        sums[name] = tuple(a + b for a, b in zip(getattr(first, name), getattr(second, name), strict=True))
    return StepShape(**sums)


def attention_kernels(
    model: ModelArch, step: StepShape, *, kinds: Sequence[str], cache_dtype: str = "auto", tp: int = 1
) -> list[Op]:
    """The kernels of the model's first layer of the given kinds; all of the block's with no `kinds`."""
    layer = model.layers[0].model_copy(update={"count": 1})
    ops = attention_ops(model, layer, step, attention_spans(model), tp, cache_dtype)
    return [op for op in ops if not kinds or op.kind in kinds]


def _limited(span: Span, context: Floats) -> Floats:
    return context if span == FULL else np.minimum(context, float(span.size))


def _pairs(span: Span, new: Floats, past: Floats) -> Floats:
    if span == FULL:
        return new * past + new * (new + 1) / 2
    growing = np.clip(span.size - past, 0.0, new)
    pairs: Floats = growing * past + growing * (growing + 1) / 2 + (new - growing) * span.size
    return pairs
