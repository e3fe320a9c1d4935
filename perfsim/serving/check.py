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
        self.rejected = 0.0  # drafts among them that came to nothing
        self.drafts = 0.0
        self.accepted = 0.0  # drafts that became output
        self.verifications = 0.0  # decode sequences over all steps
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
        accepted = steps * columns["accepted"]
        drafts = steps * (columns["tokens"] - columns["decode_sequences"] - columns["prefill_tokens"])
        self.drafts += float(drafts.sum())
        self.accepted += float(accepted.sum())
        self.verifications += float((steps * columns["decode_sequences"]).sum())
        self.rejected += float((drafts - accepted).sum())
        self.token_gaps -= float(accepted.sum())  # they come with the token before them
        lasting = steps * columns["first_s"] + columns["slope_s"] * (steps * (steps - 1) / 2)
        self.gap_seconds += float((lasting * columns["gap_sequences"]).sum())
        self.token_gaps -= float((steps * columns["gap_sequences"]).sum())

    def add_gaps(self, seconds: Any, weights: Any) -> None:
        self.gap_seconds += float((seconds * weights).sum())
        self.token_gaps -= float(weights.sum())


def check_conservation(
    engines: Any, ledger: Ledger, *, sent: int, failed: int = 0, submitted_again: int = 0, unused_seconds: float = 0.0
) -> None:
    """Raise BookkeepingError unless requests, tokens, token gaps, blocks and time of all `engines` together add up.

    requests  sent = finished + rejected + failed; a retry and a hand-over are one more submission
    tokens    computed in steps = K/V of finished requests - found in the cache - loaded from the host + dropped by
              preemptions and failures + handed over and never used + rejected drafts
    gaps      every output token but the first follows another or comes with it; their gaps sum to last minus first
              token time, those of requests that a failure stopped included
    blocks    all free again; of the KV tier, none on its way and those stored are there or evicted
    Little    the time integral of the number in the engines = the sum of times in them; `unused_seconds` were spent in
              prefill engines by requests whose K/V were lost later, less what others spent between two engines
    """
    engines = engines if isinstance(engines, list | tuple) else [engines]

    def total(name: str) -> float:
        return float(sum(getattr(engine, name) for engine in engines))

    problems = []
    rejected = sum(sum(engine.recorder.rejected.values()) for engine in engines)
    if sent != ledger.requests + rejected + failed:
        problems.append(f"{sent} requests sent, {ledger.requests} finished, {rejected} rejected, {failed} failed")
    if total("submitted") != sent + submitted_again:
        problems.append(f"{sent} requests sent and {submitted_again} once more, {total('submitted'):.0f} submitted")
    expected = ledger.kv_tokens - total("saved_tokens") + total("lost_tokens") + total("moved_tokens")
    expected += ledger.rejected - total("loaded_tokens")
    if ledger.tokens != expected or total("scheduled_tokens") != ledger.tokens:
        problems.append(f"{ledger.tokens:.0f} tokens computed, {expected:.0f} accounted for")
    if ledger.token_gaps + total("lost_gaps") != 0:
        problems.append(f"{ledger.token_gaps + total('lost_gaps'):.0f} inter-token gaps missing")
    decoding = ledger.decode_seconds + total("lost_gap_seconds")
    if not _close(ledger.gap_seconds, decoding):
        problems.append(f"gaps sum to {ledger.gap_seconds!r} s, decoding took {decoding!r} s")
    inside = ledger.engine_seconds + total("lost_seconds") + unused_seconds
    if not _close(total("request_seconds"), inside):
        problems.append(f"Little's law: {total('request_seconds')!r} and {inside!r} request-seconds")
    problems += [wrong for engine in engines if (wrong := engine.kv.check())]
    problems += [wrong for engine in engines if engine.offload is not None and (wrong := engine.offload.check())]
    if problems:
        raise BookkeepingError("; ".join(problems))


def _close(first: float, second: float) -> bool:
    return abs(first - second) <= 1e-6 * max(1.0, abs(first), abs(second))
