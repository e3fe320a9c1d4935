"""The shape of one engine step: the few sums over the batch on which its cost depends."""

from __future__ import annotations

from dataclasses import dataclass

from perfsim.ops.op import Num
from perfsim.spec.model import ModelArch


def attention_windows(model: ModelArch) -> tuple[int | None, ...]:
    """The distinct attention windows of a model, the unlimited one (None) first."""
    windows = {group.attention.window for group in model.layers}
    return tuple(sorted(windows, key=lambda window: (window is not None, window or 0)))


@dataclass(frozen=True, slots=True)
class StepShape:
    """Sums over the batch of one step (floats), or of many steps at once (arrays of one length).

    `tokens` new tokens enter the layers and `logits` sequences are sampled. The tuples are aligned with
    `attention_windows(model)`: `decode_context` is the number of past tokens attended, summed over the
    `decode_sequences` (the new token included); `prefill_pairs` is the number of (new token, attended token) pairs of
    all prefill chunks and `prefill_context` the number of K/V entries that they read. `group_tokens` counts the new
    tokens of all data-parallel ranks (None: there is one rank).
    """

    tokens: Num
    logits: Num
    decode_sequences: Num
    decode_context: tuple[Num, ...]
    prefill_tokens: Num
    prefill_pairs: tuple[Num, ...]
    prefill_context: tuple[Num, ...]
    group_tokens: Num | None = None

    @property
    def expert_tokens(self) -> Num:
        """New tokens of all data-parallel ranks that share the experts."""
        return self.tokens if self.group_tokens is None else self.group_tokens


def attended_pairs(chunk: int, past: int, window: int | None) -> int:
    """Pairs of a causal chunk: token p attends min(p + 1, window) tokens, summed over past <= p < past + chunk.

    >>> attended_pairs(4, 0, None), attended_pairs(4, 10, None), attended_pairs(4, 2, 3)
    (10, 50, 12)
    """
    end = past + chunk
    if window is None or end <= window:
        return chunk * past + chunk * (chunk + 1) // 2
    growing = max(0, window - past)
    return growing * past + growing * (growing + 1) // 2 + (chunk - growing) * window


def context_read(chunk: int, past: int, window: int | None) -> int:
    """K/V entries that a causal chunk reads: its own and those of the past that its first token still sees."""
    return past + chunk if window is None else chunk + min(past, window - 1)
