"""The shape of one engine step: the few sums over the batch on which its cost depends."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from perfsim.ops.op import Num
from perfsim.spec.model import Attention, ModelArch


class Span(NamedTuple):
    """Which tokens the token at position p (p = 0 is the first) attends, itself included.

    `full`: all p + 1. `window`: the last min(p + 1, size). `chunk`: those of its own chunk, p mod size + 1. `top_k`:
    any min(p + 1, size) of them; unlike a window they may lie anywhere in the context.
    """

    kind: Literal["full", "window", "chunk", "top_k"]
    size: int = 0

    def attended(self, position: int) -> int:
        """Tokens that the token at `position` attends.

        >>> [Span("chunk", 4).attended(p) for p in (0, 3, 4, 9)], Span("top_k", 4).attended(9)
        ([1, 4, 1, 2], 4)
        """
        if self.kind == "full":
            return position + 1
        if self.kind == "chunk":
            return position % self.size + 1
        return min(position + 1, self.size)

    def mean_attended(self, context: float) -> float:
        """What a sequence of about `context` tokens attends per step; half a chunk once there are several."""
        if self.kind == "full":
            return context
        if self.kind == "chunk" and context > self.size:
            return (self.size + 1) / 2
        return min(context, float(self.size))


FULL = Span("full")


def reaches(attention: Attention | None) -> tuple[tuple[Span, float], ...]:
    """(span, cached entries per token of it) of the entries that one layer attends; empty without softmax attention.

    Summaries of r tokens count as 1/r entry per token. That is the smooth form of floor(context / r), at most one entry
    too many per summary kind, and min(context // r, k) is the span `top_k` of k * r tokens.
    """
    reach = None if attention is None else attention.reach
    if reach is None:
        return ()
    parts: list[tuple[Span, float]] = []
    if reach.chunk is not None:
        parts.append((Span("chunk", reach.chunk), 1.0))
    elif reach.window is not None:
        parts.append((Span("window", reach.window), 1.0))
    elif not reach.compress_ratio:
        parts.append((FULL if reach.top_k is None else Span("top_k", reach.top_k), 1.0))
    if reach.compress_ratio:
        far = FULL if reach.top_k is None else Span("top_k", reach.top_k * reach.compress_ratio)
        parts.append((far, 1.0 / reach.compress_ratio))
    return tuple(parts)


def attention_spans(model: ModelArch) -> tuple[Span, ...]:
    """The distinct spans of a model, the unlimited one first; it stands alone where nothing is attended at all.

    A sparse indexer scans the whole context, so the unlimited span belongs to a model that has one.
    """
    found: set[Span] = set()
    for group in model.layers:
        found |= {span for span, _ in reaches(group.attention)}
        indexer = getattr(group.attention, "indexer", None)
        if indexer is not None and not indexer.shared:
            found.add(FULL)
    return tuple(sorted(found, key=lambda span: (span != FULL, span))) or (FULL,)


@dataclass(frozen=True, slots=True)
class StepShape:
    """Sums over the batch of one step (floats), or of many steps at once (arrays of one length).

    `tokens` new tokens enter the layers and `logits` sequences are sampled. The tuples are aligned with
    `attention_spans(model)`: `decode_context` is the number of tokens attended, summed over the `decode_sequences` (the
    new token included); `prefill_pairs` is the number of (new token, attended token) pairs of all prefill chunks and
    `prefill_context` the number of K/V entries that they read. `group_tokens` counts the new tokens of all
    data-parallel ranks (None: there is one rank). `decode_longest` is the longest context that a decode attends and
    `prefill_longest` the most tokens that a prompt has so far; less than the mean: all are equal. Each decode sequence
    brings up to `queries` new tokens: more than one where drafts are verified. `lora_tokens` of the tokens have one of
    `lora_adapters` distinct adapters.
    """

    tokens: Num
    logits: Num
    decode_sequences: Num
    decode_context: tuple[Num, ...]
    prefill_tokens: Num
    prefill_pairs: tuple[Num, ...]
    prefill_context: tuple[Num, ...]
    group_tokens: Num | None = None
    queries: int = 1
    lora_tokens: Num = 0.0
    lora_adapters: Num = 0.0
    decode_longest: Num = 0.0
    prefill_longest: Num = 0.0

    @property
    def rows(self) -> Num:
        """Positions that are sampled: one per sequence, and one per draft token."""
        if self.queries == 1:
            return self.logits
        return self.logits + (self.tokens - self.decode_sequences - self.prefill_tokens)

    @property
    def expert_tokens(self) -> Num:
        """New tokens of all data-parallel ranks that share the experts."""
        return self.tokens if self.group_tokens is None else self.group_tokens


def attended_pairs(chunk: int, past: int, span: Span = FULL) -> int:
    """Pairs of a causal chunk: what `span` lets each token attend, summed over past <= p < past + chunk.

    >>> attended_pairs(4, 0), attended_pairs(4, 10), attended_pairs(4, 2, Span("window", 3))
    (10, 50, 12)
    >>> attended_pairs(6, 2, Span("chunk", 4))
    17
    """
    end = past + chunk
    if span.kind == "chunk":
        return _chunked_pairs(end, span.size) - _chunked_pairs(past, span.size)
    if span.kind == "full" or end <= span.size:
        return chunk * past + chunk * (chunk + 1) // 2
    growing = max(0, span.size - past)
    return growing * past + growing * (growing + 1) // 2 + (chunk - growing) * span.size


def _chunked_pairs(tokens: int, size: int) -> int:
    """Pairs of the first `tokens` tokens when each attends its own chunk of `size`."""
    whole, rest = divmod(tokens, size)
    return whole * (size * (size + 1) // 2) + rest * (rest + 1) // 2


def context_read(chunk: int, past: int, span: Span = FULL) -> int:
    """K/V entries that a causal chunk reads: its own and those of the past that some of its tokens attend.

    The picks of `top_k` are taken to differ as much as they can, up to everything there is.
    """
    if span.kind == "window":
        return chunk + min(past, span.size - 1)
    if span.kind == "chunk":
        return chunk + past % span.size
    if span.kind == "top_k":
        return min(past + chunk, attended_pairs(chunk, past, span))
    return past + chunk


def prefill_sums(spans: tuple[Span, ...], work: Iterable[tuple[int, int]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(pairs, K/V entries read) of `work`, a list of (chunk, past), per span."""
    chunks = list(work)
    pairs = tuple(sum(attended_pairs(chunk, past, span) for chunk, past in chunks) for span in spans)
    read = tuple(sum(context_read(chunk, past, span) for chunk, past in chunks) for span in spans)
    return pairs, read
