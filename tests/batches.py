"""Batches of one step as lists of sequences, and the sums over them that the cost model takes."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from perfsim.ops.step import StepShape, attention_windows
from perfsim.spec.model import ModelArch

Chunks = list[tuple[int, int]]

decodes = st.lists(st.integers(0, 200_000), max_size=8)  # tokens of past context of each decoding sequence
prefills = st.lists(st.tuples(st.integers(1, 8192), st.integers(0, 100_000)), max_size=5)  # (chunk, past)


def batch_shape(model: ModelArch, past: list[int], chunks: Chunks) -> StepShape:
    """The step that decodes sequences of `past` tokens and computes prefill `chunks`, summed token by token."""
    reach = [window or 1 << 62 for window in attention_windows(model)]
    new = sum(chunk for chunk, _ in chunks)
    return StepShape(
        tokens=float(len(past) + new),
        logits=float(len(past) + len(chunks)),
        decode_sequences=float(len(past)),
        decode_context=tuple(float(sum(min(tokens + 1, limit) for tokens in past)) for limit in reach),
        prefill_tokens=float(new),
        prefill_pairs=tuple(
            float(sum(np.minimum(np.arange(start + 1, start + chunk + 1), limit).sum() for chunk, start in chunks))
            for limit in reach
        ),
        prefill_context=tuple(
            float(sum(start + chunk - max(0, start + 1 - limit) for chunk, start in chunks)) for limit in reach
        ),
    )


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
    )
