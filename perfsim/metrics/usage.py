"""What one scheduler was busy with: segments folded into totals, peaks and a timeline of bounded size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from perfsim.metrics import steps
from perfsim.metrics.timeline import Timeline

if TYPE_CHECKING:
    from collections.abc import Mapping

    from perfsim.metrics.quantiles import Distribution

    Columns = Mapping[str, Any]

SERIES = ("running", "waiting", "kv_blocks", "prefill_tokens", "output_tokens")
PEAKS = ("running", "waiting", "kv_blocks")


class Usage:
    """A sink for the segments of one scheduler, in order of time; their token gaps go to `itl`.

    `kv_blocks` is the size of its pool, `block_size` tokens per block. `busy_s` is seconds in steps, `output_tokens`
    counts tokens put out, those of requests that failed later included.
    """

    def __init__(self, *, kv_blocks: int, block_size: int, itl: Distribution) -> None:
        self.kv_blocks, self._block_size, self._itl = kv_blocks, block_size, itl
        self.timeline = Timeline(SERIES)
        self.segments = self.steps = 0
        self.sequence_steps = self.token_steps = 0
        self.prefill_tokens = self.output_tokens = 0
        self.busy_s = self.longest_step = 0.0
        self.peak = dict.fromkeys(PEAKS, 0)

    def add_requests(self, columns: Columns) -> None:
        """Requests do not matter here."""

    def add_gaps(self, seconds: Any, weights: Any) -> None:
        """Exceptional token gaps do not matter here."""

    def add_segments(self, columns: Columns) -> None:
        """Add the next segments in order of time."""
        count = len(columns["steps"])
        if count == 0:
            return
        steps.add_gaps(self._itl, columns)
        number = np.asarray(columns["steps"], dtype=np.int64)
        start, lasting = np.asarray(columns["start_s"], dtype=np.float64), steps.durations(columns)
        span = np.maximum(lasting, columns["held_s"]) if "held_s" in columns else lasting
        running, waiting = np.asarray(columns["running"]), np.asarray(columns["waiting"])
        blocks = np.asarray(columns["kv_blocks"])
        prefill, emitted = np.asarray(columns["prefill_tokens"]) * number, np.asarray(columns["emitted"]) * number
        # Blocks are recorded at the end; decoding fills a block per sequence every block_size steps on the way there.
        grown = np.asarray(columns["decode_sequences"]) * ((number - 1) / (2.0 * self._block_size))
        held = np.maximum(blocks - grown, 0.0) * span
        amounts = (running * span, waiting * span, held, prefill, emitted)
        self.timeline.add(start, start + span, np.stack(amounts).astype(np.float64))
        self.segments += count
        self.steps += int(number.sum())
        self.sequence_steps += int((running * number).sum())
        self.token_steps += int((np.asarray(columns["tokens"]) * number).sum())
        self.prefill_tokens += int(prefill.sum())
        self.output_tokens += int(emitted.sum())
        self.busy_s += float(lasting.sum())
        self.longest_step = max(self.longest_step, steps.longest_step(columns))
        for name, values in (("running", running), ("waiting", waiting), ("kv_blocks", blocks)):
            self.peak[name] = max(self.peak[name], int(values.max()))


def mean_batch(usages: Sequence[Usage]) -> float | None:
    """Running sequences per engine step, over all steps of several schedulers; None without steps."""
    total = sum(usage.steps for usage in usages)
    return sum(usage.sequence_steps for usage in usages) / total if total else None
