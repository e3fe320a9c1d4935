"""Steps with prompt chunks on kernels that do not split a context: all sequences of the batch in one launch.

FlashAttention-2 on a paged cache cuts a step with prompts into tiles: some query rows of one sequence and head, for
which one SM reads the context from the first entry to the last (64 rows in the split kernel of vLLM's fork; a few
decodes alone are split). The one row of a decode takes the time of a whole tile, and query heads of a K/V head share no
tile. Three things bound such a step, all in the times of LLMServingSim's mixed batches:

- one SM on the longest context, whatever else there is: decodes ride for free on SMs that a long chunk leaves idle;
- all tiles, spread over the SMs, with a last wave that does not fill them;
- reading K and V, again for every query head of a K/V head that runs in another wave, once these outgrow the L2 cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from perfsim.cost.curves import ABREAST, pick, prefill_coefficients
from perfsim.cost.device import peak_flops
from perfsim.cost.products import blended
from perfsim.ops.op import Beside, Num, Op
from perfsim.spec.calibration import DeviceEfficiency
from perfsim.spec.curves import DecodeCurve, MixedCurve, PrefillCurve
from perfsim.spec.hardware import Accelerator

# Tiles per SM from which on contexts are not split: 0.8 of two waves in FlashAttention-2's `num_splits_heuristic`
# (recalled). In LLMServingSim's unequal batches 256 tiles are split and 512 are not on 188 SMs, 128 and 256 on 128 SMs.
UNSPLIT = 1.6
EVICTION = 4.0  # how sharply K and V fall out of the L2 cache as they outgrow it, as in `calibrate.forms`


# (decodes, entries that they attend, longest context of one, tokens, pairs, entries and longest context of the prompts)
PlainBeside = Callable[[float, float, float, float, float, float, float], tuple[float, float]]
PlainPrompts = Callable[[float, float, float], float]  # as `MixedKernel.prompts`


@dataclass(frozen=True, slots=True)
class MixedKernel:
    """Seconds of the parts of one layer's kernel; see `prompts` and `decodes`.

    `serial` is one SM's time for one entry of a context, `entry` that of a decode's entry spread over all SMs, `last`
    what `unsplit` or more decodes alone wait per entry that the longest has beyond the mean. `sequence` is what a
    decode's tiles take to start, `empty` those without rows, per decode and new token. `read` is an
    entry over the achieved bandwidth, `arithmetic` its FLOPs at the peak. `waves` are waves of SMs per tile of each
    head of a K/V head, `rereads` the most a K/V head can be read again, `held` the share of the L2 cache that an entry
    of one K/V head fills.
    """

    launch: float
    per_pair: float
    per_token: float
    critical: float
    serial: float
    tail: float
    entry: float
    sequence: float
    empty: float
    read: float
    read_sequence: float
    arithmetic: float
    waves: float
    rereads: float
    rows: float
    held: float
    last: float
    unsplit: float

    def waits(self, sequences: Num, beyond: Num) -> Num:
        """Seconds that decodes alone wait for the longest of them, `beyond` entries longer than the mean."""
        found: Num = np.where(np.greater_equal(sequences, self.unsplit), self.last * beyond, 0.0)
        return found

    def prompts(self, tokens: Num, pairs: Num, longest: Num) -> Num:
        """Seconds of prompt chunks without decodes: max(serial x longest context, pairs + last wave + rows)."""
        found: Num = np.maximum(self.serial * longest, self._together(tokens, pairs, longest))
        return found

    def decodes(self, sequences: Num, attended: Num, context: Num, beside: Beside) -> Num:
        """Seconds that decodes of `context` at most add to the prompts `beside`, at least those of reading K and V."""
        tokens, pairs, entries, longest, _ = beside
        work = self.entry * attended + sequences * (self.sequence + self.empty * tokens)
        fits = self.held * (attended + entries)
        missed = 1.0 / (1.0 + np.maximum(fits, 1e-9) ** -EVICTION)
        again = np.minimum(self.rereads, self.waves * (sequences + tokens / self.rows)) * missed
        moved = self.read_sequence * sequences + self.read * attended
        work = np.maximum(work, moved + again * self.read * attended)
        alone = self._together(tokens, pairs, longest)
        all_tiles = alone + work + self.tail * self.serial * context
        whole = np.maximum(self.serial * np.maximum(longest, context), all_tiles)
        least = np.maximum(moved, self.arithmetic * attended)
        found: Num = np.maximum(least, whole - np.maximum(self.serial * longest, alone))
        return found

    def shared(self, beside: Beside) -> Num:
        """Seconds of a step with prompts that decodes need not pay for: the launch, and prompts before bytes."""
        return self.launch + self.prompts(beside.tokens, beside.pairs, beside.longest)

    def _together(self, tokens: Num, pairs: Num, longest: Num) -> Num:
        return blended(self.per_pair * pairs + self.per_token * tokens, self.critical * longest, ABREAST)


def plain_prompts(kernel: MixedKernel) -> PlainPrompts:
    """`kernel.prompts` of plain numbers, where NumPy would take ten times as long."""
    per_pair, per_token, critical, serial = kernel.per_pair, kernel.per_token, kernel.critical, kernel.serial
    inverse = 1.0 / ABREAST

    def prompts(tokens: float, pairs: float, longest: float) -> float:
        together = ((per_pair * pairs + per_token * tokens) ** ABREAST + (critical * longest) ** ABREAST) ** inverse
        one_sm = serial * longest
        return one_sm if one_sm > together else together

    return prompts


def plain_beside(kernel: MixedKernel) -> PlainBeside:
    """(`kernel.decodes`, `kernel.shared`) of plain numbers: the same formulas, with what both need computed once."""
    launch, per_pair, per_token, critical = kernel.launch, kernel.per_pair, kernel.per_token, kernel.critical
    serial, tail, entry, sequence = kernel.serial, kernel.tail * kernel.serial, kernel.entry, kernel.sequence
    empty, read, read_sequence, arithmetic = kernel.empty, kernel.read, kernel.read_sequence, kernel.arithmetic
    waves, rereads, rows, held, inverse = kernel.waves, kernel.rereads, kernel.rows, kernel.held, 1.0 / ABREAST

    def beside(
        decodes: float, attended: float, context: float, tokens: float, pairs: float, entries: float, longest: float
    ) -> tuple[float, float]:
        bytes_s = moved = read_sequence * decodes + read * attended
        if rereads:
            again = waves * (decodes + tokens / rows)
            missed = 1.0 / (1.0 + max(held * (attended + entries), 1e-9) ** -EVICTION)
            bytes_s += (again if again < rereads else rereads) * missed * read * attended
        tiles_s = entry * attended + decodes * (sequence + empty * tokens)
        together = ((per_pair * pairs + per_token * tokens) ** ABREAST + (critical * longest) ** ABREAST) ** inverse
        whole = together + (tiles_s if tiles_s > bytes_s else bytes_s) + tail * context
        one_sm = serial * longest
        prompts = together if together > one_sm else one_sm
        if context > longest:
            one_sm = serial * context
        added = (whole if whole > one_sm else one_sm) - prompts
        products = arithmetic * attended
        least = moved if moved > products else products
        return added if added > least else least, launch + prompts

    return beside


def mixed_kernel(op: Op, efficiency: DeviceEfficiency, chip: Accelerator) -> MixedKernel | None:
    """The kernel that an attention operator shares with the step's other one; None where nothing was fitted."""
    curves = efficiency.curves
    mixed, decode, prefill = curves.mixed.get(op.format), pick(curves.decode, op), pick(curves.prefill, op)
    if mixed is None or decode is None or prefill is None or not chip.sm_count:
        return None
    return kernel_of(op, mixed, decode, prefill, chip)


def prompts_seconds(op: Op, curve: PrefillCurve, kernel: MixedKernel, chip: Accelerator) -> Num:
    """As `curves.prefill_seconds`, where one SM reads a whole context: launch + prompts + bytes / (e_b bandwidth)."""
    memory = chip.memory
    moved = op.read_bytes / memory.read_bandwidth + op.write_bytes / memory.write_bandwidth
    prompts = kernel.prompts(op.rows, op.flops / op.pair_flops, op.longest)
    return curve.launch + prompts + moved / curve.bandwidth


def kernel_of(op: Op, mixed: MixedCurve, decode: DecodeCurve, prefill: PrefillCurve, chip: Accelerator) -> MixedKernel:
    """The times of an attention operator's parts on these curves."""
    units, memory, heads, tiles = chip.sm_count or 1, chip.memory, op.heads, float(op.tiles)
    prompts = op if op.beside is None else replace(op, pair_flops=op.beside.pair_flops)
    per_pair, critical, _, per_token = prefill_coefficients(prompts, prefill, chip)
    serial = mixed.rows * per_pair / heads * units
    moved = decode.bandwidth * memory.read_bandwidth
    return MixedKernel(
        prefill.launch, per_pair, per_token, critical, serial, mixed.tail,
        entry=heads * serial / units,
        sequence=heads * mixed.rows * prefill.tile / units,
        empty=heads * mixed.empty / (mixed.rows * units),
        read=op.entry_bytes / moved,
        read_sequence=op.sequence_read_bytes / moved
        + op.sequence_write_bytes / (decode.bandwidth * memory.write_bandwidth),
        arithmetic=op.pair_flops / peak_flops(chip, op.dtype),
        waves=heads / tiles / units,
        rereads=max(0.0, heads / tiles - 1.0),
        rows=mixed.rows,
        last=mixed.last * serial if op.limit == np.inf else 0.0,  # else the wait would not stay the same in a run
        unsplit=UNSPLIT * units / tiles,
        held=op.entry_bytes / tiles / chip.l2_bytes if chip.l2_bytes else np.inf,
    )  # fmt: skip
