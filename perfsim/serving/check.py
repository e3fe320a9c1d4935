"""Conservation laws, checked at the end of every simulation and not only in tests."""

from __future__ import annotations

from typing import Any

from perfsim.serving.recorder import Columns


class BookkeepingError(RuntimeError):
    """The simulator contradicts itself: a bug in perfsim, never the user's fault."""


class Ledger:
    """A sink that adds up what requests and segments say, independently of the engine's own counters."""

    def __init__(self) -> None:
        self.tokens = 0.0  # new tokens over all steps
        self.kv_tokens = 0.0  # K/V that finished requests ended with
        self.engine_seconds = 0.0
        self.token_gaps = 0.0
        self.gap_seconds = 0.0
        self.decode_seconds = 0.0
        self.requests = 0
        self.last_arrival = 0.0

    def add_requests(self, columns: Columns) -> None:
        self.requests += len(columns["finish_s"])
        self.last_arrival = max(self.last_arrival, float(columns["arrival_s"].max()))
        self.kv_tokens += float((columns["prompt_tokens"] + columns["output_tokens"] - 1).sum())
        self.engine_seconds += float((columns["finish_s"] - columns["queued_s"]).sum())
        self.decode_seconds += float((columns["finish_s"] - columns["first_token_s"]).sum())
        self.token_gaps += float((columns["output_tokens"] - 1).sum())

    def add_segments(self, columns: Columns) -> None:
        steps = columns["steps"]
        self.tokens += float((steps * columns["tokens"]).sum())
        lasting = steps * columns["first_s"] + columns["slope_s"] * (steps * (steps - 1) / 2)
        self.gap_seconds += float((lasting * columns["gap_sequences"]).sum())
        self.token_gaps -= float((steps * columns["gap_sequences"]).sum())

    def add_gaps(self, seconds: Any, weights: Any) -> None:
        self.gap_seconds += float((seconds * weights).sum())
        self.token_gaps -= float(weights.sum())


def check_conservation(engine: Any, ledger: Ledger, *, sent: int) -> None:
    """Raise BookkeepingError unless requests, tokens, token gaps, blocks and time add up.

    requests  sent = finished + rejected
    tokens    computed in steps = K/V of finished requests - found in the cache + dropped by preemptions
    gaps      every output token but the first follows another; their gaps sum to last minus first token time
    blocks    all free again
    Little    the time integral of the number in the engine = the sum of times in the engine
    """
    problems = []
    rejected = sum(engine.recorder.rejected.values())
    if sent != ledger.requests + rejected or engine.submitted != sent:
        problems.append(f"{sent} requests sent, {ledger.requests} finished, {rejected} rejected")
    expected = ledger.kv_tokens - engine.saved_tokens + engine.lost_tokens
    if ledger.tokens != expected or engine.scheduled_tokens != ledger.tokens:
        problems.append(f"{ledger.tokens:.0f} tokens computed, {expected:.0f} accounted for")
    if ledger.token_gaps != 0:
        problems.append(f"{ledger.token_gaps:.0f} inter-token gaps missing")
    if not _close(ledger.gap_seconds, ledger.decode_seconds):
        problems.append(f"gaps sum to {ledger.gap_seconds!r} s, decoding took {ledger.decode_seconds!r} s")
    if not _close(engine.request_seconds, ledger.engine_seconds):
        problems.append(f"Little's law: {engine.request_seconds!r} and {ledger.engine_seconds!r} request-seconds")
    wrong = engine.kv.check()
    if wrong:
        problems.append(wrong)
    if problems:
        raise BookkeepingError("; ".join(problems))


def _close(first: float, second: float) -> bool:
    return abs(first - second) <= 1e-6 * max(1.0, abs(first), abs(second))
