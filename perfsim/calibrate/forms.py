"""Shapes of the curves over measured columns: the formulas of `perfsim.cost.curves`, vectorised over whole tables.

Benchmarks repeat a kernel on the same buffers, so that what fits into the L2 cache never comes from HBM; in an engine
other layers come in between. Each form therefore has two nuisance coefficients for how much faster resident data are
and up to which share of the L2 they are: they are fitted with the curve and never stored in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from perfsim.calibrate.bounds import (
    BOUNDS,
    HOST,
    HOST_PRODUCTS,
    LATENT,
    NUISANCE,
    OTHER_STARTS,
    OTHER_STARTS_PRODUCTS,
    PACKED,
    QUANTISING,
    RESIDENT,
    RESIDENT_PRODUCTS,
    SKEW,
    US,
    WIDE,
    Bounds,
)
from perfsim.calibrate.links import bounds_of
from perfsim.calibrate.links import seconds as link_seconds
from perfsim.calibrate.routing import GATED_VERSION, IDLE_PASSES, UNGATED, largest_share
from perfsim.calibrate.rows import Array, Kind, Rows
from perfsim.cost.curves import ABREAST
from perfsim.cost.decode import WIDEST, parts, powered, queued, sm_items
from perfsim.cost.device import peak_flops
from perfsim.cost.products import Product, blended, gemm_row
from perfsim.ops.mlp import distinct_experts
from perfsim.spec.curves import DecodeCurve, ExpertCurve, GemmCurve, LinkCurve, PrefillCurve, StreamCurve
from perfsim.spec.hardware import Accelerator
from perfsim.spec.model import WEIGHT_BYTES

Curve = GemmCurve | DecodeCurve | PrefillCurve | ExpertCurve | LinkCurve | StreamCurve
ACTIVATION = 2.0  # bytes of a 16-bit number
ARITHMETIC = {"fp8": "fp8", "fp8_block": "fp8", "nvfp4": "fp4"}  # all other formats are expanded to 16 bits

HOST_FEW_ROWS, HOST_ALIGNED_ROWS = 32.0, 4.0
# FlashAttention-2 there; what it does not split is out of range, or among what `calibrate.mixed` fits.
SPLIT_AT_WILL = frozenset({"a100-80gb-sxm", "l40s-48gb", "rtx-pro-6000-blackwell-96gb"})
STREAMED = 8  # exponent: K and V of decodes, read once per repetition, are all in the L2 cache or none


@dataclass(frozen=True)
class Form:
    """What one group of rows is fitted with: bounds of the coefficients that are free, values of those that are not."""

    kind: Kind
    bounds: Bounds
    fixed: Mapping[str, float]

    def starts(self) -> list[dict[str, float]]:
        """Where the search begins: more than once where it can choose the wrong algorithm."""
        first = {name: start for name, (start, _, _) in self.bounds.items()}
        others: dict[Kind, tuple[dict[str, float], ...]]
        others = {"collective": OTHER_STARTS, "gemm": OTHER_STARTS_PRODUCTS}
        mine = ({name: value for name, value in other.items() if name in first} for other in others.get(self.kind, ()))
        return [first, *({**first, **other} for other in mine if other)]

    def seconds(self, values: Mapping[str, float], rows: Rows, chip: Accelerator) -> Array:
        """What the curve predicts for every row, under the conditions of the benchmark."""
        formula = {
            "gemm": _gemm, "decode": _decode, "prefill": _prefill, "moe": _experts, "stream": _stream,
            "collective": link_seconds,
        }[self.kind]  # fmt: skip
        result: Array = formula({**self.fixed, **values}, rows, chip)
        return result

    def curve(self, values: Mapping[str, float], *, family: str = "") -> Curve:
        """The curve without the conditions of the benchmark; of collectives, that of one family."""
        kind: Any = {
            "gemm": GemmCurve, "decode": DecodeCurve, "prefill": PrefillCurve, "moe": ExpertCurve,
            "collective": LinkCurve, "stream": StreamCurve,
        }[self.kind]  # fmt: skip
        prefix = f"{family}." if family else ""
        kept = {
            name.removeprefix(prefix): value
            for name, value in {**self.fixed, **values}.items()
            if name not in NUISANCE and name.startswith(prefix)
        }
        curve: Curve = kind(**kept)
        return curve


def form(rows: Rows) -> Form:
    """The form for a group of rows.

    Eight-bit and four-bit products quantise their input. vLLM's block-scaled kernels were timed with eager launches.
    """
    if rows.kind == "collective":
        return Form(rows.kind, *bounds_of([rows]))
    bounds, fixed = {**BOUNDS[rows.kind], **RESIDENT}, {}
    if rows.format.startswith("mla-"):
        bounds |= LATENT | (PACKED if rows.kind == "decode" else {})
        if rows.backend == "vllm":  # timed with eager launches; TensorRT-LLM's kernels take 11 to 15 us at no work
            bounds |= HOST
            fixed = {"launch": 14 * US}
        if rows.kind == "prefill":  # one K/V head for all: what it costs cannot be told from what the queries do
            fixed |= {"kv_tile": 0.0, "diagonal": 0.0, "packed": 1.0, "cut": 0.0}
    if rows.kind == "decode":
        fixed |= {"sharpness": 2.0}  # which all kernels come to within a tenth of their error
        bounds |= WIDE if rows.format == "fp8" else {}
        if rows.backend == "vllm" and rows.format == "bf16" and rows.device in SPLIT_AT_WILL:
            del bounds["splits"]
    if rows.kind == "gemm":
        bounds |= RESIDENT_PRODUCTS
        # cuBLAS has tiles of 256 rows; CUTLASS and DeepGEMM, which run the narrow formats, have 128 by 128
        fixed = {"tallest": 256.0 if rows.format == "bf16" else 128.0}
    if rows.kind == "gemm" and rows.format in ARITHMETIC:
        bounds |= QUANTISING
        if rows.backend == "vllm" and rows.format == "fp8_block":
            bounds |= HOST | HOST_PRODUCTS
            # The floor hides the kernel's own fixed time; that of other 8-bit kernels (3 to 6 us) stands in for it.
            fixed |= {"launch": 5 * US, "ramp": 0.0, "ramp_depth": 1.0, "ramp_sharpness": 1.0}
    if rows.kind == "moe":
        bounds |= SKEW
    return Form(rows.kind, {name: value for name, value in bounds.items() if name not in fixed}, fixed)


def fit_range(rows: Rows) -> Rows:
    """The rows that a curve describes: sizes that models have.

    Left out are matrices with a side below 256, prompts below 128 tokens (kernels then work on whole tiles of 128),
    head sizes other than 64, 128 and 256, and, on GPUs where vLLM runs FlashAttention-2, decodes with one query head
    per K/V head or a window: these do not split a context, so that few sequences leave most SMs idle. Experts spread
    over ranks are left out, because the source times the rank with the most rows, whose share has to be guessed.
    """
    columns = rows.columns
    if rows.kind in ("collective", "stream"):
        return rows
    if rows.kind == "gemm":
        return rows.where((columns["n"] >= 256) & (columns["k"] >= 256))
    if rows.kind in ("decode", "prefill"):
        latent = rows.format.startswith("mla-")
        keep = np.isin(columns["dim"], [64, 128, 256]) & (columns["heads"] <= 16 * columns["tiles"]) | latent
        if rows.kind == "prefill":
            return rows.where(keep & (columns["new"] >= 128))
        if not latent and rows.device in ("a100-80gb-sxm", "l40s-48gb", "rtx-pro-6000-blackwell-96gb"):
            keep &= (columns["heads"] > columns["tiles"]) & (columns["window"] == 0)
        return rows.where(keep & (columns["context"] >= 128))
    return rows.where(columns["ranks"] == 1)


def resident(rows: Rows, chip: Accelerator) -> Array:
    """How many times the L2 cache the data of each row fill; links have none."""
    if rows.kind == "collective":
        return np.full(len(rows), np.inf)
    return _moved(rows)[0] / (chip.l2_bytes or 1.0)


def _moved(rows: Rows) -> tuple[Array, Array]:
    """(bytes, distinct experts) of each row; the experts are those of equal loads, and 0 elsewhere."""
    c = rows.columns
    if rows.kind == "stream":
        return c["bytes"], 0.0 * c["bytes"]
    if rows.kind == "gemm":
        entering = {"fp8": 1.0, "fp8_block": 1.0, "nvfp4": 9 / 16}.get(rows.format, ACTIVATION)
        moved = c["n"] * c["k"] * WEIGHT_BYTES[rows.format] + c["m"] * (c["k"] * entering + c["n"] * ACTIVATION)
        return moved, 0.0 * moved
    if rows.kind == "moe":
        touched = np.minimum(c["experts"], c["top"] * c["tokens"]) / c["ranks"]
        return touched * _matrices(rows) * c["hidden"] * c["inter"] * WEIGHT_BYTES[rows.format], touched
    return c["sequences"] * (c["new"] * c["query"] * ACTIVATION + _attended(rows)[1] * _entry(rows)), 0.0 * c["new"]


def _entry(rows: Rows) -> Array:
    return rows.columns["entry"] * WEIGHT_BYTES[rows.format.removeprefix("mla-")]


def _attended(rows: Rows) -> tuple[Array, Array]:
    """(pairs, entries read) of each sequence."""
    c = rows.columns
    window = np.where(c["window"] > 0, c["window"], np.inf)
    if rows.kind == "decode":
        attended = np.minimum(c["context"], window)
        return attended, attended
    past = c["context"] - c["new"]
    growing = np.clip(window - past, 0.0, c["new"])
    pairs = growing * past + growing * (growing + 1) / 2
    pairs = pairs + np.where(c["new"] > growing, (c["new"] - growing) * np.where(np.isinf(window), 0.0, window), 0.0)
    return pairs, c["new"] + np.minimum(past, window - 1)


def _warm(values: Mapping[str, float], moved: Array, chip: Accelerator, *, steep: int = 4) -> Array:
    """The factor on memory time that data in the L2 cache bring: 1 / (1 + gain) where all fit, 1 where few do."""
    stays = 1.0 / (1.0 + (moved / (values["share"] * (chip.l2_bytes or 1.0))) ** steep)
    return 1.0 - stays * values["gain"] / (1.0 + values["gain"])


def _gemm(values: Mapping[str, float], rows: Rows, chip: Accelerator) -> Array:
    c = rows.columns
    moved = _moved(rows)[0]
    memory = moved / (values["bandwidth"] * chip.memory.read_bandwidth) * _warm(values, moved, chip, steep=8)
    rate = values["compute"] * peak_flops(chip, ARITHMETIC.get(rows.format, "bf16"))
    curve = GemmCurve.model_construct(None, **{name: values[name] for name in GemmCurve.model_fields if name in values})
    product = Product(curve, c["n"], c["k"], rate, chip.sm_count or 0)
    seconds = c["m"] * gemm_row(c["k"], curve, chip) + product.seconds(c["m"], memory)
    return _above_host(values, seconds, c["m"])


def _above_host(values: Mapping[str, float], seconds: Any, rows: Any = 0.0) -> Array:
    """The longer of the kernel and of the host's launches, rounded where they cross.

    vLLM's block-scaled products launch other kernels below 32 `rows`, and pad rows to multiples of four first on some
    GPUs; both change what the host does.
    """
    if "host" not in values:
        return np.asarray(seconds)
    host = values["host"] * np.where(rows < HOST_FEW_ROWS, values.get("host_few", 1.0), 1.0)
    host = host + values.get("host_padding", 0.0) * (np.mod(rows, HOST_ALIGNED_ROWS) > 0)
    return np.asarray(blended(seconds, host, 8.0))


def _decode(values: Mapping[str, float], rows: Rows, chip: Accelerator) -> Array:
    c, units = rows.columns, chip.sm_count or 1
    attended, entry = _attended(rows)[1], _entry(rows)
    moved = c["sequences"] * (c["query"] * ACTIVATION + attended * entry)
    memory = moved / (values["bandwidth"] * chip.memory.read_bandwidth) * _warm(values, moved, chip, steep=STREAMED)
    items = sm_items(c["heads"], c["tiles"], values.get("packed", 128.0))
    read: Any = entry / c["tiles"] / values["sm_bandwidth"]
    if "wide" in values:
        read = read + values["wide"] * np.maximum(c["dim"] - WIDEST, 0.0)
    if "compute" in values:
        read = powered(read, c["pair"] / items * units / (values["compute"] * peak_flops(chip, "bf16")))
    items = c["sequences"] * items / units
    split = np.where(c["window"] > 0, 0.0, 1.0 / values.get("splits", np.inf))
    busy = read * parts(items, split) * attended + values["tile"] * queued(items)
    held = c["sequences"] * attended * entry
    filling = values["ramp"] * held / (held + values["ramp_bytes"])
    return _above_host(values, values["launch"] + filling + blended(memory, busy, values["sharpness"]))


def _prefill(values: Mapping[str, float], rows: Rows, chip: Accelerator) -> Array:
    c, units = rows.columns, chip.sm_count or 1
    pairs = c["sequences"] * _attended(rows)[0]
    arithmetic = "fp8" if rows.format == "fp8" else "bf16"
    head = (c["pair"] / c["heads"] + 4 * values["head_padding"]) / (values["compute"] * peak_flops(chip, arithmetic))
    moved = _moved(rows)[0]
    memory = moved / (values["bandwidth"] * chip.memory.read_bandwidth) * _warm(values, moved, chip)
    critical = head * units * values["critical_rows"] * np.where(c["window"] > 0, 0.0, c["context"])
    tile = (c["heads"] * values["tile"] + c["tiles"] * values["kv_tile"]) / units
    tile = tile + head * values["diagonal"] * np.minimum(c["heads"], values["packed"] * c["tiles"])
    tiles = c["sequences"] * c["new"] * tile
    cut = np.where(c["window"] > 0, np.minimum(values["cut"] * c["sequences"] * c["new"], pairs), 0.0)
    work = head * c["heads"] * (pairs + cut) + tiles
    return _above_host(values, values["launch"] + memory + blended(work, critical, ABREAST))


def _stream(values: Mapping[str, float], rows: Rows, chip: Accelerator) -> Array:
    moved = rows.columns["bytes"]
    memory = moved / (values["bandwidth"] * chip.memory.read_bandwidth) * _warm(values, moved, chip)
    return np.asarray(values["launch"] + values["column"] * rows.columns["width"] + memory)


def _experts(values: Mapping[str, float], rows: Rows, chip: Accelerator) -> Array:
    c = rows.columns
    touched = _distinct(rows, values["popularity"])
    routed = c["tokens"] * c["top"] * _share(rows)
    expert = _matrices(rows) * c["hidden"] * c["inter"]
    moved = touched * expert * WEIGHT_BYTES[rows.format]
    moved = moved + routed * (c["hidden"] + _matrices(rows) * c["inter"]) * ACTIVATION
    moved = moved + c["tokens"] * c["hidden"] * ACTIVATION / c["ranks"]
    memory = moved / (values["bandwidth"] * chip.memory.read_bandwidth) * _warm(values, moved, chip)
    rate = values["compute"] * peak_flops(chip, ARITHMETIC.get(rows.format, "bf16"))
    compute = 2 * expert * (routed + touched * values["expert_padding"]) / rate
    idle = c["tokens"] * (1.0 - 1.0 / c["ranks"]) * IDLE_PASSES.get(rows.backend, 0.0)
    sorting = (routed * values["passes"] + idle) * c["hidden"] * ACTIVATION / chip.memory.read_bandwidth
    return np.asarray(values["launch"] + sorting + blended(memory, compute, values["sharpness"]))


def _matrices(rows: Rows) -> Array:
    """Matrices of one expert: gate, up and down, or without the gate."""
    c = rows.columns
    if rows.version == GATED_VERSION:
        return np.full(len(rows), 3.0)
    known = [(c["hidden"] == h) & (c["experts"] == experts) & (c["top"] == top) for h, experts, top in UNGATED]
    return np.where(np.logical_or.reduce(known), 2.0, 3.0)


def _share(rows: Rows) -> Array:
    """The share of all rows that the timed rank gets."""
    c = rows.columns
    shares = 1.0 / c["ranks"]
    spread = np.flatnonzero((c["ranks"] > 1) & (c["skew"] > 0))
    routings = np.stack([c[name][spread] for name in ("experts", "ranks", "skew", "tokens")], axis=1)
    kinds, place = np.unique(routings, axis=0, return_inverse=True)
    found = [largest_share(int(experts), int(ranks), skew, tokens) for experts, ranks, skew, tokens in kinds.tolist()]
    shares[spread] = np.array(found)[place.reshape(-1)] if found else []
    return shares


def _distinct(rows: Rows, popularity: float) -> Array:
    """Experts of this rank that some token picks; equal loads touch as many as they can."""
    c = rows.columns
    distinct = np.minimum(c["experts"], c["top"] * c["tokens"])
    skewed = np.flatnonzero(c["skew"] > 0)
    code = c["experts"][skewed] * 1e6 + c["top"][skewed] * 1e3 + c["skew"][skewed]  # one number per kind of routing
    for each in np.unique(code):
        at = skewed[code == each]
        experts, top, skew = (float(c[name][at[0]]) for name in ("experts", "top", "skew"))
        distinct[at] = distinct_experts(c["tokens"][at], int(experts), int(top), skew * popularity)
    return distinct / c["ranks"]
