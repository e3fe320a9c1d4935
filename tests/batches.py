"""Batches of one step as lists of sequences, and the sums over them that the cost model takes."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from perfsim.ops.step import Span, StepShape, attention_spans, context_read
from perfsim.spec.calibration import DeviceEfficiency
from perfsim.spec.model import ModelArch

Chunks = list[tuple[int, int]]

decodes = st.lists(st.integers(0, 200_000), max_size=8)  # tokens of past context of each decoding sequence
prefills = st.lists(st.tuples(st.integers(1, 8192), st.integers(0, 100_000)), max_size=5)  # (chunk, past)


def batch_shape(model: ModelArch, past: list[int], chunks: Chunks) -> StepShape:
    """The step that decodes sequences of `past` tokens and computes prefill `chunks`, summed token by token."""
    spans = attention_spans(model)
    new = sum(chunk for chunk, _ in chunks)
    return StepShape(
        tokens=float(len(past) + new),
        logits=float(len(past) + len(chunks)),
        decode_sequences=float(len(past)),
        decode_context=tuple(float(sum(span.attended(tokens) for tokens in past)) for span in spans),
        prefill_tokens=float(new),
        prefill_pairs=tuple(float(sum(_pairs(span, chunk, start) for chunk, start in chunks)) for span in spans),
        prefill_context=tuple(float(sum(context_read(*work, span) for work in chunks)) for span in spans),
        decode_longest=float(max(past, default=-1) + 1),
        prefill_longest=float(max((chunk + start for chunk, start in chunks), default=0)),
    )


def _pairs(span: Span, chunk: int, start: int) -> int:
    """Token by token, as arrays."""
    positions = np.arange(start, start + chunk)
    if span.kind == "chunk":
        return int((positions % span.size + 1).sum())
    return int(np.minimum(positions + 1, span.size or 1 << 62).sum())


def stacked(steps: list[StepShape]) -> StepShape:
    """Many steps as one shape of arrays."""
    windows = range(len(steps[0].decode_context))
    return StepShape(
        np.array([step.tokens for step in steps]),
        np.array([step.logits for step in steps]),
        np.array([step.decode_sequences for step in steps]),
        tuple(np.array([step.decode_context[window] for step in steps]) for window in windows),
        np.array([step.prefill_tokens for step in steps]),
        tuple(np.array([step.prefill_pairs[window] for step in steps]) for window in windows),
        tuple(np.array([step.prefill_context[window] for step in steps]) for window in windows),
        decode_longest=np.array([step.decode_longest for step in steps]),
        prefill_longest=np.array([step.prefill_longest for step in steps]),
    )


def decode_knots(device: DeviceEfficiency, knots: tuple[tuple[float, float], ...]) -> DeviceEfficiency:
    """The device with these attention knots in place of what was fitted to it."""
    curves = device.curves.model_copy(update={"decode": {}})
    return device.model_copy(update={"decode_attention": knots, "curves": curves})
